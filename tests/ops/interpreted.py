"""Where the tests of `hira.ops.triton` run: on a GPU if there is one, else on CPU tensors in Triton's interpreter.

Triton decides between the two when it is imported, which torch does for it in `import hira`. tests/conftest.py sets
TRITON_INTERPRET before that; without it these tests stop here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from oracle import Poison
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton", reason="triton is not installed, so its kernels cannot run, not even interpreted")

from hira.ops.triton import arithmetic

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
assert arithmetic.INTERPRETED or DEVICE == "cuda", "set TRITON_INTERPRET=1 before triton is imported"

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Enough for offsets of 32 bits to overflow, in steps that fit into them.
FAR = 1 << 26


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random numbers on the device, rounded to dtype."""
    return torch.randn(*shape).to(DEVICE, dtype)


def far_apart(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers with rows so far apart that 32 bits do not reach the last; memory in between is not touched."""
    m, n = tensor.shape
    assert (m - 1) * FAR > 2**31
    memory = torch.empty((m - 1) * FAR + n, dtype=tensor.dtype, device=tensor.device)
    return memory.as_strided((m, n), (FAR, 1)).copy_(tensor)


class Allocations(Poison):
    """Fills new floating memory with NaN, and notes its sizes; the interpreter takes integers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_floating_point():
            given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
            if out.untyped_storage().data_ptr() not in given:  # neither a view nor in place
                self.entries.append(out.numel())
            if "empty" in func._schema.name:
                out.fill_(float("nan"))
        return out


@contextmanager
def poisoned() -> Iterator[Allocations]:
    """Uninitialised memory reads as NaN."""
    with Allocations() as allocations:
        assert torch.empty(1).isnan().all()
        assert torch.ones(1).new_empty(1, dtype=torch.bfloat16).isnan().all()
        yield allocations
