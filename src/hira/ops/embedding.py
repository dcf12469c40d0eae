"""Rows of an adapted embedding table, at the cost of the rows that are looked up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hira.ops import paths
from hira.ops.dither import noise_of, round_into
from hira.ops.modulate import no_autocast
from hira.ops.workspace import formation_dtype


def embedding(
    ids: Tensor,
    W0: Tensor,
    A: Tensor,
    B: Tensor,
    *,
    keep: Tensor | None = None,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    update_only: bool = False,
) -> Tensor:
    """Look up rows of an adapted embedding table.

    Equation: ``y[t] = W0[ids[t]] * (1 + keep[t] B A[:, ids[t]])``, or without the 1 with ``update_only``. The options
    are those of ``F.embedding(ids, W')``: what they do to the gradient of the table W' reaches A and B by the chain
    rule, and ``max_norm`` bounds the rows that are returned, W0 staying as it is.

    Args:
        ids: integers, any shape.
        W0: (num_embeddings, dim).
        A: (r, num_embeddings). For several adapters, their A's stacked.
        B: (dim, r). For several adapters, their B's side by side.
        keep: a factor for each id on its update, of ids' shape; dropout's mask divided by 1 - p.
        padding_idx: the row that gives no gradient.
        max_norm, norm_type: rows of a larger norm are scaled down to it; the scale counts as a constant in backward.
        scale_grad_by_freq: divide gradients by the number of times the id occurs in ids.
        sparse: give A's gradient as a sparse tensor, of shape (r, num_embeddings).
        update_only: leave out the 1, for a caller that adds the base layer's own output.

    Returns:
        (*ids.shape, dim), of W0's dtype.

    Cost: O(T r dim) for T ids, whatever the size of the table; A's gradient, unless sparse, is a tensor of A's size.

    Source: HiRA (ICLR 2025), equation 5, on the rows looked up.
    """
    dtype = formation_dtype(W0.dtype)
    with no_autocast(W0.device):
        look_up: Callable[..., Tensor] = _SparseColumns.apply if sparse else _columns
        columns = look_up(ids, A).to(dtype)  # (*ids.shape, r)
        if keep is not None:
            columns = columns * keep.to(dtype).unsqueeze(-1)
        modulation = columns @ B.t().to(dtype)
        if not update_only:
            modulation = 1 + modulation
        y = F.embedding(ids, W0, sparse=sparse) * modulation
        if paths.dithers(W0.dtype, W0.dtype) and not update_only:
            noise = noise_of(W0)
            y = _Dithered.apply(y, noise.rows[ids], noise.columns, W0.dtype)
        else:
            y = y.to(W0.dtype)
        if max_norm is not None:
            norms = torch.linalg.vector_norm(y.detach(), norm_type, dim=-1, keepdim=True)
            y = torch.where(norms > max_norm, y * (max_norm / (norms + 1e-7)), y)
    share = _gradient_share(ids, padding_idx, scale_grad_by_freq, dtype)
    return y if share is None else _ScaleGradient.apply(y, share.unsqueeze(-1))


def _columns(ids: Tensor, A: Tensor) -> Tensor:
    """A[:, ids] with ids' dimensions first."""
    return F.embedding(ids, A.t())


class _Dithered(torch.autograd.Function):
    """Rows of W', rounded as `modulate.block` rounds them; the gradient passes as through any rounding."""

    @staticmethod
    def forward(exact: Tensor, rows: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
        flat = exact.reshape(-1, exact.shape[-1]).clone()
        return round_into(torch.empty_like(flat, dtype=dtype), flat, rows.flatten(), columns).view(exact.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        return dy.to(ctx.dtype), None, None, None


class _SparseColumns(torch.autograd.Function):
    """The same with a sparse gradient; PyTorch cannot transpose the one that `F.embedding` gives."""

    @staticmethod
    def forward(ids: Tensor, A: Tensor) -> Tensor:
        return _columns(ids, A)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ids, A = inputs
        ctx.shape = A.shape
        ctx.save_for_backward(ids)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dcolumns: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        r = ctx.shape[0]
        rows = torch.arange(r, device=ids.device).repeat_interleave(ids.numel())
        at = torch.stack([rows, ids.flatten().long().repeat(r)])
        return None, torch.sparse_coo_tensor(
            at, dcolumns.reshape(-1, r).t().flatten(), ctx.shape, check_invariants=False
        )


def _gradient_share(
    ids: Tensor, padding_idx: int | None, scale_grad_by_freq: bool, dtype: torch.dtype
) -> Tensor | None:
    """The factor on each id's gradient: 0 for padding, one over the number of occurrences by frequency."""
    share = None
    if scale_grad_by_freq:
        ordered = ids.flatten().sort().values
        counts = torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids)
        share = counts.to(dtype).reciprocal()
    if padding_idx is not None:
        row = ids != padding_idx
        share = row if share is None else share * row
    return share


class _ScaleGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(x: Tensor, factor: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        factor = factor.to(dy.dtype)
        return (dy * factor).masked_fill(factor == 0, 0), None
