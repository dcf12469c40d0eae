"""The measures of adapters in a model: against those of `inspect`, on every kind of layer."""

from __future__ import annotations

import math

import bitsandbytes as bnb
import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.pytorch_utils import Conv1D

from hira import HiraConfig
from hira.files.inspect.inspect_adapter import inspect_layer
from hira.training import measures
from hira.training.measures import measure
from hira.tuner.model import hira_layers


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.transposed = nn.Linear(24, 40), Conv1D(30, 24)
        self.embedding, self.convolution = nn.Embedding(300, 20), nn.Conv2d(6, 8, 3)
        self.attention = nn.MultiheadAttention(16, 2)
        self.packed = bnb.nn.Linear4bit(64, 48, compute_dtype=torch.float32)


TARGETS = ["linear", "transposed", "embedding", "convolution", "attention", "packed"]
KINDS = {"embedding": "embedding", "convolution": "convolution"}


def adapted(model: nn.Module, **options) -> nn.Module:
    torch.manual_seed(0)
    model = get_peft_model(model, HiraConfig(**{"r": 3, "init_weights": False, **options}))
    for layer in hira_layers(model):
        for factors in layer._factor_dicts:
            for factor in factors.values():
                factor.data.mul_(0.05)
    return model


@pytest.fixture(scope="module")
def layers():
    torch.manual_seed(0)
    base = Layers()
    base.packed = base.packed.to("cpu")  # which quantises
    return {layer.name: layer for layer in hira_layers(adapted(base, target_modules=TARGETS))}


def test_every_kind_of_layer_is_measured_as_inspect_measures_it(layers):
    assert set(layers) == {*TARGETS, "attention.out_proj"}
    for name, layer in layers.items():
        found = measure(layer, ["default"])
        A, B = layer._scaled("default")
        W0 = layer.storage.read()
        report = inspect_layer(W0, A.detach(), B.detach(), KINDS.get(name, "matrix"), spectra=False)
        assert found.relative_norm == pytest.approx(report.relative_norm, rel=1e-4), name
        assert found.effective_rank == pytest.approx(report.delta.effective_rank, rel=1e-6), name
        U = layer.get_additive_delta("default").float()
        W0 = layer._stored_orientation(W0).float()
        same = ((W0 + U).bfloat16() == W0.bfloat16()).float().mean().item()
        assert 0 < same < 1
        assert found.below_bfloat16 == pytest.approx(same, abs=1e-3), name


def test_experts():
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, num_local_experts=3)
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    model = adapted(MixtralForCausalLM(config), target_modules=[], target_parameters=parameters)
    found = {layer.parameter_name: layer for layer in hira_layers(model)}
    assert set(found) == {"gate_up_proj", "down_proj"}
    for layer in found.values():
        U, W0 = layer.get_additive_delta("default"), layer.storage.read()
        got = measure(layer, ["default"])
        assert got.relative_norm == pytest.approx((U.norm() / W0.norm()).item(), rel=1e-4)
        assert 1 < got.effective_rank <= 3


def test_several_adapters_count_as_one():
    model = adapted(nn.Sequential(nn.Linear(24, 40)), target_modules=["0"])
    model.add_adapter("other", HiraConfig(r=2, target_modules=["0"], init_weights=False))
    (layer,) = hira_layers(model)
    both = measure(layer, ["default", "other"])
    U = layer.get_additive_delta("default") + layer.get_additive_delta("other")
    assert both.relative_norm == pytest.approx((U.norm() / layer.storage.read().norm()).item(), rel=1e-4)
    assert measure(layer, ["default"]).relative_norm != both.relative_norm


def test_the_start_has_moved_nothing():
    model = adapted(nn.Sequential(nn.Linear(24, 40)), target_modules=["0"], init_weights=True)
    assert measure(hira_layers(model)[0], ["default"]) == (0.0, 0.0, 1.0)


def test_the_rows_of_a_large_weight_are_a_sample(monkeypatch):
    """Its error is what the rows' spread and their number give; the effective rank is exact."""
    model = adapted(nn.Sequential(nn.Linear(64, 512)), target_modules=["0"])
    (layer,) = hira_layers(model)
    whole = measure(layer, ["default"])
    monkeypatch.setattr(measures, "ENTRIES", 64 * 128)
    part = measure(layer, ["default"])
    assert part == measure(layer, ["default"]) != whole
    assert part.effective_rank == whole.effective_rank
    squares = layer.get_additive_delta("default").detach().square().sum(1)
    error = 0.5 * float(squares.std() / squares.mean()) / math.sqrt(128)
    assert part.relative_norm == pytest.approx(whole.relative_norm, rel=4 * error)


def test_an_embedding_is_sampled_over_all_its_tokens(monkeypatch):
    """One token out of many has moved: rows of tokens would most likely miss it."""
    model = adapted(nn.Sequential(nn.Embedding(5000, 96)), target_modules=["0"])
    (layer,) = hira_layers(model)
    layer.hira_embedding_A["default"].data[:, 1:] = 0
    monkeypatch.setattr(measures, "ENTRIES", 1)
    assert measure(layer, ["default"]).relative_norm > 0
