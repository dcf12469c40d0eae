"""check_learning_rate warns where HiRA would hardly move, and nowhere else."""

from __future__ import annotations

import warnings

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import get_scheduler

import hira
from hira import HiraConfig


def adapted(config=None, rms: float = 0.05) -> nn.Module:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(32, 48), nn.Embedding(9, 4))
    nn.init.normal_(base[0].weight, std=rms)
    return get_peft_model(base, config or HiraConfig(r=8, target_modules=["0"]))


def adam(model: nn.Module, rate: float, kind=torch.optim.AdamW):
    return kind([p for p in model.parameters() if p.requires_grad], lr=rate)


def warned(model: nn.Module, optimizer, steps: int = 1000) -> str:
    """The warning; empty without one."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hira.check_learning_rate(model, optimizer, steps)
    return " ".join(str(each.message) for each in caught)


def test_it_says_what_would_fit():
    model = adapted()
    text = warned(model, adam(model, 1e-4))
    times = 2 / model.base_model.model[0].get_base_layer().weight.square().mean().sqrt().item()
    for part in ("0.0001", "1000 steps", f"{times:.0f} times", "hira_alpha=16", "0.001"):
        assert part in text


@pytest.mark.parametrize(
    ("config", "rate", "steps"),
    [
        pytest.param(HiraConfig(r=8, hira_alpha=16, target_modules=["0"]), 1e-4, 1000, id="hira_alpha"),
        pytest.param(HiraConfig(r=8, target_modules=["0"]), 4.5e-3, 5000, id="the rate of PEFT's MetaMathQA run"),
        pytest.param(HiraConfig(r=8, target_modules=["0"]), 1e-4, 16_000, id="a low rate, and time for it"),
        pytest.param(HiraConfig(r=8, target_modules=["0"]), 1e-2, 120, id="more than the study's bound"),
        pytest.param(HiraConfig(r=8, target_modules=["1"]), 1e-4, 1000, id="an embedding"),
        pytest.param(LoraConfig(r=8, target_modules=["0"]), 1e-4, 1000, id="LoRA"),
    ],
)
def test_it_is_silent(config, rate, steps):
    model = adapted(config)
    assert warned(model, adam(model, rate), steps) == ""


def test_it_is_silent_where_the_numbers_say_nothing():
    model = adapted()
    assert warned(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)) == ""
    assert warned(model, torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1e-4)) == ""  # has none of the B
    large = adapted(rms=1.0)
    assert warned(large, adam(large, 1e-4)) == ""
    zero = adapted(rms=0.0)
    assert warned(zero, adam(zero, 1e-4)) == ""
    trained = adapted()
    trained.base_model.model[0].hira_B["default"].data.fill_(1e-3)
    assert warned(trained, adam(trained, 1e-4)) == ""


def test_the_peak_of_a_schedule_counts_in_a_wrapped_optimizer():
    for rate, said in ((1e-4, True), (1e-2, False)):
        model = adapted()
        optimizer = adam(model, rate)
        get_scheduler("cosine", optimizer, num_warmup_steps=10, num_training_steps=1000)
        assert optimizer.param_groups[0]["lr"] == 0
        assert bool(warned(model, Accelerator(cpu=True).prepare(optimizer))) is said


def test_a_rate_of_its_own_for_b_counts():
    model = adapted()
    A, B = (getattr(model.base_model.model[0], name)["default"] for name in ("hira_A", "hira_B"))
    assert warned(model, torch.optim.Adam([{"params": [A]}, {"params": [B], "lr": 1e-2}], lr=1e-4)) == ""
