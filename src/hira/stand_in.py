"""A module's twin that computes with other tensors, while the module itself is left alone."""

from __future__ import annotations

from typing import Any

from torch import nn

from hira import offload
from hira.errors import HiraError


def stand_in(base: nn.Module, **attributes: Any) -> nn.Module:
    """Return a module that shares everything with another one but some attributes.

    It runs the base module's own code, PyTorch's hooks included, and has the weights that accelerate's would bring in.
    The base module is not changed, so that threads may share it and an error leaves nothing behind. The twin is for a
    call and to be dropped: it is in no model.

    Args:
        base: the module.
        **attributes: tensors or modules by the names under which the module's forward reads them off itself, such as
            those of its parameters or children.

    Returns:
        The twin.

    Raises:
        HiraError: the module's forward was replaced on the instance, and would run on the module instead.
    """
    if not offload.is_own_forward(base):
        raise HiraError(
            f"The forward of this {type(base).__name__} was replaced on the instance, by more than accelerate's hooks "
            "that move tensors, and cannot be run with other tensors; undo that first."
        )
    # what a class computes, as under a parametrization, is found before anything on an instance
    computed = {name: value for name, value in attributes.items() if hasattr(type(base), name)}
    kind = type(type(base).__name__, (type(base),), computed) if computed else type(base)
    twin: nn.Module = object.__new__(kind)
    twin.__dict__.update(base.__dict__)
    twin.__dict__.pop("forward", None)  # accelerate's is bound to the module
    away = [name for name in base._parameters if name not in attributes and offload.is_away(base, name)]
    attributes |= {name: offload.present(base, name) for name in away}
    # an entry here is found before those of _parameters and _modules
    twin.__dict__.update(attributes)
    return twin
