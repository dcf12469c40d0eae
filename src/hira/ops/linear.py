"""y = x W'^T with one dense product forward and two backward, and nothing the size of W0 kept in between."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hira.ops import heuristics, kernel_choice
from hira.ops.effective_weight import (
    block,
    cast_as_autocast,
    column_blocks,
    factor_gradients,
    modulation,
    no_autocast,
    plain_weight,
    product_dtype,
    pull_back,
    row_blocks,
    weight_gradient,
    whole,
    without_autocast,
)
from hira.ops.int8 import Link, product, quantize, quantize_shared
from hira.ops.workspace import Workspace, formation_dtype

Dequantize = Callable[[Tensor], Tensor]
WeightGradient = Literal["exact", "int8"]


def linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None = None,
    *,
    lora_r: int = 0,
    update_only: bool = False,
    dequantize: Dequantize | None = None,
    weight_gradient: WeightGradient = "exact",
    formed: Tensor | None = None,
    training: bool = False,
) -> Tensor:
    """Apply an adapted weight to x as one dense product.

    Equation: ``y = x W'^T + bias`` with ``W' = W0 * (1 + BA) + L2 L1``, or ``x (W0 * BA + L2 L1)^T`` with
    ``update_only``. With ``G = dy^T x`` the gradients are ``dx = dy W'``, ``dB = (G * W0) A^T``, ``dA = B^T (G * W0)``,
    ``dL2 = G L1^T`` and ``dL1 = L2^T G``.

    Args:
        x: (..., in), any strides.
        weight: W0 (out, in), any strides; or whatever `dequantize` turns into W0.
        A: (r + lora_r, in), any floating dtype: A over L1. For several adapters, first their A's stacked.
        B: (out, r + lora_r): B beside L2. For several adapters, first their B's side by side.
        bias: (out,) or None.
        lora_r: how many of the last rows of A, and columns of B, are those of L1 and L2; 0 for HiRA without LoRA.
        update_only: leave out the 1, for a caller that adds the base layer's own output.
        dequantize: maps `weight` to W0. Called in forward and again in backward, so that no dense copy is kept; the
            product then runs in x's dtype.
        weight_gradient: "int8" computes G, which serves dA and dB alone, from x and dy rounded to 8 bits, and keeps x
            for backward in 8 bits. Where that cannot be, `heuristics.int8` says where, G is exact.
        formed: W' (out, in) as it was formed before, in the dtype of the product; it stands in for it forward and for
            dx, and nobody may change it before the backward.
        training: whether this is part of a training step even where gradients are off, as in the first forward of
            reentrant checkpointing. A training step takes the same W', rounded once, everywhere.

    Returns:
        (..., out), in the dtype that ``F.linear(x, W0)`` gives, autocast included.

    Cost: for T tokens, an m by n weight and R = r + lora_r, 2 T m n + 2 R m n operations forward and at most
    4 T m n + 6 R m n backward, 2 T m n of these in integers with "int8". Kept for backward: x, or its codes and a
    scale for each of their columns, `weight`, A and B. Temporaries: one block of W' or of G.

    Source: HiRA (ICLR 2025), equation 5; the derivation is in docs/architecture.md.
    """
    dtype = product_dtype(x, weight.dtype if dequantize is None else x.dtype)
    x, bias = cast_as_autocast(x, dtype), bias if bias is None else bias.to(dtype)
    if heuristics.plain():
        W0 = weight if dequantize is None else dequantize(weight)
        return F.linear(x, plain_weight(W0, A, B, lora_r, dtype, update_only=update_only), bias)
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    y: Tensor
    if torch.is_grad_enabled():
        codes = scale = link = None
        if weight_gradient == "int8" and _rounds_gradient(x, weight, A, B):
            codes, scale = quantize_shared(x)
            link = Link.apply(flat) if flat.requires_grad else None
        y = _Linear.apply(flat, weight, A, B, bias, lora_r, update_only, dequantize, codes, scale, link, formed)
    elif formed is not None:
        y = _multiplied(flat, formed, bias)
    else:
        y = _forward(
            flat, weight if dequantize is None else dequantize(weight), A, B, bias, lora_r, update_only, training
        )
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def _rounds_gradient(x: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> bool:
    serves_factors_alone = (A.requires_grad or B.requires_grad) and not weight.requires_grad
    return serves_factors_alone and heuristics.int8(x, B.shape[0])


class _Linear(torch.autograd.Function):
    # without `setup_context`, for which PyTorch inspects the signature at every call
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        A: Tensor,
        B: Tensor,
        bias: Tensor | None,
        lora_r: int,
        update_only: bool,
        dequantize: Dequantize | None,
        codes: Tensor | None,
        scale: Tensor | None,
        link: Tensor | None,
        formed: Tensor | None,
    ) -> Tensor:
        if formed is not None:
            y = _multiplied(x, formed, bias)
        else:
            W0 = weight if dequantize is None else dequantize(weight)
            y = _forward(x, W0, A, B, bias, lora_r, update_only, True)
        ctx.formed = formed
        ctx.lora_r, ctx.update_only, ctx.dequantize = lora_r, update_only, dequantize
        needs_x = any(ctx.needs_input_grad[1:4])
        saved = codes if codes is not None else x if needs_x else None
        ctx.save_for_backward(saved, weight, A, B, scale, link)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B, scale, link = ctx.saved_tensors
        need_x, need_W0, need_A, need_B, need_bias, *_ = ctx.needs_input_grad
        W0 = weight if ctx.dequantize is None else ctx.dequantize(weight)
        lora_r, update_only = ctx.lora_r, ctx.update_only
        dx = dW0 = dA = dB = None
        if heuristics.plain_backward(dy):
            with no_autocast(dy.device):
                if need_x:
                    dx = torch.mm(dy, plain_weight(W0, A, B, lora_r, dy.dtype, update_only=update_only))
                if scale is not None:
                    x = (x * scale).to(dy.dtype)
                    x = x if link is None else x + link
                G = torch.mm(dy.t(), x) if need_W0 or need_A or need_B else None
                if G is not None and (need_A or need_B):
                    dA, dB = factor_gradients(G, W0, A, B, lora_r)
                if G is not None and need_W0:
                    dW0 = weight_gradient(G, W0, A, B, lora_r, update_only=update_only)
            return dx, dW0, dA, dB, dy.sum(0) if need_bias else None, *(None,) * 7
        compiling = torch.compiler.is_compiling()
        if need_x and ctx.formed is not None:
            with no_autocast(dy.device):
                dx = torch.mm(dy, ctx.formed)
        elif need_x:
            input_gradient = torch.ops.hira.linear_input_gradient if compiling else linear_input_gradient
            dx = input_gradient(dy, W0, A, B, lora_r, update_only)
        if need_A or need_B:
            reduced = torch.ops.hira.linear_factor_gradients if compiling else linear_factor_gradients
            dA, dB = reduced(dy, x, W0, A, B, lora_r, scale)
        if need_W0:
            with no_autocast(dy.device):
                dW0 = weight_gradient(torch.mm(dy.t(), x), W0, A, B, lora_r, update_only=update_only)
        dbias = dy.sum(0) if need_bias else None
        return dx, dW0, dA, dB, dbias, *(None,) * 7


@without_autocast
def _multiplied(x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    """x (T, in) -> y (T, out), the product with a whole weight."""
    if heuristics.transposed(x):
        return (torch.mm(W, x.t()) if bias is None else torch.addmm(bias[:, None], W, x.t())).t()
    return torch.mm(x, W.t()) if bias is None else torch.addmm(bias, x, W.t())


def _forward(
    x: Tensor, W0: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, lora_r: int, update_only: bool, training: bool
) -> Tensor:
    function = torch.ops.hira.linear_forward if torch.compiler.is_compiling() else linear_forward
    y: Tensor = function(x, W0, A, B, bias, lora_r, update_only, training)
    return y


@without_autocast
def linear_forward(
    x: Tensor, W0: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, lora_r: int, update_only: bool, training: bool
) -> Tensor:
    """x (T, in) -> y (T, out), a block of W's rows at a time; in training by the W' that dx is computed with."""
    if heuristics.decodes(x) and not (lora_r or update_only or training):
        from hira.ops import triton

        kernel = partial(triton.decode, x, W0, A, B, bias)
        plain = partial(_forward_by_blocks, x, W0, A, B, bias, 0, False)
        if kernel_choice.serves("decode", W0, x.dtype, kernel, plain):
            return kernel()
    return _forward_by_blocks(x, W0, A, B, bias, lora_r, update_only)


def _forward_by_blocks(
    x: Tensor, W0: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, lora_r: int, update_only: bool
) -> Tensor:
    by = modulation(W0, A, B, lora_r, x.dtype, update_only=update_only)
    if heuristics.is_small(W0):
        W = whole(W0, by, x.dtype)
        return torch.mm(x, W.t()) if bias is None else torch.addmm(bias, x, W.t())
    y = x.new_empty(x.shape[0], W0.shape[0])
    workspace = Workspace(W0, x.dtype)
    for rows in row_blocks(W0):
        W = block(W0[rows], by, workspace, rows)
        if heuristics.transposed(x):
            y[:, rows] = (torch.mm(W, x.t()) if bias is None else torch.addmm(bias[rows, None], W, x.t())).t()
        elif bias is None:
            torch.mm(x, W.t(), out=y[:, rows])
        else:
            torch.addmm(bias[rows], x, W.t(), out=y[:, rows])
    return y


@without_autocast
def linear_input_gradient(dy: Tensor, W0: Tensor, A: Tensor, B: Tensor, lora_r: int, update_only: bool) -> Tensor:
    """dy (T, out) -> dx (T, in), a block of W's columns at a time: no sum over blocks, so each entry rounds once."""
    by = modulation(W0, A, B, lora_r, dy.dtype, update_only=update_only)
    if heuristics.is_small(W0):
        return torch.mm(dy, whole(W0, by, dy.dtype))
    dx = dy.new_empty(dy.shape[0], W0.shape[1])
    workspace = Workspace(W0, dy.dtype)
    for columns in column_blocks(W0):
        torch.mm(dy, block(W0[:, columns], by, workspace, columns=columns), out=dx[:, columns])
    return dx


@without_autocast
def linear_factor_gradients(
    dy: Tensor, x: Tensor, W0: Tensor, A: Tensor, B: Tensor, lora_r: int, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """dy (T, out), x (T, in) -> dA and dB as A and B, a block of G's rows at a time; x is codes if it has a scale.

    With codes, G = diag(s) C diag(scale), where C is the product of the codes and s the scale of those of dy. The
    scales go to the factors, which are small: dA = B^T diag(s) (C * W0) diag(scale), and dB likewise.
    """
    if heuristics.triton(W0) and scale is None and not lora_r:
        from hira.ops import triton

        kernel = partial(triton.factor_gradients, dy, x, W0, A, B)
        plain = partial(_factor_gradients_by_blocks, dy, x, W0, A, B, 0, None)
        if kernel_choice.serves("factor_gradients", W0, dy.dtype, kernel, plain):
            return kernel()
    return _factor_gradients_by_blocks(dy, x, W0, A, B, lora_r, scale)


def _factor_gradients_by_blocks(
    dy: Tensor, x: Tensor, W0: Tensor, A: Tensor, B: Tensor, lora_r: int, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    if scale is None and heuristics.is_small(W0):
        return factor_gradients(torch.mm(dy.t(), x), W0, A, B, lora_r)
    dtype = formation_dtype(W0.dtype)
    A_, B_ = A.to(dtype), B.to(dtype)
    if scale is not None:
        dy, dy_scale = quantize(dy)
        A_, B_ = A_ * scale, B_ * dy_scale.unsqueeze(1)
    dA, dB = A_.new_zeros(A_.shape), B_.new_empty(B_.shape)
    workspace = Workspace(W0, torch.int32 if scale is not None else dy.dtype)
    for rows in row_blocks(W0):
        W0_ = W0[rows]
        memory = workspace.rounded(W0_)
        if scale is None:
            G = torch.mm(dy[:, rows].t(), x, out=memory)
            exact = G if G.dtype == dtype else workspace.exact(W0_).copy_(G)
        else:
            exact = product(dy[:, rows], x, workspace.exact(W0_), memory)
        pull_back(exact, W0_, A_, B_[rows], lora_r, dA, dB[rows])
    if scale is not None:
        dA *= scale
        dB *= dy_scale.unsqueeze(1)
    return dA.to(A.dtype), dB.to(B.dtype)


# Under torch.compile the three products are opaque operators: compiled and eager code then form W' by the very same
# blocks, and none of them is unrolled into the graph.
def _opaque(function: Callable[..., Any], schema: str, fake: Callable[..., Any]) -> None:
    torch.library.custom_op(f"hira::{function.__name__}", function, mutates_args=(), schema=schema).register_fake(fake)


_opaque(
    linear_forward,
    "(Tensor x, Tensor W0, Tensor A, Tensor B, Tensor? bias, int lora_r, bool update_only, bool training) -> Tensor",
    lambda x, W0, A, B, bias, lora_r, update_only, training: x.new_empty(x.shape[0], W0.shape[0]),
)
_opaque(
    linear_input_gradient,
    "(Tensor dy, Tensor W0, Tensor A, Tensor B, int lora_r, bool update_only) -> Tensor",
    lambda dy, W0, A, B, lora_r, update_only: dy.new_empty(dy.shape[0], W0.shape[1]),
)
_opaque(
    linear_factor_gradients,
    "(Tensor dy, Tensor x, Tensor W0, Tensor A, Tensor B, int lora_r, Tensor? scale) -> (Tensor, Tensor)",
    lambda dy, x, W0, A, B, lora_r, scale: (A.new_empty(A.shape), B.new_empty(B.shape)),
)
