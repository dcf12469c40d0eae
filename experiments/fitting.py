"""The best fits that LoRA, HiRA, and HiRA with LoRA can make to a given update of a weight."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

STARTS, ITERATIONS, TOLERANCE = 3, 60, 1e-5


class Fit(NamedTuple):
    """An update that a method can represent, its relative error, and by how much the worst start's error is above."""

    update: Tensor
    error: float
    spread: float


def fit_lora(target: Tensor, r: int) -> Fit:
    """Fit BA to a target, min |BA - D| in the Frobenius norm: its truncated singular value decomposition.

    It is the global optimum (Eckart and Young 1936).

    Args:
        target: D (out, in), in float64.
        r: the rank.
    """
    left, values, right = torch.linalg.svd(target, full_matrices=False)
    update = (left[:, :r] * values[:r]) @ right[:r]
    return Fit(update, relative_error(update, target), 0.0)


def fit_hira(W0: Tensor, target: Tensor, r: int, lora_r: int = 0, seed: int = 0) -> Fit:
    """Fit W0 ⊙ BA + L2 L1 to a target by alternating least squares.

        min |W0 ⊙ BA + L2 L1 - D|  in the Frobenius norm

    With lora_r = 0 it is a low-rank approximation of D / W0 with the weights W0². With A and L1 fixed, each row of B
    and L2 is a linear least squares problem of r + lora_r unknowns, and so is each column with B and L2 fixed: solving
    these in turns never makes the error larger. The problem is NP-hard, and what is found is a local optimum: the best
    of STARTS starts, the first from singular vectors and the others random. A start ends when a round makes the error
    smaller by less than TOLERANCE of it, or after ITERATIONS rounds.

    Args:
        W0: (out, in), in float64.
        target: D (out, in), in float64.
        r: the rank of BA.
        lora_r: the rank of L2 L1.
        seed: of the random starts.

    Source:
        Srebro and Jaakkola, Weighted low-rank approximations (ICML 2003), has the problem with weights.
    """
    generator = torch.Generator().manual_seed(seed)
    r, lora_r = (min(each, *W0.shape) for each in (r, lora_r))
    fits = []
    for start in range(STARTS):
        if start == 0:
            A, L1 = (torch.linalg.svd(each, full_matrices=False)[2] for each in (W0.sign() * target, target))
            rows = torch.cat([A[:r], L1[:lora_r]])
        else:
            rows = torch.randn(r + lora_r, target.shape[1], generator=generator, dtype=W0.dtype)
        fits.append(_alternate(W0, target, rows, r))
    errors = [relative_error(update, target) for update in fits]
    best = min(errors)
    return Fit(fits[errors.index(best)], best, max(errors) - best)


def relative_error(update: Tensor, target: Tensor) -> float:
    """Return |U - D| / |D| in the Frobenius norm."""
    return float((update - target).norm() / target.norm())


def _alternate(W0: Tensor, target: Tensor, right: Tensor, r: int) -> Tensor:
    """The update that alternating least squares reaches from the rows of A and L1."""
    before = float("inf")
    for _ in range(ITERATIONS):
        left = _left_factor(W0, target, _orthonormal(right, r), r).t()
        left = _orthonormal(left, r)
        right = _left_factor(W0.t(), target.t(), left, r).t()
        update = W0 * (left[:r].t() @ right[:r]) + left[r:].t() @ right[r:]
        error = relative_error(update, target)
        if error > (1 - TOLERANCE) * before or error < TOLERANCE:
            break
        before = error
    return update


def _orthonormal(rows: Tensor, r: int) -> Tensor:
    """Orthonormal rows that span what the first r rows and the others span; the other factor takes up the change."""
    return torch.cat([torch.linalg.qr(part.t()).Q.t() for part in (rows[:r], rows[r:])])


def _left_factor(W0: Tensor, target: Tensor, right: Tensor, r: int) -> Tensor:
    """The best B and L2, (out, r + lora_r), for the rows of A and L1, (r + lora_r, in)."""
    (out, width), rank = W0.shape, len(right)
    A, L1 = right[:r], right[r:]
    gram = torch.empty(out, rank, rank, dtype=W0.dtype)
    gram[:, :r, :r] = ((W0 * W0) @ (A[:, None] * A).view(-1, width).t()).view(out, r, r)
    gram[:, :r, r:] = (W0 @ (A[:, None] * L1).view(-1, width).t()).view(out, r, rank - r)
    gram[:, r:, :r] = gram[:, :r, r:].mT
    gram[:, r:, r:] = L1 @ L1.t()
    # a row of zeros in W0 has nothing to solve for
    gram.diagonal(dim1=1, dim2=2).mul_(1 + 1e-12).add_(1e-100)
    return torch.linalg.solve(gram, torch.cat([(W0 * target) @ A.t(), target @ L1.t()], 1))
