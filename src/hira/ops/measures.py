"""Measures of an update, U = W0 * BA: how many directions BA has, and what bfloat16 leaves of U."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def product_singular_values(left: Tensor, right: Tensor) -> Tensor:
    """Return the singular values of ``left right``, found without forming it.

    They are those of ``R_l R_r^T`` with ``left = Q_l R_l`` and ``right^T = Q_r R_r``, a matrix of r x r or smaller.

    Args:
        left: (m, r).
        right: (r, n).

    Returns:
        The values in descending order, in float64: as many as the smallest of r, m and n. Cost: (m + n) r^2.
    """
    R_left, R_right = (torch.linalg.qr(matrix.double(), mode="r").R for matrix in (left, right.t()))
    values: Tensor = torch.linalg.svdvals(R_left @ R_right.t())
    return values


def effective_rank(values: Tensor) -> float:
    """Return ``exp(-sum_i p_i ln p_i)`` with ``p_i = s_i / sum_j s_j``; 0 where all are zero.

    Args:
        values: the singular values s of a matrix, in any order.

    Source: Roy and Vetterli, The effective rank (EUSIPCO 2007).
    """
    total = float(values.sum())
    return math.exp(float(torch.special.entr(values / total).sum())) if total else 0.0


def bfloat16_keeps(W0: Tensor, update: Tensor) -> Tensor:
    """Return which entries of W0 an update changes after rounding to the nearest bfloat16.

    Equation: ``bfloat16(W0 + U) != bfloat16(W0)``.

    Args:
        W0: of any shape, in float32 or float64.
        update: U, of the same shape and dtype.

    Returns:
        A mask of that shape.
    """
    return (W0 + update).bfloat16() != W0.bfloat16()
