"""The equations of HiRA, written to be obviously right.

Every fast path in this package is tested against these functions in float64. They form the whole modulated weight
with plain differentiable PyTorch operations and take no short cut.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def delta(A: Tensor, B: Tensor) -> Tensor:
    """Return BA, the low-rank part of the modulation, in the shape of the weight.

    Equation: ``(BA)[o, ...] = sum_k B[o, k] A[k, ...]``.

    Args:
        A: (r, in) or (r, in / groups, *kernel).
        B: (out, r) or (out, r, 1, ...).

    Returns:
        (out, in) or (out, in / groups, *kernel), in the common dtype of A and B.

    Source: HiRA (ICLR 2025), equation 5.
    """
    return torch.einsum("ok,k...->o...", B.flatten(1), A)


def modulated_weight(W0: Tensor, A: Tensor, B: Tensor, L1: Tensor | None = None, L2: Tensor | None = None) -> Tensor:
    """Return the adapted weight ``W' = W0 * (1 + BA)``, entry by entry, or with LoRA ``W0 * (1 + BA) + L2 L1``.

    Args:
        W0: (out, in) or (out, in / groups, *kernel).
        A: (r, in) or (r, in / groups, *kernel).
        B: (out, r) or (out, r, 1, ...).
        L1, L2: the factors of LoRA, of the shapes of A and B with another rank; None without LoRA.

    Returns:
        W', of W0's shape.

    Source: HiRA (ICLR 2025), equation 5.
    """
    modulated = W0 * (1 + delta(A, B))
    return modulated if L1 is None or L2 is None else modulated + delta(L1, L2)


def linear(x: Tensor, W0: Tensor, A: Tensor, B: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``y = x W'^T + bias``.

    Args:
        x: (..., in).
        W0: (out, in).
        A: (r, in).
        B: (out, r).
        bias: (out,) or None.

    Returns:
        y, (..., out).
    """
    return F.linear(x, modulated_weight(W0, A, B), bias)


def embedding(ids: Tensor, W0: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Return the rows ``W'[ids]`` of an adapted embedding table, ``W' = W0 * (1 + (BA)^T)``.

    Args:
        ids: integers, any shape.
        W0: (num_embeddings, dim).
        A: (r, num_embeddings).
        B: (dim, r).

    Returns:
        (*ids.shape, dim).
    """
    return F.embedding(ids, W0 * (1 + (B @ A).T))


def conv(
    x: Tensor,
    W0: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Return the convolution of x with W', in one, two or three spatial dimensions.

    Args:
        x: (batch, in, *spatial).
        W0: (out, in / groups, *kernel).
        A: (r, in / groups, *kernel).
        B: (out, r, 1, ...).
        bias: (out,) or None.
        stride, padding, dilation: one integer for each spatial dimension; padding is with zeros.
        groups: the number of channel groups.

    Returns:
        (batch, out, *spatial').
    """
    function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[W0.dim() - 2]
    return function(x, modulated_weight(W0, A, B), bias, tuple(stride), tuple(padding), tuple(dilation), groups)
