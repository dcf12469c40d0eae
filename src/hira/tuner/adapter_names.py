"""Checks of adapter names: PyTorch has to hold an adapter under its name, and PEFT to save and load it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import chain
from typing import Any

from peft.utils import ModulesToSaveWrapper
from torch import nn

from hira.errors import HiraError
from hira.layers.base import HiraLayer

_CONTAINERS = (nn.ModuleDict(), nn.ParameterDict())


def check_name(adapter_name: Any) -> None:
    """Refuse a name that PyTorch cannot give to a parameter, or PEFT to a folder."""
    if isinstance(adapter_name, str) and not (problem := _problem(adapter_name)):
        return
    problem = problem if isinstance(adapter_name, str) else f"it is a {type(adapter_name).__name__}, not a str"
    raise HiraError(f"{adapter_name!r} cannot be the name of an adapter: {problem}. Choose another name.")


def _problem(name: str) -> str | None:
    if not name or name != name.strip():
        return "it is empty, or begins or ends with a space"
    if "." in name:
        return "the '.' separates the names of modules in the keys of a state dict"
    if "/" in name or "\\" in name:
        return "it is the name of the folder that the adapter is saved in, not a path"
    if name.startswith("hira_"):
        return "names that begin with 'hira_' are those of HiRA's parameters"
    if any(hasattr(container, name) for container in _CONTAINERS):
        return "the containers that hold adapters, torch's ModuleDict and ParameterDict, have an attribute of that name"
    return None


def check_saved_modules(model: nn.Module, adapter_names: Collection[str], modules_to_save: Collection[str]) -> None:
    """Refuse adapter names that PEFT would mistake for a part of a tensor's name in `modules_to_save`."""
    for target in modules_to_save:
        for name in adapter_names:
            if f"{HiraLayer.other_param_names[1]}.{name}".endswith(target):
                raise HiraError(
                    f"{name!r} cannot be the name of an adapter beside {target!r} in modules_to_save: PEFT would take "
                    "the adapter for a module to save. Choose another name."
                )
    for path, module in _saved_modules(model, modules_to_save):
        for name in adapter_names:
            # PEFT removes the name of the adapter that it saves from the ends of keys, and drops keys that contain
            # another adapter's name
            within = _parts(module) | {"modules_to_save"}
            if name in (within | set(path.split(".")) if len(adapter_names) > 1 else within):
                raise HiraError(
                    f"{name!r} cannot be the name of an adapter: it is a part of the names of tensors of {path}, a "
                    "module to save, and PEFT could not save them. Choose another name."
                )


def _saved_modules(model: nn.Module, modules_to_save: Collection[str]) -> Iterator[tuple[str, nn.Module]]:
    for path, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            yield path, module.original_module
        elif path.endswith(tuple(modules_to_save)):
            yield path, module


def _parts(module: nn.Module) -> set[str]:
    """The parts of the names of a module's tensors."""
    return {part for key, _ in chain(module.named_parameters(), module.named_buffers()) for part in key.split(".")}
