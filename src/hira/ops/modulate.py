"""Forms W' = W0 * (1 + BA), the only place that does, and pulls a weight's gradient back to A and B.

Derivations, the order of roundings and the choice of blocks are in docs/architecture.md.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hira.ops import paths


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
    rows, columns = W0.shape
    step = max(1, min(rows, paths.block_entries(W0.device) // max(columns, 1)))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def column_blocks(W0: Tensor) -> Iterator[slice]:
    """Split the columns of W0 (out, in) likewise."""
    return row_blocks(W0.t())


class _Scratch(threading.local):
    """The memory of a thread for blocks on a CPU, at most a block for each dtype; kept, as fresh pages are slow."""

    def __init__(self) -> None:
        self._buffers: dict[torch.dtype, Tensor] = {}

    def take(self, entries: int, dtype: torch.dtype) -> Tensor:
        buffer = self._buffers.get(dtype)
        if buffer is None or buffer.numel() < entries:
            with torch.inference_mode(False):  # an inference tensor could not be written to in training
                buffer = self._buffers[dtype] = torch.empty(entries, dtype=dtype)
        return buffer


_scratch = _Scratch()


class Workspace:
    """Memory for one block of W' or of its gradient at a time, for one pass over all blocks.

    On a CPU it is the thread's own, kept from pass to pass: two workspaces are never used at once.

    Args:
        W0: (out, in), the weight that is split into blocks.
        dtype: that of the products with W'.
    """

    def __init__(self, W0: Tensor, dtype: torch.dtype) -> None:
        limit = paths.block_entries(W0.device)
        entries = min(W0.numel(), max(limit, *W0.shape))
        # subclasses and traced tensors stand for memory that is not to be had here
        plain = type(W0.detach()) is Tensor and W0.device.type == "cpu" and not torch.compiler.is_compiling()
        take = _scratch.take if plain and entries <= limit else partial(_fresh, W0)
        exact = formation_dtype(W0.dtype)
        self._exact = take(entries, exact)
        self._rounded = self._exact if dtype == exact else take(entries, dtype)

    def exact(self, like: Tensor) -> Tensor:
        """A tensor in the dtype of formation, with the shape and memory layout of ``like`` (rows, columns)."""
        return _laid_out(self._exact, like)

    def rounded(self, like: Tensor) -> Tensor:
        """The same in the dtype of the products; where the dtypes agree it is the same memory."""
        return _laid_out(self._rounded, like)


def _fresh(W0: Tensor, entries: int, dtype: torch.dtype) -> Tensor:
    return W0.new_empty(entries, dtype=dtype)


def _laid_out(memory: Tensor, like: Tensor) -> Tensor:
    # the weight of a transformers `Conv1D`, seen as (out, in), lies in memory as (in, out)
    if like.stride(0) < like.stride(1):
        return memory[: like.numel()].view(like.shape[1], like.shape[0]).t()
    return memory[: like.numel()].view(like.shape)


def block(
    W0: Tensor, f: Factors, workspace: Workspace, rows: slice = slice(None), columns: slice = slice(None)
) -> Tensor:
    """Return some rows and columns of ``W0 * (1 + BA)``, rounded once, in the workspace's memory."""
    W0 = W0[rows, columns]
    exact = torch.mm(f.B[rows], f.A[:, columns], out=workspace.exact(W0)).mul_(W0)
    rounded = workspace.rounded(W0)
    return exact if rounded.dtype == exact.dtype else rounded.copy_(exact)


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
        workspace = Workspace(W0, dtype)
        for rows in row_blocks(W0):
            out[rows] = block(W0, f, workspace, rows)
    return out


def pull_back(G: Tensor, W0: Tensor, A: Tensor, B: Tensor, dA: Tensor) -> Tensor:
    """Reduce ``G * W0``, where G is the gradient of W': add ``B^T (G * W0)`` to dA, return dB = ``(G * W0) A^T``.

    G and W0 may be rows of a weight, then so is B; all but W0 are in the dtype of formation. G is overwritten.
    """
    G.mul_(W0)
    dA.addmm_(B.t(), G)
    return torch.mm(G, A.t())


def weight_gradient(G: Tensor, W0: Tensor, f: Factors) -> Tensor:
    """The gradient of W0 itself, for a base layer that trains too: ``G * (1 + BA)``."""
    return torch.mm(f.B, f.A).mul_(G).to(W0.dtype)


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
            dW0 = weight_gradient(G, W0, f) if ctx.needs_input_grad[0] else None
            dA = torch.zeros_like(A, dtype=dtype)
            dB = pull_back(G.to(dtype, copy=True), W0, A.to(dtype), B.to(dtype), dA)
        return dW0, dA.to(A.dtype), dB.to(B.dtype)
