"""The products of all experts at once, with the grouped product of PyTorch: the host neither waits nor loops."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hira.ops import heuristics
from hira.ops.dither import noise_of, round_into
from hira.ops.effective_weight import no_autocast
from hira.ops.workspace import formation_dtype


def grouped_linear(x: Tensor, W0: Tensor, A: Tensor, B: Tensor, lora_r: int, offs: Tensor) -> Tensor:
    """Apply an adapted weight for each expert to the rows of that expert, as one grouped product.

    Equation: ``y[t] = W'[e] x[t]`` for the rows t of expert e, ``W'[e] = W0[e] * (1 + B[e] A[e]) + L2[e] L1[e]``. With
    ``G[e] = dy_e^T x_e`` over its rows the gradients are those of `linear`, expert by expert.

    Args:
        x: (T, in), sorted by expert.
        W0: (E, out, in), of x's dtype, any strides.
        A: (E, r + lora_r, in), A over L1.
        B: (E, out, r + lora_r), B beside L2.
        lora_r: how many of the last rows of A, and columns of B, are those of L1 and L2.
        offs: (E,) int32, the end of each expert's rows; rows behind the last end give zeros.

    Returns:
        (T, out), of x's dtype.

    Cost: forming all E weights, forward and again backward, and three grouped products in a step. Kept for backward: x,
    W0, A and B. Temporaries: W' of all experts forward, W' and then G of all backward.

    Source: HiRA (ICLR 2025), equation 5, for each expert.
    """
    y: Tensor = _Grouped.apply(x, W0, A, B, lora_r, offs)
    return y


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W0: Tensor, A: Tensor, B: Tensor, lora_r: int, offs: Tensor) -> Tensor:
        ctx.lora_r = lora_r
        ctx.save_for_backward(x, W0, A, B, offs)
        with no_autocast(x.device):
            y = F.grouped_mm(x, form_stack(W0, A, B, lora_r, x.dtype).transpose(1, 2), offs=offs)
        return _zero_behind(y, offs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W0, A, B, offs = ctx.saved_tensors
        need_x, need_W0, need_A, need_B, *_ = ctx.needs_input_grad
        dx = dW0 = dA = dB = None
        dy = dy.contiguous()
        with no_autocast(dy.device):
            if need_x:
                dx = _zero_behind(F.grouped_mm(dy, form_stack(W0, A, B, ctx.lora_r, dy.dtype), offs=offs), offs)
            if need_W0 or need_A or need_B:
                G = F.grouped_mm(dy.t(), x, offs=offs)
                dW0, dA, dB = _gradients(G, W0, A, B, ctx.lora_r, need_W0)
        return dx, dW0, dA, dB, None, None


def form_stack(W0: Tensor, A: Tensor, B: Tensor, lora_r: int, dtype: torch.dtype) -> Tensor:
    """Form W' (E, out, in) of stacked weights, contiguous; arguments as of `grouped_linear`, not tracked by autograd.

    The experts are taken some at a time, so that what is in the dtype of formation has a bounded size.
    """
    exact = formation_dtype(W0.dtype)
    dithers = heuristics.dithers(W0.dtype, dtype)
    out = torch.empty(W0.shape, dtype=dtype, device=W0.device)
    with torch.no_grad(), no_autocast(W0.device):
        for some in _blocks(W0):
            W0_, A_, B_ = W0[some].to(exact), A[some].to(exact), B[some].to(exact)
            r = A_.shape[1] - lora_r
            formed = torch.bmm(B_[..., :r], A_[:, :r])
            torch.addcmul(W0_, W0_, formed, out=formed)
            if lora_r:
                formed.baddbmm_(B_[..., r:], A_[:, r:])
            if dithers:
                noise = noise_of(W0[0])
                rows = noise.rows.repeat(len(W0_))
                round_into(out[some].flatten(0, 1), formed.flatten(0, 1), rows, noise.columns)
            else:
                out[some] = formed
    return out


def _blocks(W0: Tensor) -> Iterator[slice]:
    step = max(1, heuristics.block_entries(W0.device) // max(1, W0[0].numel()))
    return (slice(start, start + step) for start in range(0, len(W0), step))


def _gradients(
    G: Tensor, W0: Tensor, A: Tensor, B: Tensor, lora_r: int, need_W0: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """dW0 if it is needed, dA and dB, of the gradients G (E, out, in) of W'."""
    exact = formation_dtype(W0.dtype)
    dW0 = torch.empty_like(W0) if need_W0 else None
    dA, dB = torch.empty_like(A), torch.empty_like(B)
    for some in _blocks(W0):
        G_, A_, B_ = G[some].to(exact), A[some].to(exact), B[some].to(exact)
        r = A_.shape[1] - lora_r
        GW = G_ * W0[some]
        dA[some, :r], dB[some, :, :r] = torch.bmm(B_[..., :r].mT, GW), torch.bmm(GW, A_[:, :r].mT)
        if lora_r:
            dA[some, r:], dB[some, :, r:] = torch.bmm(B_[..., r:].mT, G_), torch.bmm(G_, A_[:, r:].mT)
        if dW0 is not None:
            dW0[some] = torch.bmm(B_[..., :r], A_[:, :r]).add_(1).mul_(G_)
    return dW0, dA, dB


def _zero_behind(y: Tensor, offs: Tensor) -> Tensor:
    """y with zeros in the rows behind the last expert's, which a grouped product leaves as they were."""
    rows = torch.arange(len(y), device=y.device)
    return y.masked_fill_((rows >= offs[-1]).unsqueeze(1), 0)
