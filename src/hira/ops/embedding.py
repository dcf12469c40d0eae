"""Rows of an adapted embedding table, at the cost of the rows that are looked up."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hira.ops import heuristics
from hira.ops.dither import Noise, noise_of, round_into, rounded
from hira.ops.effective_weight import no_autocast, split
from hira.ops.workspace import formation_dtype


def embedding(
    ids: Tensor,
    W0: Tensor,
    A: Tensor,
    B: Tensor,
    lora_r: int = 0,
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

    Equation: ``y[t] = W0[ids[t]] * (1 + keep[t] B A[:, ids[t]]) + keep[t] L2 L1[:, ids[t]]``, or without the 1 with
    ``update_only``. The options
    are those of ``F.embedding(ids, W')``: what they do to the gradient of the table W' reaches A and B by the chain
    rule, and ``max_norm`` bounds the rows that are returned, W0 staying as it is.

    Args:
        ids: integers, any shape.
        W0: (num_embeddings, dim).
        A: (r + lora_r, num_embeddings): A over L1. For several adapters, first their A's stacked.
        B: (dim, r + lora_r): B beside L2. For several adapters, first their B's side by side.
        lora_r: how many of the last rows of A, and columns of B, are those of L1 and L2; 0 for HiRA without LoRA.
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
    flat = ids.flatten()
    plain = heuristics.plain()
    rows = F.embedding(flat, W0, sparse=sparse and not plain)
    columns: Tensor = A.index_select(1, flat).t() if plain else _Columns.apply(flat, A, sparse)
    if keep is not None:
        columns = columns * keep.reshape(-1, 1).to(columns.dtype)
    noise = noise_of(W0) if heuristics.dithers(W0.dtype, W0.dtype) and not update_only else None
    noise = noise and Noise(noise.rows[flat], noise.columns)
    share = _gradient_share(flat, padding_idx, scale_grad_by_freq, dtype)
    y: Tensor
    if plain:
        y = _modulated(rows, columns, B, lora_r, noise, update_only)
        y = y if share is None else _sharing(y, share.unsqueeze(1))
    else:
        y = _Rows.apply(rows, columns, B, lora_r, noise, share, update_only)
    y = y.view(*ids.shape, W0.shape[1])
    return y if max_norm is None else bound_norm(y, max_norm, norm_type)


def bound_norm(y: Tensor, max_norm: float, norm_type: float) -> Tensor:
    """Scale rows of y (..., dim) of a larger norm down to max_norm; the scale counts as a constant in backward."""
    norms = torch.linalg.vector_norm(y.detach(), norm_type, dim=-1, keepdim=True)
    return torch.where(norms > max_norm, y * (max_norm / (norms + 1e-7)), y)


class _Rows(torch.autograd.Function):
    """Rows of W' of rows (T, dim) of the table and columns (T, r + lora_r), as `effective_weight.block` rounds them."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        B: Tensor,
        lora_r: int,
        noise: Noise | None,
        share: Tensor | None,
        update_only: bool,
    ) -> Tensor:
        ctx.lora_r, ctx.update_only = lora_r, update_only
        ctx.save_for_backward(rows, columns, B, share)
        return _modulated(rows, columns, B, lora_r, noise, update_only)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns, B, share = ctx.saved_tensors
        need_rows, need_columns, need_B, *_ = ctx.needs_input_grad
        if share is not None:  # none for padding, whatever dy is there
            share = share.unsqueeze(1)
            dy = (dy * share.to(dy.dtype)).masked_fill(share == 0, 0)
        drows = dcolumns = dB = None
        if need_rows:
            A, B_, _ = split(columns.t(), B, ctx.lora_r)
            BA = _product(rows, A.t(), B_)
            drows = ((BA if ctx.update_only else BA + 1) * dy).to(rows.dtype)
        with no_autocast(dy.device):
            # the columns of HiRA act on the rows of the table, those of LoRA add to them
            G = rows.to(formation_dtype(rows.dtype)) * dy
            A, B_, lora = split(columns.t(), B, ctx.lora_r)
            parts = [(G, A, B_)] if lora is None else [(G, A, B_), (dy.to(G.dtype), *lora)]
            if need_columns:
                dcolumns = torch.cat([torch.mm(g, b.to(G.dtype)) for g, _, b in parts], dim=1).to(columns.dtype)
            if need_B:
                dB = torch.cat([torch.mm(g.t(), a.t().to(G.dtype)) for g, a, _ in parts], dim=1).to(B.dtype)
        return drows, dcolumns, dB, None, None, None, None


def _modulated(rows: Tensor, columns: Tensor, B: Tensor, lora_r: int, noise: Noise | None, update_only: bool) -> Tensor:
    A, B, lora = split(columns.t(), B, lora_r)
    BA = _product(rows, A.t(), B)
    rows_ = rows.to(BA.dtype)
    exact = rows_ * BA if update_only else torch.addcmul(rows_, rows_, BA)
    if lora is not None:
        exact = exact + _product(rows, lora[0].t(), lora[1])
    if noise is None:
        return exact.to(rows.dtype)
    if heuristics.plain():
        return rounded(exact, rows.dtype, noise)
    return round_into(torch.empty_like(rows), exact, noise.rows, noise.columns)


def _sharing(y: Tensor, share: Tensor) -> Tensor:
    """y, with a factor on its gradient."""
    fixed = y.detach()
    return fixed + torch.where(fixed.isfinite(), (y - fixed) * share.to(y.dtype), 0)


def _product(rows: Tensor, columns: Tensor, B: Tensor) -> Tensor:
    """Columns (T, r) times B^T, in the dtype of formation for these rows."""
    dtype = formation_dtype(rows.dtype)
    with no_autocast(rows.device):
        return torch.mm(columns.to(dtype), B.to(dtype).t())


class _Columns(torch.autograd.Function):
    """A[:, ids] as (T, r); its gradient is made in A's layout, which PyTorch's own look-up would transpose."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, A: Tensor, sparse: bool) -> Tensor:
        ctx.shape, ctx.sparse = A.shape, sparse
        ctx.save_for_backward(ids)
        return A.index_select(1, ids).t()

    @staticmethod
    def backward(ctx: Any, dcolumns: Tensor) -> tuple[None, Tensor, None]:
        (ids,) = ctx.saved_tensors
        if not ctx.sparse:
            zeros = dcolumns.new_zeros(ctx.shape)
            add = zeros.index_add if heuristics.plain_backward(dcolumns) else zeros.index_add_
            return None, add(1, ids, dcolumns.t()), None
        r = ctx.shape[0]
        factors = torch.arange(r, device=ids.device).repeat_interleave(ids.numel())
        at = torch.stack([factors, ids.long().repeat(r)])
        dA = torch.sparse_coo_tensor(at, dcolumns.t().flatten(), ctx.shape, check_invariants=False)
        return None, dA, None


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
