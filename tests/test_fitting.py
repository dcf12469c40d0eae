"""The fits of experiments/fitting.py: exact where an exact answer is known, and stationary where none is."""

from __future__ import annotations

import pytest
import torch
from experiments.fitting import fit_hira, fit_lora

OUT, IN = 24, 16


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def W0() -> torch.Tensor:
    return random(OUT, IN, seed=1)


def low_rank(r: int, seed: int) -> torch.Tensor:
    return random(OUT, r, seed=seed) @ random(r, IN, seed=seed + 1)


def test_lora_leaves_the_smaller_singular_values():
    target = random(OUT, IN)
    values = torch.linalg.svdvals(target)
    fit = fit_lora(target, 5)
    assert torch.linalg.matrix_rank(fit.update) == 5
    assert fit.error == pytest.approx(float(values[5:].norm() / values.norm()))


@pytest.mark.parametrize(("r", "lora_r"), [(5, 0), (0, 5)])
def test_what_is_lora_has_lora_s_optimum(W0, r, lora_r):
    """With ones in the place of W0, and where all of the rank is LoRA's, the global optimum is known."""
    target = random(OUT, IN)
    fit = fit_hira(torch.ones_like(W0) if r else W0, target, r, lora_r)
    assert fit.error == pytest.approx(fit_lora(target, 5).error, rel=1e-3)
    assert fit.spread < 1e-3


@pytest.mark.parametrize(("r", "lora_r"), [(3, 0), (3, 2)])
def test_an_update_that_can_be_represented_is_found(W0, r, lora_r):
    target = W0 * low_rank(r, 2) + (low_rank(lora_r, 4) if lora_r else 0)
    assert fit_hira(W0, target, r, lora_r).error < 1e-3


def test_rescaled_rows_and_columns_are_of_rank_two(W0):
    rows, columns = 1 + 0.1 * random(OUT, 1), 1 + 0.1 * random(1, IN)
    target = rows * W0 * columns - W0
    assert fit_hira(W0, target, 2).error < 1e-4
    assert fit_hira(W0, target, 4).error < 1e-4  # factors that are of lower rank than r
    assert fit_lora(target, 2).error > 0.3


def test_a_fit_is_stationary(W0):
    """No small step of the factors makes it better: the gradient is zero, up to the tolerance."""
    target = random(OUT, IN)
    update = fit_hira(W0, target, 3).update
    left, values, right = torch.linalg.svd(update / W0)
    B, A = ((left[:, :3] * values[:3]).requires_grad_(), right[:3].clone().requires_grad_())
    loss = (W0 * (B @ A) - target).square().sum() / target.square().sum()
    B_gradient, A_gradient = torch.autograd.grad(loss, (B, A))
    assert (B_gradient * B).norm().item() + (A_gradient * A).norm().item() < 0.01


def test_a_row_of_zeros_changes_nothing_else(W0):
    target = random(OUT, IN)
    W0[0] = 0
    fit = fit_hira(W0, target, 3)
    assert (fit.update[0] == 0).all()
    assert 0 < fit.error < 1


def test_a_rank_above_the_weight_s_fits_everything(W0):
    assert fit_hira(W0, random(OUT, IN), 2 * OUT).error < 1e-4
