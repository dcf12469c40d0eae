"""The base layer's own call: its forward, its hooks, its arguments, and another tuner's layer in its place."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from layer_kinds import EXACT, adapted, assert_alike, delta, expected, gradients, linear_input, random_input
from peft import get_peft_model
from torch import Tensor, nn


class Doubling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Asking(nn.Linear):
    def forward(self, x: Tensor, scale: float = 1.0, *, shift: float = 0.0) -> Tensor:
        return super().forward(x) * scale + shift


def spy(layer: Any, monkeypatch) -> list[str]:
    """Notes which of the two forms run."""
    ran = []
    for name in ("_product", "_update"):
        method = getattr(layer, name)
        monkeypatch.setattr(layer, name, lambda *args, m=method, n=name: (ran.append(n), m(*args))[1])
    return ran


def test_a_plain_layer_costs_one_product(monkeypatch):
    layer = adapted()
    ran = spy(layer, monkeypatch)
    layer(linear_input())
    assert ran == ["_product"]


def test_a_forward_of_its_own(monkeypatch):
    layer = adapted(base=Doubling(7, 5))
    ran, x = spy(layer, monkeypatch), random_input("linear")
    wanted = 2 * F.linear(x, layer.weight * (1 + delta(layer)), layer.bias)
    assert_alike(layer, layer(x), wanted, x)
    assert ran == []


def test_a_forward_set_on_the_layer(monkeypatch):
    layer = adapted()
    base, x = layer.get_base_layer(), random_input("linear")
    plain, wanted = base.forward, 1 + expected(layer, x)
    base.forward = lambda x: plain(x) + 1
    ran = spy(layer, monkeypatch)
    assert_alike(layer, layer(x), wanted, x)
    assert ran == []


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("kind", ["linear", "embedding", "convolution"])
def test_hooks_on_the_base_layer_run(kind, monkeypatch):
    layer = adapted(kind)
    base, x = layer.get_base_layer(), random_input(kind)
    plain = layer(x)
    ran = spy(layer, monkeypatch)
    seen = []
    handles = [
        base.register_forward_hook(lambda module, args, y: seen.append("forward") or 3 * y),
        base.register_forward_pre_hook(lambda module, args: seen.append("before")),
        base.register_full_backward_hook(lambda module, *_: seen.append("backward")),
    ]
    y = layer(x)
    y.sum().backward()
    assert seen == ["before", "forward", "backward"]
    torch.testing.assert_close(y, 3 * plain, **EXACT)
    assert ran == []
    for handle in handles:
        handle.remove()
    assert_alike(layer, layer(x), plain, x if x.requires_grad else None)
    assert ran == ["_product"]


def test_arguments_reach_the_base_layer():
    layer = adapted(base=Asking(7, 5))
    x = linear_input()
    y = F.linear(x, layer.weight * (1 + delta(layer)), layer.bias)
    torch.testing.assert_close(layer(x), y, **EXACT)
    torch.testing.assert_close(layer(x, 2.0, shift=1.0), 2 * y + 1, **EXACT)
    torch.testing.assert_close(layer(x, scale=3.0), 3 * y, **EXACT)
    with pytest.raises(TypeError):  # as the base layer says, instead of leaving them out
        adapted()(x, 2.0)


@pytest.mark.parametrize("merge_inner", [False, True])
def test_a_lora_layer_inside(merge_inner):
    body = nn.Sequential(nn.Linear(7, 5))
    lora_config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    lora = get_peft_model(body, lora_config).base_model.model[0].double()
    layer = adapted(base=lora)
    x = random_input("linear")
    W0 = layer.get_base_layer().weight.detach().clone()
    inner = F.linear(x, W0 + lora.get_delta_weight("default"), lora.get_base_layer().bias)
    wanted = inner + F.linear(x, W0 * delta(layer))
    torch.testing.assert_close(layer(x), wanted, **EXACT)
    if merge_inner:
        lora.merge()
        torch.testing.assert_close(lora(x), inner, **EXACT)
    else:
        assert all(g is not None for g in gradients(layer(x), [p for p in layer.parameters() if p.requires_grad]))
