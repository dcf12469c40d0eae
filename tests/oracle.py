"""Exact results, errors measured against them, and views of what an operator does.

The tolerance everywhere is `TWICE`: the error of a fast path, as a root mean square against the reference in float64,
is at most twice that of the plain PyTorch expression in the same dtype. Both round the same quantities, in another
order, and a root mean square over a few hundred entries varies by some ten per cent between orders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hira.ops import workspace

TWICE = 2.0
# Of a result that the plain expression gives exactly: one unit in the last place.
FLOOR = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}

Function = Callable[..., Tensor]


def results(function: Function, tensors: Sequence[Tensor | None], dy: Tensor | None = None) -> list[Tensor]:
    """y and the gradients of the tensors that require one, for the gradient dy of y."""
    leaves = [t if t is None else t.detach().requires_grad_(t.requires_grad) for t in tensors]
    y = function(*leaves)
    dy = torch.ones_like(y) if dy is None else dy.to(y.dtype)
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, wanted, dy)]


def exact_results(function: Function, tensors: Sequence[Tensor | None], dy: Tensor | None = None) -> list[Tensor]:
    """The same in float64, from the same numbers."""
    double = [t if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    return results(function, double, None if dy is None else dy.double())


def error(value: Tensor, exact: Tensor) -> float:
    """The root mean square of value - exact, relative to that of exact."""
    if exact.numel() == 0:
        return 0.0
    value, exact = value.detach(), exact.detach()
    scale = exact.double().norm().clamp_min(torch.finfo(torch.float64).tiny)
    return float((value.double() - exact.double()).norm() / scale)


def assert_as_exact(fast: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    """The errors of the fast results are at most twice those of the plain ones."""
    assert len(fast) == len(plain) == len(exact)
    for position, (f, p, e) in enumerate(zip(fast, plain, exact, strict=True)):
        assert f.shape == e.shape, position
        assert f.dtype == p.dtype, position
        bound = TWICE * max(error(p, e), FLOOR[f.dtype] / 8)
        assert error(f, e) <= bound, (position, error(f, e), bound)


class Poison(TorchDispatchMode):
    """Fills the memory of `torch.empty` and its kin with NaN."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.name.split("::")[1] in (
            "empty",
            "empty_like",
            "empty_strided",
            "new_empty",
            "new_empty_strided",
        ):
            out.fill_(float("nan"))
        return out


def assert_same_bits(some: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """Pairs of equal tensors, of the same dtype."""
    for position, (a, b) in enumerate(zip(some, others, strict=True)):
        assert a.dtype == b.dtype, position
        assert torch.equal(a, b), (position, (a - b).abs().max())


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Uninitialised memory reads as NaN, and so does what earlier passes left."""
    for buffer in workspace.scratch.buffers.values():
        buffer.fill_(float("nan") if buffer.is_floating_point() else -1)
    with Poison():
        assert torch.empty(1).isnan().all()
        assert torch.ones(1).new_empty(1, dtype=torch.bfloat16).isnan().all()
        assert torch.empty_like(torch.ones(1)).isnan().all()
        yield


class Products(TorchDispatchMode):
    """Notes the dtypes of the arguments of each matrix product and convolution, with the number of its operations."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, frozenset[torch.dtype], int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1].rstrip("_")
        if name in ("mm", "addmm", "bmm", "convolution", "convolution_backward"):
            tensors = [a for a in args if isinstance(a, Tensor)]
            sizes = tensors[-2:] if name in ("mm", "addmm") else tensors[:2]
            self.seen.append((name, frozenset(t.dtype for t in tensors), max(t.numel() for t in sizes)))
        return func(*args, **(kwargs or {}))
