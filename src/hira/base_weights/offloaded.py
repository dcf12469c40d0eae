"""Weights that accelerate offloads to a CPU or a disk, and loads only while a module's own forward runs.

accelerate replaces the forward of a module on the instance. A hook moves the input to an execution device, loads the
weights, and afterwards leaves placeholders on the meta device. A HiRA layer multiplies by W' itself, without calling
that forward, so it does what the hook does; this file holds what it has to know about hooks. hira does not import
accelerate: a module can only have one of its hooks if somebody else imported it.
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


def _moves_tensors(hook: Any) -> bool:
    kind = getattr(sys.modules.get("accelerate.hooks"), "AlignDevicesHook", None)
    return kind is not None and isinstance(hook, kind)


def offloading_hook(module: nn.Module) -> Any:
    """The hook that offloads a module's weights; None where they stay in the module."""
    for hook in hooks(module):
        if _moves_tensors(hook) and hook.offload and hook.weights_map is not None:
            return hook
    return None


def is_offloaded(module: nn.Module, name: str) -> bool:
    """Whether a module holds a placeholder for one of its tensors, which a hook can load."""
    tensor = getattr(module, name, None)
    return isinstance(tensor, Tensor) and tensor.is_meta and offloading_hook(module) is not None


def execution_device(module: nn.Module) -> Any:
    """The device to which a module's hook moves its inputs; None where they stay."""
    devices = [hook.execution_device for hook in hooks(module) if _moves_tensors(hook)]
    return next((device for device in reversed(devices) if device is not None), None)


def returns_output(module: nn.Module) -> bool:
    """Whether a module's hook moves the output back to where the input was."""
    return any(_moves_tensors(hook) and hook.io_same_device for hook in hooks(module))


def is_own_forward(module: nn.Module) -> bool:
    """Whether a module runs the forward of its type, alone or within hooks that only move tensors."""
    if "forward" not in module.__dict__:
        return True
    around = hooks(module)
    # a hook that is removed leaves the method on the instance
    forward = module.__dict__.get("_old_forward" if around else "forward")
    own = getattr(forward, "__func__", None) is type(module).forward and getattr(forward, "__self__", None) is module
    return own and all(_moves_tensors(hook) and not hook.no_grad for hook in around)


class OffloadedTensor(NamedTuple):
    """A tensor that is offloaded: the mapping that loads it, its name in the mapping, and the execution device.

    A merge gives the hook another mapping, so a backward that runs after it still loads the value of its forward.
    """

    weights: Mapping[str, Tensor]
    name: str
    device: Any

    def fetch(self, placeholder: Tensor, index: Any = ...) -> Tensor:
        """The tensor, or a part of it, on the execution device, in the placeholder's dtype."""
        return self.weights[self.name].detach()[index].to(device=self.device, dtype=placeholder.dtype)


def find(module: nn.Module, name: str) -> OffloadedTensor | None:
    """A module's offloaded tensor; None where the module holds the tensor itself."""
    if not is_hooked(module) or not is_offloaded(module, name):
        return None
    return OffloadedTensor(offloading_hook(module).weights_map, name, execution_device(module))


def load(module: nn.Module, name: str) -> Any:
    """A module's tensor, loaded if it is offloaded; None if there is none of that name."""
    found, tensor = find(module, name), getattr(module, name, None)
    return tensor if found is None or tensor is None else found.fetch(tensor)


def load_into(state: dict[str, Any], module: nn.Module, prefix: str) -> None:
    """Load a module's own parameters into a state dict in which they are placeholders."""
    for name, _ in module.named_parameters(recurse=False):
        if is_offloaded(module, name):
            state[f"{prefix}{name}"] = load(module, name)


class Snapshot(NamedTuple):
    """What a hook loads for a tensor at one time: the mapping that it has then, and the tensor's name in it."""

    weights: Mapping[str, Tensor]
    name: str

    @property
    def value(self) -> Tensor:
        """The tensor."""
        return self.weights[self.name]


def replace(module: nn.Module, name: str, value: Tensor | Snapshot) -> None:
    """Make a module's hook load another value for a tensor, or the value of an earlier snapshot.

    Nothing is written to the disk. A new value stays on the CPU, in a mapping that takes precedence over the hook's.
    """
    hook = offloading_hook(module)
    over, below = _overlay_and_below(hook.weights_map)
    others = {key: tensor for key, tensor in over.items() if key != name}
    if isinstance(value, Snapshot):
        over_then, below_then = _overlay_and_below(value.weights)
        if below_then is not below or name in over_then:
            others[name] = value.value
    else:
        others[name] = value.detach().to("cpu")
    hook.weights_map = ChainMap(others, below) if others else below
    parameter = getattr(module, name)
    if not parameter.is_meta:  # it is loaded now, as in a merge by PEFT
        new = hook.weights_map[name].detach().to(parameter.device, parameter.dtype)
        setattr(module, name, nn.Parameter(new, requires_grad=parameter.requires_grad))


def load_state_dict(state: dict[str, Tensor], model: nn.Module) -> None:
    """Load a state dict's values of offloaded tensors, since PyTorch would not load them into placeholders."""
    for prefix, module in model.named_modules():
        for name, tensor in module.named_parameters(recurse=False):
            value = state.get(f"{prefix}.{name}")
            if value is not None and value.shape == tensor.shape and is_offloaded(module, name):
                del state[f"{prefix}.{name}"]
                if not torch.equal(value.to(tensor.dtype), load(module, name).to(value.device)):
                    replace(module, name, value)


def _overlay_and_below(weights: Any) -> tuple[Any, Any]:
    return (weights.maps[0], weights.maps[1]) if isinstance(weights, ChainMap) else ({}, weights)


def to_execution_device(x: Tensor, module: nn.Module) -> Tensor:
    """Move x to the device on which a module's hook runs the module."""
    device = execution_device(module)
    return x if device is None else x.to(device)


def check_reachable(module: nn.Module, weight: Tensor, x: Tensor) -> None:
    """Refuse to compute with a placeholder that no hook would load; PyTorch would not always notice."""
    if weight.is_meta and not x.is_meta and offloading_hook(module) is None:
        raise HiraError(
            f"The weight of {type(module).__name__} is on the meta device, and there is no hook that would load "
            "it. Load the model's weights first. If accelerate offloads whole blocks, with preload_module_classes, "
            "offload without that."
        )


def inputs_to_execution_device(inputs: Any, module: nn.Module) -> Any:
    """Inputs of any kind, moved to the device on which a module's hook runs the module."""
    device = execution_device(module)
    return inputs if device is None else sys.modules["accelerate.utils"].send_to_device(inputs, device)


def check_can_train(factors: nn.Module, name: str) -> None:
    """Refuse to train a parameter that accelerate loads as a copy."""
    if torch.is_grad_enabled() and getattr(factors, name).requires_grad and is_offloaded(factors, name):
        raise HiraError(
            f"Adapter {name!r} is offloaded with the model and cannot be trained there. Offload the model first and "
            "adapt it then, which leaves adapters on the execution device; or call the model under torch.no_grad()."
        )


def check_copies(model: nn.Module, names: Collection[str]) -> None:
    """Refuse to train modules in full, by the ends of their names, where accelerate loads copies of their weights.

    Args:
        model: the model.
        names: the names, as in `modules_to_save`.
    """
    for key, module in model.named_modules():
        named = any(f".{key}".endswith(f".{name}") for name in names)
        if named and any(offloading_hook(inner) is not None for inner in module.modules()):
            raise HiraError(
                f"modules_to_save names {key}, which accelerate offloads, so that it could not be trained; leave it on "
                "its device in the device map, or out of modules_to_save."
            )


def add_to_device_map(model: nn.Module, kind: type[nn.Module], prefix: str) -> None:
    """Add the adapters of offloaded layers to a model's device map, which transformers' `load_adapter` follows.

    Args:
        model: the model.
        kind: the type of the layers with adapters.
        prefix: what the names of their parameters begin with.
    """
    devices = model.__dict__.get("hf_device_map", {})
    for key, layer in model.named_modules() if devices else ():
        base: Any = layer.get_base_layer() if isinstance(layer, kind) else None  # type: ignore[operator]
        if base is not None and offloading_hook(base) is not None:
            names = [name for name, _ in layer.named_children() if name.startswith(prefix)]
            devices.update({f"{key}.{name}": execution_device(base) for name in names})


def untie(model: Any) -> None:
    """Set `tie_word_embeddings` to False where offloaded embeddings are untied; PEFT itself compares placeholders."""
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return
    embeddings = [
        module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None
    ]
    if len(embeddings) == 2 and any(is_offloaded(module, "weight") for module in embeddings):
        first, second = (load(module, "weight") for module in embeddings)
        model.config.tie_word_embeddings = torch.equal(first, second.to(first.device))


@contextmanager
def device_map_hidden(model: nn.Module) -> Iterator[None]:
    """Hide from PEFT that a model is placed on several devices, so that it does not place it again."""
    found = [module for module in model.modules() if "hf_device_map" in module.__dict__]
    maps = [(module, module.__dict__.pop("hf_device_map")) for module in found]
    try:
        yield
    finally:
        for module, devices in maps:
            module.hf_device_map = devices


def check_blocks(model: nn.Module, kind: type[nn.Module], what: str) -> None:
    """Refuse an operation where accelerate loads whole blocks, since it loads their weights by the names of before.

    Args:
        model: the model.
        kind: the type of the layers that the operation is on.
        what: the operation that is refused, for the message.
    """
    for name, block in model.named_modules():
        hook = offloading_hook(block)
        if hook is not None and hook.place_submodules and any(isinstance(inner, kind) for inner in block.modules()):
            raise HiraError(
                f"{what}: accelerate loads {name or type(block).__name__} as a whole block. Offload the model "
                "without preload_module_classes, then adapt it, which leaves adapters on the execution device."
            )
