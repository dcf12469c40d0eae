"""What autograd keeps of a forward for its backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def kept_for_backward(run: Callable[[], Tensor]) -> dict[int, int]:
    """What autograd keeps of a forward: for each storage, by its address, its bytes."""
    storages: dict[int, int] = {}
    kept = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        names = tensor.__tensor_flatten__()[0] if is_traceable_wrapper_subclass(tensor) else []
        for part in [getattr(tensor, name) for name in names] or [tensor]:
            storages[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return storages


def address(tensor: Tensor) -> int:
    """The address of a tensor's storage, as `kept_for_backward` has it."""
    return tensor.untyped_storage().data_ptr()
