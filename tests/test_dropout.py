"""Dropout: on the input of the update, as PyTorch draws it, for each adapter its own."""

from __future__ import annotations

import math

import pytest
import torch
from layer_kinds import (
    IDS,
    KINDS,
    adapted,
    assert_alike,
    config,
    every_kind,
    expected,
    random_input,
    update,
    with_weight,
)
from torch import Tensor, nn


@pytest.mark.parametrize("kind", ["linear", "Conv1D", "convolution"])
def test_dropout_is_on_the_input_of_the_update(kind, monkeypatch):
    layer = adapted(kind, hira_dropout=0.5)
    x = random_input(kind)
    mask = 2 * (torch.rand(x.shape) < 0.5).double()
    monkeypatch.setattr(layer.hira_dropout["default"], "forward", lambda x: x * mask)
    base = with_weight(layer, layer.get_base_layer().weight, x)
    assert_alike(layer, layer(x), base + update(layer, x * mask), x)
    layer.eval()
    assert_alike(layer, layer(x), expected(layer, x), x)


def test_dropout_of_an_embedding_drops_whole_tokens(monkeypatch):
    layer = adapted("embedding", hira_dropout=0.5)
    mask = torch.tensor([[2.0, 0, 2, 0], [0, 2, 2, 0]]).double()

    def forward(ones: Tensor) -> Tensor:
        assert torch.equal(ones, torch.ones(IDS.shape))
        return ones * mask

    monkeypatch.setattr(layer.hira_dropout["default"], "forward", forward)
    base = with_weight(layer, layer.get_base_layer().weight, IDS)
    assert_alike(layer, layer(IDS), base + mask.unsqueeze(-1) * update(layer, IDS))
    layer.eval()
    assert_alike(layer, layer(IDS), expected(layer, IDS))


@every_kind
def test_dropout_as_torch_draws_it(kind):
    """In the mean over many draws the output is that without dropout; the base's part is never dropped."""
    layer = adapted(kind, hira_dropout=0.4)
    x = KINDS[kind][2]()
    with torch.no_grad():
        base, full = with_weight(layer, layer.get_base_layer().weight, x), expected(layer, x)
        draws = torch.stack([layer(x) for _ in range(2000)])
    assert not torch.equal(draws[0], draws[1])
    # six standard errors
    assert ((draws.mean(0) - full).abs() <= 6 * draws.std(0) / math.sqrt(len(draws)) + 1e-12).all()
    if kind == "embedding":  # each token has its whole update or none
        kept = base + (full - base) / 0.6
        whole = (draws - kept).abs().amax(-1) < 1e-6  # the mask, divided by 1 - p, is in float32
        none = (draws - base).abs().amax(-1) < 1e-12
        assert (whole ^ none).all()
        assert abs(whole.double().mean() - 0.6) < 0.05


def test_dropout_of_some_of_several_adapters(monkeypatch):
    layer = adapted(hira_dropout=0.0)
    for name in ("b", "c"):
        layer.update_layer(name, 2, config(2, hira_dropout=0.5))
    layer.update_layer("d", 1, config(1))
    layer.set_adapter(["default", "b", "c", "d"])
    layer.double()
    x = random_input("linear")
    for name, factor in (("b", 3), ("c", 5)):
        monkeypatch.setattr(layer.hira_dropout[name], "forward", lambda x, factor=factor: factor * x)
    wanted = expected(layer, x, "default", "d") + 3 * update(layer, x, "b") + 5 * update(layer, x, "c")
    assert_alike(layer, layer(x), wanted, x)


def test_dropout_of_zero_makes_no_module():
    layer = adapted(hira_dropout=0.0)
    assert type(layer.hira_dropout["default"]) is nn.Identity
    layer.update_layer("other", 2, config(2, hira_dropout=0.25))
    assert layer.hira_dropout["other"].p == 0.25
