"""A module with other tensors for one call, while the module itself stays as it is."""

from __future__ import annotations

import copy

from torch import Tensor, nn


def stand_in(module: nn.Module, **tensors: Tensor) -> nn.Module:
    """Return a module that computes what another does, with other tensors in the place of some of its own.

    It shares parameters, buffers, children and hooks with the module; what its forward assigns to plain attributes is
    lost with it. The module is not touched, so several threads may use it at once.

    Args:
        module: the module.
        **tensors: by the name of a parameter or buffer, what to find there instead.
    """
    shallow = copy.copy(module)
    shallow.__dict__.update(tensors)  # found before the entries of `_parameters`, which the two share
    return shallow
