"""Forms W' = W0 * (1 + BA), the only place that does, and pulls a weight's gradient back to A and B.

Derivations, the order of roundings and the choice of blocks are in docs/architecture.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial, wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from hira.ops import heuristics, kernel_choice
from hira.ops.dither import Noise, noise_of, round_into, rounded
from hira.ops.workspace import Workspace, formation_dtype

P = ParamSpec("P")
R = TypeVar("R")


class Modulation(NamedTuple):
    """What `block` applies to W0: A and B in the dtype of formation, and how W' is rounded."""

    A: Tensor  # (r, in)
    B: Tensor  # (out, r)
    noise: Noise | None  # of the rounding; None to round to nearest
    update_only: bool


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for a device; the meta device has none."""
    kind = device.type
    return (kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)) and torch.is_autocast_enabled(kind)


def cast_as_autocast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in the `product_dtype` of a product, if it is autocast that gives it that dtype; else x itself."""
    return x.to(dtype) if x.dtype != dtype and autocasts(x.device) else x


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which every product runs in the dtype of its arguments, whatever autocast says outside."""
    if autocasts(device):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """A function of a tensor, and more, that runs as another does within `no_autocast`."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device: torch.device = args[0].device  # type: ignore[attr-defined]
        if not autocasts(device):
            return function(*args, **kwargs)
        with torch.autocast(device.type, enabled=False):
            return function(*args, **kwargs)

    return run


def product_dtype(x: Tensor, weight_dtype: torch.dtype) -> torch.dtype:
    """The dtype in which ``F.linear(x, W)`` computes: autocast's where it applies, else the weight's."""
    if autocasts(x.device) and torch.float64 not in (x.dtype, weight_dtype):
        return torch.get_autocast_dtype(x.device.type)
    return weight_dtype


def modulation(
    W0: Tensor, A: Tensor, B: Tensor, dtype: torch.dtype, *, update_only: bool = False, dither: bool | None = None
) -> Modulation:
    """Prepare A (r, in) and B (out, r) for a W' of ``dtype``; the dither is that of layers unless `dither` says."""
    formation = formation_dtype(W0.dtype)
    dither = heuristics.dithers(W0.dtype, dtype) if dither is None else dither
    noise = noise_of(W0) if dither and not update_only else None
    # contiguous, as the last bits of a product depend on how its factors lie in memory
    return Modulation(A.to(formation).contiguous(), B.to(formation).contiguous(), noise, update_only)


def row_blocks(W0: Tensor) -> Iterable[slice]:
    """Split the rows of W0 (out, in) so that a block of them has a bounded number of entries.

    The split depends on the weight's shape and device alone, never on the input, so that W' is formed by the same
    products wherever it is formed.
    """
    rows, columns = W0.shape
    step = max(1, min(rows, heuristics.block_entries(W0.device) // max(columns, 1)))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def column_blocks(W0: Tensor) -> Iterable[slice]:
    """Split the columns of W0 (out, in) likewise."""
    return row_blocks(W0.t())


def block(
    W0: Tensor,
    by: Modulation,
    workspace: Workspace,
    rows: slice = slice(None),
    columns: slice = slice(None),
    *,
    single_threaded: bool = False,
) -> Tensor:
    """Return ``W0 * (1 + BA)`` for some rows and columns W0 of a weight, rounded once; in the workspace's memory.

    With `single_threaded`, what is not the product is done by one thread, for a caller whose other threads need the
    other cores: the entries are the same, which those of a product by one thread need not be.
    """
    noise = by.noise and Noise(by.noise.rows[rows], by.noise.columns[columns])
    by = Modulation(by.A[:, columns], by.B[rows], noise, by.update_only)
    with heuristics.one_thread() if single_threaded else nullcontext():
        return _formed(W0, by, workspace.dtype, workspace)


def whole(W0: Tensor, by: Modulation, dtype: torch.dtype) -> Tensor:
    """`block` of a weight that is one block, and so small that memory of its own costs nothing."""
    return _formed(W0, by, dtype, None)


def _formed(W0: Tensor, by: Modulation, dtype: torch.dtype, workspace: Workspace | None) -> Tensor:
    if heuristics.triton(W0):
        from hira.ops import triton

        A, B, noise, update_only = by
        kernel = partial(triton.form, W0, A, B, dtype, update_only=update_only, noise=noise)
        if kernel_choice.serves("form", W0, dtype, kernel, partial(_formed_by_pytorch, W0, by, dtype, None)):
            return kernel()
    return _formed_by_pytorch(W0, by, dtype, workspace)


def _formed_by_pytorch(W0: Tensor, by: Modulation, dtype: torch.dtype, workspace: Workspace | None) -> Tensor:
    A, B, noise, update_only = by
    if workspace is not None:
        BA = torch.mm(B, A, out=workspace.exact(W0))
    elif W0.stride(0) < W0.stride(1):  # in W0's memory layout, as the workspace has it
        BA = torch.mm(B, A, out=B.new_empty(A.shape[1], B.shape[0]).t())
    else:
        BA = torch.mm(B, A)
    if dtype == BA.dtype:
        return _apply(W0, BA, update_only)
    formed = torch.empty_like(BA, dtype=dtype) if workspace is None else workspace.rounded(W0)
    for chunk in heuristics.chunks(BA):  # that stays in the processor's cache
        part = _apply(W0[chunk].to(BA.dtype), BA[chunk], update_only)
        if noise is None:
            formed[chunk].copy_(part)
        else:
            round_into(formed[chunk], part, noise.rows[chunk], noise.columns)
    return formed


def _apply(W0: Tensor, BA: Tensor, update_only: bool) -> Tensor:
    """``W0 + W0 * BA``, or ``W0 * BA``, in BA's memory: the sum is as exact as W0 times 1 + BA, and one operation."""
    return BA.mul_(W0) if update_only else torch.addcmul(W0, W0, BA, out=BA)


def modulated_weight(W0: Tensor, A: Tensor, B: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Form W' whole: formed and multiplied in float32 (float64 for a float64 weight), rounded once.

    Equation: ``W' = W0 * (1 + BA)``.

    Args:
        W0: (out, in), of any strides.
        A: (r, in).
        B: (out, r).
        dtype: that of W'; W0's by default.

    Returns:
        W' (out, in), in W0's memory layout. Autograd tracks it; what is kept for backward is W0, A and B.
        Temporaries: one block of rows in the dtype of formation; in backward, one of the whole weight.

    Source: HiRA (ICLR 2025), equation 5.
    """
    dtype = W0.dtype if dtype is None else dtype
    weight: Tensor = plain_weight(W0, A, B, dtype) if heuristics.plain() else _ModulatedWeight.apply(W0, A, B, dtype)
    return weight


def plain_weight(W0: Tensor, A: Tensor, B: Tensor, dtype: torch.dtype, *, update_only: bool = False) -> Tensor:
    """``W0 * (1 + BA)``, or ``W0 * BA``, by plain operations that autograd, transforms and tracers see through.

    The numbers are those of `form`. Kept for backward are several tensors of the weight's size.
    """
    formation = formation_dtype(W0.dtype)
    with no_autocast(W0.device):
        A, B, W0_ = A.to(formation).contiguous(), B.to(formation).contiguous(), W0.to(formation)
        parts = [torch.mm(B[rows], A) for rows in row_blocks(W0)]
        BA = parts[0] if len(parts) == 1 else torch.cat(parts)
        exact = W0_ * BA if update_only else torch.addcmul(W0_, W0_, BA)
        if heuristics.dithers(W0.dtype, dtype) and not update_only:
            return rounded(exact, dtype, noise_of(W0))
        return exact.to(dtype)


def form(W0: Tensor, A: Tensor, B: Tensor, dtype: torch.dtype, *, update_only: bool = False) -> Tensor:
    """Form ``W0 * (1 + BA)``, or ``W0 * BA``, block by block, rounded once to ``dtype``. Not tracked by autograd."""
    with torch.no_grad(), no_autocast(W0.device):
        by = modulation(W0, A, B, dtype, update_only=update_only)
        if heuristics.is_small(W0):
            return whole(W0, by, dtype)
        out = torch.empty_like(W0, dtype=dtype)
        workspace = Workspace(W0, dtype)
        for rows in row_blocks(W0):
            out[rows] = block(W0[rows], by, workspace, rows)
    return out


def pull_back(G: Tensor, W0: Tensor, A: Tensor, B: Tensor, dA: Tensor) -> Tensor:
    """Reduce ``G * W0``, where G is the gradient of W': add ``B^T (G * W0)`` to dA, return dB = ``(G * W0) A^T``.

    G and W0 may be rows of a weight, then so is B; all but W0 are in the dtype of formation. G is overwritten.
    """
    G.mul_(W0)
    dA.addmm_(B.t(), G)
    return torch.mm(G, A.t())


def factor_gradients(G: Tensor, W0: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """dA and dB of the whole gradient G of W', in the dtypes of A and B, by plain operations."""
    dtype = formation_dtype(W0.dtype)
    G = G.to(dtype) * W0
    return torch.mm(B.to(dtype).t(), G).to(A.dtype), torch.mm(G, A.to(dtype).t()).to(B.dtype)


def weight_gradient(G: Tensor, W0: Tensor, A: Tensor, B: Tensor, *, update_only: bool = False) -> Tensor:
    """The gradient of W0 itself, for a base layer that trains too: ``G * (1 + BA)``, or ``G * BA``."""
    dtype = formation_dtype(W0.dtype)
    factor = torch.mm(B.to(dtype), A.to(dtype))
    return ((factor if update_only else factor + 1) * G).to(W0.dtype)


class _ModulatedWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W0: Tensor, A: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(W0, A, B)
        return form(W0, A, B, dtype)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        W0, A, B = ctx.saved_tensors
        with no_autocast(W0.device):
            dW0 = weight_gradient(G, W0, A, B) if ctx.needs_input_grad[0] else None
            return dW0, *factor_gradients(G, W0, A, B), None
