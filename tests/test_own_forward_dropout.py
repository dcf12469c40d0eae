"""Dropout on base layers whose forward is not the plain one of their type."""

from __future__ import annotations

import peft
import pytest
import torch
import torch.nn.functional as F
from own_forwards import CASES, adapted, assert_alike, modulated, with_weight
from peft import LoraConfig, PeftMixedModel
from torch import nn

import hira
from hira import HiraConfig
from hira.layers.dispatch import dispatch

OF_PLAIN_LAYERS = ["hooks", "hooks on a convolution", "hooks on an embedding"]


@pytest.mark.parametrize("name", [name for name in CASES if name not in OF_PLAIN_LAYERS])
def test_dropout_is_on_the_input_of_what_the_adapter_changes(name):
    case = CASES[name]
    layer, x = adapted(case, hira_dropout=0.5), case.x()
    W0, W = layer.get_base_layer().weight, modulated(layer)
    torch.manual_seed(1)
    y = layer(x, **case.kwargs)
    torch.manual_seed(1)
    base = with_weight(layer, W0, x, **case.kwargs)
    if case.layer is hira.Embedding:
        keep = F.dropout(torch.ones(base.shape[:-1]), 0.5).unsqueeze(-1)
        wanted = base + keep * (with_weight(layer, W, x, **case.kwargs) - base)
    else:
        dropped = F.dropout(x, 0.5)
        wanted = base + with_weight(layer, W, dropped) - with_weight(layer, W0, dropped)
    assert_alike(layer, x, y, wanted)
    layer.eval()
    assert_alike(layer, x, layer(x, **case.kwargs), with_weight(layer, modulated(layer), x, **case.kwargs))


@pytest.mark.parametrize("name", OF_PLAIN_LAYERS)
def test_under_dropout_hooks_are_around_the_sum(name, monkeypatch):
    """Of a plain layer: hooks get what the layer gets, and what it gives with the update of a dropped input."""
    case = CASES[name]
    layer, x = adapted(case, hira_dropout=0.5), case.x()
    base = layer.get_base_layer()
    W0, change = base.weight, modulated(layer) - base.weight

    def product(self, x):
        if isinstance(self, nn.Embedding):
            keep = F.dropout(torch.ones(x.shape), 0.5).unsqueeze(-1)
            return F.embedding(x, W0, self.padding_idx) + keep * F.embedding(x, change, self.padding_idx)
        dropped = F.dropout(x, 0.5)
        if isinstance(self, nn.Linear):
            return F.linear(x, W0, self.bias) + F.linear(dropped, change)
        return self._conv_forward(x, W0, self.bias) + self._conv_forward(dropped, change, None)

    torch.manual_seed(1)
    y = layer(x)
    monkeypatch.setattr(type(base), "forward", product)
    torch.manual_seed(1)
    assert_alike(layer, x, y, base(x))


class Noisy(nn.Linear):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5)


class NoisyEmbedding(nn.Embedding):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5)


@pytest.mark.parametrize("base", [Noisy(6, 5), NoisyEmbedding(7, 5)], ids=["linear", "embedding"])
def test_dropout_of_an_adapter_that_does_nothing_changes_no_random_forward(base):
    layer = dispatch(base, "default", hira.HiraConfig(r=2, hira_dropout=0.5)).train()
    x = torch.randint(7, (3, 4)) if isinstance(base, nn.Embedding) else torch.randn(3, 6)
    for seed in range(3):
        torch.manual_seed(seed)
        expected = base(x)
        torch.manual_seed(seed)
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("order", [("lora", "hira"), ("hira", "lora")], ids=" inside ".join)
def test_under_dropout_another_tuner_draws_once_and_hooks_run_once(order):
    model = nn.Sequential(nn.Linear(6, 5))
    configs = {
        "lora": LoraConfig(r=2, target_modules=["0"], lora_dropout=0.5, init_lora_weights=False),
        "hira": HiraConfig(r=2, target_modules=["0"], hira_dropout=0.5),
    }
    mixed = PeftMixedModel(model, configs[order[0]], adapter_name=order[0])
    mixed.add_adapter(order[1], configs[order[1]])
    mixed.set_adapter(["lora", "hira"])
    x, calls = torch.randn(40, 6), []
    layer = model[0].train()
    base = layer.get_base_layer()
    base.register_forward_hook(lambda *_: calls.append(1))
    change = layer(x) - base(x)
    assert calls == [1, 1]
    lora = next(module for module in layer.modules() if isinstance(module, peft.tuners.lora.LoraLayer))
    update = lora.lora_B["lora"].weight @ lora.lora_A["lora"].weight * lora.scaling["lora"]
    # in each row the change is the update of some of x's entries, doubled
    kept = torch.linalg.lstsq(update, change.mT).solution
    assert float((update @ kept - change.mT).norm()) < 1e-4
    assert 0.2 < float(change.norm() / (2 * x @ update.T).norm()) < 1.2
