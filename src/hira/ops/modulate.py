"""Forms W' = W0 * (1 + BA), the only place that does, and pulls a weight's gradient back to A and B.

Derivations, the order of roundings and the choice of blocks are in docs/architecture.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Entries of one block of W'. On a CPU 8 MiB of float32: large enough for the products to run at full speed, small
# enough to stay near the caches. Elsewhere launches cost more than memory traffic, so blocks are larger.
CPU_BLOCK_ENTRIES = 1 << 21
DEVICE_BLOCK_ENTRIES = 1 << 25


class Factors(NamedTuple):
    """A and B as `block` takes them: in the dtype of formation, and extended so that their product is 1 + BA."""

    A: Tensor  # (r + 1, in), or (r, in) for the update alone
    B: Tensor  # (out, r + 1), or (out, r)


def formation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which 1 + BA is formed and multiplied with W0: float64 for a float64 weight, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which every product runs in the dtype of its arguments, whatever autocast says outside."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def product_dtype(x: Tensor, weight_dtype: torch.dtype) -> torch.dtype:
    """The dtype in which ``F.linear(x, W)`` computes: autocast's where it applies, else the weight's."""
    if torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, weight_dtype):
        return torch.get_autocast_dtype(x.device.type)
    return weight_dtype


def factors(A: Tensor, B: Tensor, dtype: torch.dtype, *, update_only: bool = False) -> Factors:
    """Extend A (r, in) and B (out, r) for use with `block`: ``1 + BA = [B | 1] [A ; 1]``."""
    A, B = A.to(dtype), B.to(dtype)
    if update_only:
        return Factors(A, B)
    return Factors(torch.cat([A, A.new_ones(1, A.shape[1])]), torch.cat([B, B.new_ones(B.shape[0], 1)], dim=1))


def row_blocks(W0: Tensor) -> Iterator[slice]:
    """Split the rows of W0 (out, in) so that a block of them has a bounded number of entries.

    The split depends on the weight's shape and device alone, never on the input, so that W' is formed by the same
    products wherever it is formed.
    """
    entries = CPU_BLOCK_ENTRIES if W0.device.type == "cpu" else DEVICE_BLOCK_ENTRIES
    rows, columns = W0.shape
    step = max(1, min(rows, entries // max(columns, 1)))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def column_blocks(W0: Tensor) -> Iterator[slice]:
    """Split the columns of W0 (out, in) likewise."""
    return row_blocks(W0.t())


def is_transposed(W0: Tensor) -> bool:
    """Whether W0 (out, in) lies in memory as (in, out), as the weight of a transformers `Conv1D` does."""
    return W0.stride(0) < W0.stride(1)


def modulation(like: Tensor, f: Factors) -> Tensor:
    """Return the product of the factors, laid out in memory as ``like`` (out, in) is."""
    return torch.mm(f.A.t(), f.B.t()).t() if is_transposed(like) else torch.mm(f.B, f.A)


def block(W0: Tensor, f: Factors, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
    """Return some rows and columns of ``W0 * (1 + BA)``, in the dtype of formation, not yet rounded."""
    W0 = W0[rows, columns]
    return modulation(W0, Factors(f.A[:, columns], f.B[rows])).mul_(W0)


def modulated_weight(W0: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Form W' whole: formed and multiplied in float32 (float64 for a float64 weight), rounded once.

    Equation: ``W' = W0 * (1 + BA)``.

    Args:
        W0: (out, in), of any strides.
        A: (r, in).
        B: (out, r).

    Returns:
        W' (out, in), of W0's dtype and memory layout. Autograd tracks it; what is kept for backward is W0, A and B.
        Temporaries: one block of rows in the dtype of formation; in backward, one of the whole weight.

    Source: HiRA (ICLR 2025), equation 5.
    """
    weight: Tensor = _ModulatedWeight.apply(W0, A, B)
    return weight


def form(W0: Tensor, A: Tensor, B: Tensor, dtype: torch.dtype, *, update_only: bool = False) -> Tensor:
    """Form ``W0 * (1 + BA)``, or ``W0 * BA``, block by block, rounded once to ``dtype``. Not tracked by autograd."""
    with torch.no_grad(), no_autocast(W0.device):
        f = factors(A, B, formation_dtype(W0.dtype), update_only=update_only)
        out = torch.empty_like(W0, dtype=dtype)
        for rows in row_blocks(W0):
            out[rows] = block(W0, f, rows)
    return out


def pull_back(G: Tensor, W0: Tensor, A: Tensor, B: Tensor, dA: Tensor) -> Tensor:
    """Reduce ``G * W0``, where G is the gradient of W': add ``B^T (G * W0)`` to dA, return dB = ``(G * W0) A^T``.

    G and W0 may be rows of a weight, then so is B; A, B and dA are in the dtype of formation. G may be overwritten.
    """
    G = G.to(dA.dtype).mul_(W0)
    dA.addmm_(B.t(), G)
    return torch.mm(G, A.t())


class _ModulatedWeight(torch.autograd.Function):
    @staticmethod
    def forward(W0: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return form(W0, A, B, W0.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        W0, A, B = ctx.saved_tensors
        with no_autocast(W0.device):
            dtype = formation_dtype(W0.dtype)
            f = factors(A, B, dtype)
            dW0 = modulation(W0, f).mul_(G).to(W0.dtype) if ctx.needs_input_grad[0] else None
            dA = torch.zeros_like(A, dtype=dtype)
            dB = pull_back(G.clone(), W0, A.to(dtype), B.to(dtype), dA)
        return dW0, dA.to(A.dtype), dB.to(B.dtype)
