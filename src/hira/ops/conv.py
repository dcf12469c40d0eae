"""Convolution with W' as one convolution forward and two backward, in one, two or three spatial dimensions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hira.ops import heuristics
from hira.ops.effective_weight import (
    cast_as_autocast,
    factor_gradients,
    form,
    no_autocast,
    plain_weight,
    product_dtype,
    weight_gradient,
)


class Geometry(NamedTuple):
    """Stride, zero padding and dilation for each spatial dimension, and the number of channel groups."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def conv(
    x: Tensor,
    W0: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None = None,
    *,
    lora_r: int = 0,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    update_only: bool = False,
    dequantize: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Convolve x with an adapted weight as one convolution.

    Equation: ``y = conv(x, W0 * (1 + BA) + L2 L1) + bias``, or ``conv(x, W0 * BA + L2 L1)`` with ``update_only``, where
    ``(BA)[o, i, ...] = sum_k B[o, k] A[k, i, ...]``. With G the gradient of the weight of the plain convolution,
    ``dB = (G * W0) A^T``, ``dA = B^T (G * W0)``, ``dL2 = G L1^T`` and ``dL1 = L2^T G`` over flattened kernels.

    Args:
        x: (batch, in, *spatial) or (in, *spatial).
        W0: (out, in / groups, *kernel).
        A: (r + lora_r, in / groups, *kernel): A over L1. For several adapters, first their A's stacked.
        B: (out, r + lora_r, 1, ...): B beside L2. For several adapters, first their B's side by side.
        bias: (out,) or None.
        lora_r: how many of the last rows of A, and columns of B, are those of L1 and L2; 0 for HiRA without LoRA.
        stride, padding, dilation: one integer for each spatial dimension; padding is with zeros.
        groups: the number of channel groups.
        update_only: leave out the 1, for a caller that adds the base layer's own output.
        dequantize: maps `W0`, which then is what is kept of it, to W0. Called in forward and again in backward.

    Returns:
        (batch, out, *spatial') or (out, *spatial'), in the dtype that the plain convolution gives, autocast included.

    Cost: one convolution forward and two backward. Kept for backward: x, W0, A and B. Temporaries: W' forward, G and
    G * W0 backward, whole, each freed before the function returns; a convolution is not split over its output channels,
    because each part would lay the input out again.

    Source: HiRA (ICLR 2025), equation 5, over flattened kernels; docs/concepts.md.
    """
    dtype = product_dtype(x, W0.dtype)
    x = cast_as_autocast(x, dtype)
    bias = bias if bias is None else bias.to(dtype)
    geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    unbatched = x.dim() == W0.dim() - 1
    function = _convolve if heuristics.plain() else _Conv.apply
    y: Tensor = function(x.unsqueeze(0) if unbatched else x, W0, A, B, bias, geometry, lora_r, update_only, dequantize)
    return y.squeeze(0) if unbatched else y


def _convolve(
    x: Tensor,
    W0: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    lora_r: int,
    update_only: bool,
    dequantize: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    W0 = W0 if dequantize is None else dequantize(W0)
    weight = form_kernel(W0, A, B, lora_r, x.dtype, update_only, plain=heuristics.plain())
    stride, padding, dilation, groups = geometry
    with no_autocast(x.device):
        return torch.convolution(x, weight, bias, stride, padding, dilation, False, (0,) * len(stride), groups)


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, W0, A, B, bias, ctx.geometry, ctx.lora_r, ctx.update_only, ctx.dequantize = inputs
        ctx.bias_sizes = None if bias is None else list(bias.shape)
        ctx.save_for_backward(x, W0, A, B)
        return _convolve(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W0, A, B = ctx.saved_tensors
        geometry: Geometry = ctx.geometry
        need_x, need_W0, need_A, need_B, need_bias, *_ = ctx.needs_input_grad
        W0 = W0 if ctx.dequantize is None else ctx.dequantize(W0)
        lora_r, update_only = ctx.lora_r, ctx.update_only
        weight = form_kernel(W0, A, B, lora_r, x.dtype, update_only, plain=heuristics.plain_backward(dy))
        dW0 = dA = dB = None
        with no_autocast(dy.device):
            dx, G, dbias = torch.ops.aten.convolution_backward(
                dy,
                x,
                weight,
                ctx.bias_sizes,
                geometry.stride,
                geometry.padding,
                geometry.dilation,
                False,
                (0,) * len(geometry.stride),
                geometry.groups,
                (need_x, need_W0 or need_A or need_B, need_bias),
            )
            W0_, A_, B_ = W0.flatten(1), A.flatten(1), B.flatten(1)
            G = G.reshape(W0_.shape) if need_W0 or need_A or need_B else G
            if need_W0:
                dW0 = weight_gradient(G, W0_, A_, B_, lora_r, update_only=update_only).view_as(W0)
            if need_A or need_B:
                dA, dB = factor_gradients(G, W0_, A_, B_, lora_r)
                dA, dB = dA.view(A.shape), dB.view(B.shape)
        return dx, dW0, dA, dB, dbias, None, None, None, None


def form_kernel(
    W0: Tensor,
    A: Tensor,
    B: Tensor,
    lora_r: int,
    dtype: torch.dtype,
    update_only: bool = False,
    *,
    plain: bool = False,
) -> Tensor:
    """Form W' of W0 (out, in / groups, *kernel) over flattened kernels, rounded once; tracked if `plain`."""
    if plain:
        matrices = W0.flatten(1), A.flatten(1), B.flatten(1)
        return plain_weight(*matrices, lora_r, dtype, update_only=update_only).view(W0.shape)
    if torch.compiler.is_compiling():
        weight: Tensor = torch.ops.hira.form_kernel(W0, A, B, lora_r, dtype, update_only)
        return weight
    return _form_kernel(W0, A, B, lora_r, dtype, update_only)


def _form_kernel(W0: Tensor, A: Tensor, B: Tensor, lora_r: int, dtype: torch.dtype, update_only: bool) -> Tensor:
    return form(W0.flatten(1), A.flatten(1), B.flatten(1), lora_r, dtype, update_only=update_only).view(W0.shape)


# Opaque under torch.compile: compiled and eager code form W' by the very same blocks. And were it traced, the strides
# that it reads would make Dynamo start over with the trace of the backward, and leave autocast off (torch 2.13).
torch.library.custom_op(
    "hira::form_kernel",
    _form_kernel,
    mutates_args=(),
    schema="(Tensor W0, Tensor A, Tensor B, int lora_r, ScalarType dtype, bool update_only) -> Tensor",
).register_fake(
    lambda W0, A, B, lora_r, dtype, update_only: torch.empty_like(W0.flatten(1), dtype=dtype).view(W0.shape)
)
