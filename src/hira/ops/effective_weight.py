"""Forms W' = W0 * (1 + BA) + L2 L1, the only place that does, and pulls a weight's gradient back to the factors.

The functions take the factors joined, A (r + lora_r, in) over L1 and B (out, r + lora_r) beside L2, and `lora_r`, which
is 0 for HiRA without LoRA: then W' = W0 * (1 + BA). "BA" stands for the product of the first r rows of A and columns of
B, and L2 L1 for that of the others.

Derivations and the order of roundings are in docs/concepts.md, the choice of blocks in docs/architecture.md.
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

    A: Tensor  # (r + lora_r, in)
    B: Tensor  # (out, r + lora_r)
    lora_r: int
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


def split(A: Tensor, B: Tensor, lora_r: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """A (r, in) and B (out, r) of the joined factors, and L1 (lora_r, in) and L2 (out, lora_r), None without LoRA."""
    if not lora_r:
        return A, B, None
    r = A.shape[0] - lora_r
    return A[:r], B[:, :r], (A[r:], B[:, r:])


def modulation(
    W0: Tensor,
    A: Tensor,
    B: Tensor,
    lora_r: int,
    dtype: torch.dtype,
    *,
    update_only: bool = False,
    dither: bool | None = None,
) -> Modulation:
    """Prepare the joined factors for a W' of ``dtype``; the dither is that of layers unless `dither` says."""
    formation = formation_dtype(W0.dtype)
    dither = heuristics.dithers(W0.dtype, dtype) if dither is None else dither
    noise = noise_of(W0) if dither and not update_only else None
    # contiguous, as the last bits of a product depend on how its factors lie in memory
    return Modulation(A.to(formation).contiguous(), B.to(formation).contiguous(), lora_r, noise, update_only)


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
    out: Tensor | None = None,
) -> Tensor:
    """Return W' of some rows and columns W0 of a weight, rounded once; in the workspace's memory, or in out.

    With `single_threaded`, what is not the product is done by one thread, for a caller whose other threads need the
    other cores: the entries are the same, which those of a product by one thread need not be.
    """
    noise = by.noise and Noise(by.noise.rows[rows], by.noise.columns[columns])
    by = Modulation(by.A[:, columns], by.B[rows], by.lora_r, noise, by.update_only)
    with heuristics.one_thread() if single_threaded else nullcontext():
        return _formed(W0, by, workspace.dtype, workspace, out)


def whole(W0: Tensor, by: Modulation, dtype: torch.dtype) -> Tensor:
    """`block` of a weight that is one block, and so small that memory of its own costs nothing."""
    return _formed(W0, by, dtype, None)


def _formed(
    W0: Tensor, by: Modulation, dtype: torch.dtype, workspace: Workspace | None, out: Tensor | None = None
) -> Tensor:
    if heuristics.triton(W0):
        from hira.ops import triton

        A, B, lora_r, noise, update_only = by
        kernel = partial(triton.form, W0, A, B, dtype, lora_r=lora_r, update_only=update_only, noise=noise, out=out)
        if kernel_choice.serves("form", W0, dtype, kernel, partial(_formed_by_pytorch, W0, by, dtype, None, None)):
            return kernel()
    return _formed_by_pytorch(W0, by, dtype, workspace, out)


def _formed_by_pytorch(
    W0: Tensor, by: Modulation, dtype: torch.dtype, workspace: Workspace | None, out: Tensor | None
) -> Tensor:
    A, B, lora = split(by.A, by.B, by.lora_r)
    if out is not None and out.dtype == B.dtype:
        BA = torch.mm(B, A, out=out)
    elif workspace is not None:
        BA = torch.mm(B, A, out=workspace.exact(W0))
    elif W0.stride(0) < W0.stride(1):  # in W0's memory layout, as the workspace has it
        BA = torch.mm(B, A, out=B.new_empty(A.shape[1], B.shape[0]).t())
    else:
        BA = torch.mm(B, A)
    if dtype == BA.dtype:
        exact = _apply(W0, BA, by.update_only)
        return exact if lora is None else _add_product(exact, *lora)
    if out is not None:
        formed = out
    else:
        formed = torch.empty_like(BA, dtype=dtype) if workspace is None else workspace.rounded(W0)
    if not heuristics.on_cpu(W0.device):  # one operation reads W0 as it is stored, and rounds if that is to nearest
        if lora is None and by.noise is None:
            return _apply(W0, BA, by.update_only, out=formed)
        exact = _apply(W0, BA, by.update_only)
        if lora is not None:
            _add_product(exact, *lora)
        return formed.copy_(exact) if by.noise is None else round_into(formed, exact, by.noise.rows, by.noise.columns)
    chunks = list(heuristics.chunks(BA))  # that stay in the processor's cache
    if lora is not None:  # one product for all chunks
        for chunk in chunks:
            _apply(W0[chunk].to(BA.dtype), BA[chunk], by.update_only)
        _add_product(BA, *lora)
    for chunk in chunks:
        part = BA[chunk] if lora is not None else _apply(W0[chunk].to(BA.dtype), BA[chunk], by.update_only)
        if by.noise is None:
            formed[chunk].copy_(part)
        else:
            round_into(formed[chunk], part, by.noise.rows[chunk], by.noise.columns)
    return formed


def _apply(W0: Tensor, BA: Tensor, update_only: bool, out: Tensor | None = None) -> Tensor:
    """``W0 + W0 * BA``, or ``W0 * BA``, in BA's memory or out, rounded: as exact as W0 (1 + BA), and one operation."""
    out = BA if out is None else out
    return torch.mul(BA, W0, out=out) if update_only else torch.addcmul(W0, W0, BA, out=out)


def _add_product(exact: Tensor, L1: Tensor, L2: Tensor) -> Tensor:
    return exact.addmm_(L2, L1)


def modulated_weight(W0: Tensor, A: Tensor, B: Tensor, lora_r: int = 0, dtype: torch.dtype | None = None) -> Tensor:
    """Form W' whole: formed and multiplied in float32 (float64 for a float64 weight), rounded once.

    Equation: ``W' = W0 * (1 + BA) + L2 L1``.

    Args:
        W0: (out, in), of any strides.
        A: (r + lora_r, in), A over L1.
        B: (out, r + lora_r), B beside L2.
        lora_r: the number of rows of L1; 0 for HiRA without LoRA.
        dtype: that of W'; W0's by default.

    Returns:
        W' (out, in), in W0's memory layout. Autograd tracks it; what is kept for backward is W0, A and B.
        Temporaries: one block of rows in the dtype of formation; in backward, one of the whole weight.

    Source: HiRA (ICLR 2025), equation 5.
    """
    dtype = W0.dtype if dtype is None else dtype
    function = plain_weight if heuristics.plain() else _ModulatedWeight.apply
    weight: Tensor = function(W0, A, B, lora_r, dtype)
    return weight


def plain_weight(
    W0: Tensor, A: Tensor, B: Tensor, lora_r: int, dtype: torch.dtype, *, update_only: bool = False
) -> Tensor:
    """W', or the update ``W0 * BA + L2 L1``, by plain operations that autograd, transforms and tracers see through.

    The numbers are those of `form`. Kept for backward are several tensors of the weight's size.
    """
    formation = formation_dtype(W0.dtype)
    with no_autocast(W0.device):
        A, B, lora = split(A.to(formation).contiguous(), B.to(formation).contiguous(), lora_r)
        parts = []
        for rows in row_blocks(W0):
            W0_, BA = W0[rows].to(formation), torch.mm(B[rows], A)
            exact = W0_ * BA if update_only else torch.addcmul(W0_, W0_, BA)
            parts.append(exact if lora is None else torch.addmm(exact, lora[1][rows], lora[0]))
        exact = parts[0] if len(parts) == 1 else torch.cat(parts)
        if heuristics.dithers(W0.dtype, dtype) and not update_only:
            return rounded(exact, dtype, noise_of(W0))
        return exact.to(dtype)


def form(W0: Tensor, A: Tensor, B: Tensor, lora_r: int, dtype: torch.dtype, *, update_only: bool = False) -> Tensor:
    """Form W', or the update ``W0 * BA + L2 L1``, block by block, rounded once to ``dtype``, without autograd."""
    with torch.no_grad(), no_autocast(W0.device):
        by = modulation(W0, A, B, lora_r, dtype, update_only=update_only)
        if heuristics.is_small(W0):
            return whole(W0, by, dtype)
        out = torch.empty_like(W0, dtype=dtype)
        workspace = Workspace(W0, dtype)
        for rows in row_blocks(W0):
            block(W0[rows], by, workspace, rows, out=out[rows])
    return out


def pull_back(G: Tensor, W0: Tensor, A: Tensor, B: Tensor, lora_r: int, dA: Tensor, dB: Tensor) -> None:
    """Reduce G, the gradient of W': add to dA, and write dB.

    HiRA's rows of dA get ``B^T (G * W0)`` and its columns of dB ``(G * W0) A^T``, LoRA's ``L2^T G`` and ``G L1^T``.
    G and W0 may be rows of a weight, then so are B and dB; all but W0 are in the dtype of formation. G is overwritten.
    """
    A, B, lora = split(A, B, lora_r)
    dA, dB, dlora = split(dA, dB, lora_r)
    if lora is not None and dlora is not None:
        dlora[0].addmm_(lora[1].t(), G)
        torch.mm(G, lora[0].t(), out=dlora[1])
    G.mul_(W0)
    dA.addmm_(B.t(), G)
    torch.mm(G, A.t(), out=dB)


def factor_gradients(G: Tensor, W0: Tensor, A: Tensor, B: Tensor, lora_r: int) -> tuple[Tensor, Tensor]:
    """Those of the joined factors, of the whole gradient G of W', in the dtypes of A and B, by plain operations."""
    dtype = formation_dtype(W0.dtype)
    A_, B_, lora = split(A.to(dtype), B.to(dtype), lora_r)
    if lora is None and not heuristics.on_cpu(G.device):  # one operation that reads G and W0 as they are
        GW = torch.addcmul(G.new_zeros(1, dtype=dtype), G, W0)
    else:
        G = G.to(dtype)
        GW = G * W0
    dA, dB = torch.mm(B_.t(), GW), torch.mm(GW, A_.t())
    if lora is not None:
        dA, dB = torch.cat([dA, torch.mm(lora[1].t(), G)]), torch.cat([dB, torch.mm(G, lora[0].t())], dim=1)
    return dA.to(A.dtype), dB.to(B.dtype)


def weight_gradient(G: Tensor, W0: Tensor, A: Tensor, B: Tensor, lora_r: int, *, update_only: bool = False) -> Tensor:
    """The gradient of W0 itself, for a base layer that trains too: ``G * (1 + BA)``, or ``G * BA``."""
    dtype = formation_dtype(W0.dtype)
    A, B, _ = split(A.to(dtype), B.to(dtype), lora_r)
    factor = torch.mm(B, A)
    return ((factor if update_only else factor + 1) * G).to(W0.dtype)


class _ModulatedWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W0: Tensor, A: Tensor, B: Tensor, lora_r: int, dtype: torch.dtype) -> Tensor:
        ctx.lora_r = lora_r
        ctx.save_for_backward(W0, A, B)
        return form(W0, A, B, lora_r, dtype)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, ...]:
        W0, A, B = ctx.saved_tensors
        with no_autocast(W0.device):
            dW0 = weight_gradient(G, W0, A, B, ctx.lora_r) if ctx.needs_input_grad[0] else None
            return dW0, *factor_gradients(G, W0, A, B, ctx.lora_r), None, None
