"""Weights that accelerate keeps on a CPU or a disk, and brings in for a module's own forward alone.

accelerate replaces the forward of a module on the instance. A hook moves the input to an execution device, brings the
weights in, and leaves placeholders on the meta device behind. A HiRA layer multiplies by W' itself, without calling
that forward, so it has to do what the hook does; what it has to know of hooks is here. accelerate is never imported: a
module can only have a hook of it if it was.
"""

from __future__ import annotations

import sys
from collections import ChainMap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hira.errors import HiraError


def hooks(module: nn.Module) -> list[Any]:
    """All of accelerate's hooks on a module, in their order; those of other libraries are none of them."""
    found, waiting = [], [module.__dict__.get("_hf_hook")]
    while waiting:
        hook = waiting.pop(0)
        waiting = [*getattr(hook, "hooks", ()), *waiting]
        if hook is not None and not hasattr(hook, "hooks"):
            found.append(hook)
    return found


def _aligns(hook: Any) -> bool:
    kind = getattr(sys.modules.get("accelerate.hooks"), "AlignDevicesHook", None)
    return kind is not None and isinstance(hook, kind)


def source(module: nn.Module) -> Any:
    """The hook that keeps a module's weights elsewhere; None where they stay with the module."""
    for hook in hooks(module):
        if _aligns(hook) and hook.offload and hook.weights_map is not None:
            return hook
    return None


def is_away(module: nn.Module, name: str) -> bool:
    """Whether a module has a placeholder for one of its tensors, which a hook knows where to find."""
    tensor = getattr(module, name, None)
    return isinstance(tensor, Tensor) and tensor.is_meta and source(module) is not None


def execution_device(module: nn.Module) -> Any:
    """The device to which a module's hook moves its inputs; None where they stay."""
    devices = [hook.execution_device for hook in hooks(module) if _aligns(hook)]
    return next((device for device in reversed(devices) if device is not None), None)


def returns_output(module: nn.Module) -> bool:
    """Whether a module's hook moves the output back to where the input was."""
    return any(_aligns(hook) and hook.io_same_device for hook in hooks(module))


def is_own_forward(module: nn.Module) -> bool:
    """Whether a module runs the forward of its type, if with hooks around it that only move tensors."""
    if "forward" not in module.__dict__:
        return True
    around = hooks(module)
    own = getattr(module.__dict__.get("_old_forward"), "__func__", None) is type(module).forward
    return own and bool(around) and all(_aligns(hook) and not hook.no_grad for hook in around)


class Away(NamedTuple):
    """A tensor that is elsewhere: the mapping that finds it there, its name in that, and where it is needed.

    Merging gives the hook another mapping, so that a backward that is still to come finds the value of its forward.
    """

    weights: Mapping[str, Tensor]
    name: str
    device: Any

    def fetch(self, placeholder: Tensor) -> Tensor:
        """The tensor on the execution device, in the placeholder's dtype."""
        return self.weights[self.name].detach().to(device=self.device, dtype=placeholder.dtype)


def away(module: nn.Module, name: str) -> Away | None:
    """Where a tensor of a module is; None where it is in the module."""
    return Away(source(module).weights_map, name, execution_device(module)) if is_away(module, name) else None


def present(module: nn.Module, name: str) -> Any:
    """A tensor of a module, brought in if it is elsewhere; None if there is none of that name."""
    found = away(module, name)
    tensor = getattr(module, name, None)
    return tensor if found is None else found.fetch(tensor)


class Kept(NamedTuple):
    """What a hook finds for a tensor at some time: its mapping, and the value put over that, if there is one."""

    weights: Mapping[str, Tensor]
    name: str

    @property
    def value(self) -> Tensor:
        """The tensor."""
        return self.weights[self.name]


def put(module: nn.Module, name: str, value: Tensor | Kept) -> None:
    """Have a module's hook find another value for a tensor, or again the one that it found at some time.

    What is on the disk stays as it is. A new value is kept on the CPU, laid over the hook's mapping.
    """
    hook = source(module)
    over, below = _layers(hook.weights_map)
    others = {key: tensor for key, tensor in over.items() if key != name}
    if isinstance(value, Kept):
        over_then, below_then = _layers(value.weights)
        if below_then is not below or name in over_then:
            others[name] = value.value
    else:
        others[name] = value.detach().to("cpu")
    hook.weights_map = ChainMap(others, below) if others else below
    if not getattr(module, name).is_meta:  # it is in the middle of a forward, or of a merge of PEFT's
        parameter = module._parameters[name]
        new = hook.weights_map[name].detach().to(parameter.device, parameter.dtype)
        module._parameters[name] = nn.Parameter(new, requires_grad=parameter.requires_grad)


def _layers(weights: Any) -> tuple[dict[str, Tensor], Any]:
    return (weights.maps[0], weights.maps[1]) if isinstance(weights, ChainMap) else ({}, weights)


def check_reachable(module: nn.Module, tensor: Tensor, x: Tensor) -> None:
    """Refuse to compute with a placeholder; PyTorch would not always notice, and give any numbers."""
    if tensor.is_meta and not x.is_meta and source(module) is None:
        raise HiraError(
            f"The weight of {type(module).__name__} is on the meta device, and there is no hook that would bring it "
            "in. Load the model's weights first; if accelerate offloads whole blocks (preload_module_classes), "
            "offload without that."
        )


@contextmanager
def left_where_it_is(model: nn.Module) -> Iterator[None]:
    """Hide from PEFT that a model is spread over devices, so that it does not spread it anew."""
    spread = [(module, module.__dict__.pop("hf_device_map")) for module in _spread(model)]
    try:
        yield
    finally:
        for module, devices in spread:
            module.hf_device_map = devices


def _spread(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if "hf_device_map" in module.__dict__]


def check_blocks(model: nn.Module, kind: type[nn.Module], what: str) -> None:
    """Refuse something where accelerate brings whole blocks in, in which it finds weights by names from before.

    Args:
        model: the model.
        kind: the type of the layers that this is about.
        what: for the message, what cannot be done with them.
    """
    for name, block in model.named_modules():
        hook = source(block)
        if hook is not None and hook.place_submodules and any(isinstance(inner, kind) for inner in block.modules()):
            raise HiraError(
                f"{what}: accelerate brings {name or type(block).__name__} in as a whole block. Offload the model "
                "without preload_module_classes, then adapt it, which leaves adapters on the execution device."
            )
