"""Weights that accelerate keeps on a CPU or a disk, and brings in for a module's own forward alone.

accelerate replaces the forward of a module on the instance. A hook moves the input to an execution device, brings the
weights in, and leaves placeholders on the meta device behind. A HiRA layer multiplies by W' itself, without calling
that forward, so it has to do what the hook does; what it has to know of hooks is here. accelerate is never imported: a
module can only have a hook of it if it was.
"""

from __future__ import annotations

import sys
from collections import ChainMap
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hira.errors import HiraError


def is_hooked(module: nn.Module) -> bool:
    """Whether accelerate has a hook on a module; cheap, as every forward asks."""
    return "_hf_hook" in module.__dict__


def hooks(module: nn.Module) -> list[Any]:
    """All of accelerate's hooks on a module, in their order."""
    found: list[Any] = []
    waiting = [module.__dict__["_hf_hook"]] if is_hooked(module) else []
    while waiting:
        hook = waiting.pop(0)
        inner = getattr(hook, "hooks", None)
        if inner is None:
            found.append(hook)
        else:
            waiting = [*inner, *waiting]
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
    # a hook that is removed leaves the method on the instance
    forward = module.__dict__.get("_old_forward" if around else "forward")
    own = getattr(forward, "__func__", None) is type(module).forward and getattr(forward, "__self__", None) is module
    return own and all(_aligns(hook) and not hook.no_grad for hook in around)


class Away(NamedTuple):
    """A tensor that is elsewhere: the mapping that finds it there, its name in that, and where it is needed.

    Merging gives the hook another mapping, so that a backward that is still to come finds the value of its forward.
    """

    weights: Mapping[str, Tensor]
    name: str
    device: Any

    def fetch(self, placeholder: Tensor, index: Any = ...) -> Tensor:
        """The tensor, or a part of it, on the execution device, in the placeholder's dtype."""
        return self.weights[self.name].detach()[index].to(device=self.device, dtype=placeholder.dtype)


def away(module: nn.Module, name: str) -> Away | None:
    """Where a tensor of a module is; None where it is in the module."""
    if not is_hooked(module) or not is_away(module, name):
        return None
    return Away(source(module).weights_map, name, execution_device(module))


def present(module: nn.Module, name: str) -> Any:
    """A tensor of a module, brought in if it is elsewhere; None if there is none of that name."""
    found, tensor = away(module, name), getattr(module, name, None)
    return tensor if found is None or tensor is None else found.fetch(tensor)


def bring_in(state: dict[str, Any], module: nn.Module, prefix: str) -> None:
    """Put a module's own parameters into a state dict in which they are placeholders."""
    for name, _ in module.named_parameters(recurse=False):
        if is_away(module, name):
            state[f"{prefix}{name}"] = present(module, name)


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
    parameter = getattr(module, name)
    if not parameter.is_meta:  # it was brought in, as for a merge of PEFT's
        new = hook.weights_map[name].detach().to(parameter.device, parameter.dtype)
        setattr(module, name, nn.Parameter(new, requires_grad=parameter.requires_grad))


def take(state: dict[str, Tensor], model: nn.Module) -> None:
    """Take what a state dict has for tensors that are elsewhere, which PyTorch would not load into a placeholder."""
    for prefix, module in model.named_modules():
        for name, tensor in module.named_parameters(recurse=False):
            value = state.get(f"{prefix}.{name}")
            if value is not None and value.shape == tensor.shape and is_away(module, name):
                del state[f"{prefix}.{name}"]
                if not torch.equal(value.to(tensor.dtype), present(module, name).to(value.device)):
                    put(module, name, value)


def _layers(weights: Any) -> tuple[Any, Any]:
    return (weights.maps[0], weights.maps[1]) if isinstance(weights, ChainMap) else ({}, weights)


def place(x: Tensor, module: nn.Module) -> Tensor:
    """Move x to where a module's hook has the module computed."""
    device = execution_device(module)
    return x if device is None else x.to(device)


def check_reachable(module: nn.Module, weight: Tensor, x: Tensor) -> None:
    """Refuse to compute with a placeholder that nobody would bring in; PyTorch would not always notice."""
    if weight.is_meta and not x.is_meta and source(module) is None:
        raise HiraError(
            f"The weight of {type(module).__name__} is on the meta device, and there is no hook that would bring it "
            "in. Load the model's weights first. If accelerate offloads whole blocks, with preload_module_classes, "
            "offload without that."
        )


def moved(inputs: Any, module: nn.Module) -> Any:
    """Inputs of any kind where a module's hook would move them."""
    device = execution_device(module)
    return inputs if device is None else sys.modules["accelerate.utils"].send_to_device(inputs, device)


def check_can_train(factors: nn.Module, name: str) -> None:
    """Refuse to train a parameter of which accelerate brings in copies."""
    if torch.is_grad_enabled() and getattr(factors, name).requires_grad and is_away(factors, name):
        raise HiraError(
            f"Adapter {name!r} is offloaded with the model and cannot be trained there. Offload the model first and "
            "adapt it then, which leaves adapters on the execution device; or call the model under torch.no_grad()."
        )


def check_copies(model: nn.Module, names: Collection[str]) -> None:
    """Refuse to train modules in full, by the ends of their names, where accelerate brings in copies of their weights.

    Args:
        model: the model.
        names: the names, as in `modules_to_save`.
    """
    for key, module in model.named_modules():
        named = any(f".{key}".endswith(f".{name}") for name in names)
        if named and any(source(inner) is not None for inner in module.modules()):
            raise HiraError(
                f"modules_to_save names {key}, which accelerate offloads, so that it could not be trained; leave it on "
                "its device in the device map, or out of modules_to_save."
            )


def enter_adapters(model: nn.Module, kind: type[nn.Module], prefix: str) -> None:
    """Enter adapters of offloaded layers into a model's device map, by which transformers' `load_adapter` goes.

    Args:
        model: the model.
        kind: the type of the layers with adapters.
        prefix: what the names of their parameters begin with.
    """
    devices = model.__dict__.get("hf_device_map", {})
    for key, layer in model.named_modules() if devices else ():
        base: Any = layer.get_base_layer() if isinstance(layer, kind) else None  # type: ignore[operator]
        if base is not None and source(base) is not None:
            names = [name for name, _ in layer.named_children() if name.startswith(prefix)]
            devices.update({f"{key}.{name}": execution_device(base) for name in names})


def untie(model: Any) -> None:
    """Set `tie_word_embeddings` to False where offloaded embeddings are no longer tied; PEFT compares placeholders."""
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return
    embeddings = [
        module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None
    ]
    if len(embeddings) == 2 and any(is_away(module, "weight") for module in embeddings):
        first, second = (present(module, "weight") for module in embeddings)
        model.config.tie_word_embeddings = torch.equal(first, second.to(first.device))


@contextmanager
def left_where_it_is(model: nn.Module) -> Iterator[None]:
    """Hide from PEFT that a model is spread over devices, so that it does not spread it anew."""
    found = [module for module in model.modules() if "hf_device_map" in module.__dict__]
    spread = [(module, module.__dict__.pop("hf_device_map")) for module in found]
    try:
        yield
    finally:
        for module, devices in spread:
            module.hf_device_map = devices


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
