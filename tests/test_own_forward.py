"""Base layers whose forward is not the plain one of their type: their own call, with W' in the place of W0."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
from own_forwards import (
    CASES,
    EXACT,
    Cosine,
    Remembering,
    adapted,
    assert_alike,
    config,
    every_case,
    ids,
    modulated,
    output_hooked,
    vectors,
    with_weight,
)
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

import hira


@every_case
def test_it_is_the_base_layers_own_call_with_w(case):
    layer, x = adapted(case), case.x()
    wanted = with_weight(layer, modulated(layer), x, **case.kwargs)
    assert not torch.allclose(wanted, layer.get_base_layer()(x, **case.kwargs))
    assert_alike(layer, x, layer(x, **case.kwargs), wanted)


@every_case
def test_merging_changes_nothing(case):
    layer, x = adapted(case).eval(), case.x()
    base = layer.get_base_layer()(x, **case.kwargs)
    y = layer(x, **case.kwargs)
    layer.merge()
    torch.testing.assert_close(layer(x, **case.kwargs), y, **EXACT)
    layer.unmerge()
    assert torch.equal(layer(x, **case.kwargs), y)
    layer.enable_adapters(False)
    assert torch.equal(layer(x, **case.kwargs), base)


@every_case
def test_several_adapters(case):
    layer, x = adapted(case), case.x()
    layer.update_layer("other", 2, config(2))
    layer.double().set_adapter(["default", "other"])
    W = modulated(layer, "default", "other")
    assert_alike(layer, x, layer(x, **case.kwargs), with_weight(layer, W, x, **case.kwargs))
    W = modulated(layer, "default", "other")
    layer.merge(adapter_names=["other"])
    assert_alike(layer, x, layer(x, **case.kwargs), with_weight(layer, W, x, **case.kwargs))


def test_a_lora_layer_inside():
    lora_config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    lora = peft.get_peft_model(nn.Sequential(Cosine(7, 5)), lora_config).base_model.model[0].double()
    layer, x = hira.Linear(lora, "default", config()).double(), vectors()
    wanted = with_weight(layer, modulated(layer), x) + lora.lora_B["default"](lora.lora_A["default"](x)) * 4
    assert_alike(layer, x, layer(x), wanted)


@pytest.mark.parametrize("kind", ["weight_norm", "parametrized weight_norm", "spectral_norm"])
def test_a_weight_that_is_computed_anew(kind):
    """By a hook before the forward, or whenever it is read; the layer's output is changed by another hook."""
    norm = {
        "weight_norm": nn.utils.weight_norm,
        "parametrized weight_norm": nn.utils.parametrizations.weight_norm,
        "spectral_norm": nn.utils.spectral_norm,
    }[kind]
    with pytest.warns(FutureWarning) if kind == "weight_norm" else pytest.MonkeyPatch.context():
        base = output_hooked(norm(nn.Linear(7, 5)))
    layer, x = hira.Linear(base, "default", config()).double().eval(), vectors()
    plain = base(x)
    wanted = 3 * F.linear(x, modulated(layer), base.bias).tanh()
    assert_alike(layer, x, layer(x), wanted)
    assert type(base).__name__ == type(layer.get_base_layer()).__name__
    assert torch.equal(base(x), plain)


@pytest.mark.parametrize("case", ["cosine head", "hooks", "weight standardisation", "a scaled embedding"])
def test_compiled_as_one_graph(case):
    torch._dynamo.reset()  # the limit of recompilations counts those of other tests
    layer, x = adapted(CASES[case]), CASES[case].x()
    y = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    assert_alike(layer, x, y, layer(x))
    assert "weight" not in layer.get_base_layer().__dict__


class Offloaded(nn.Module):
    """Layers with forwards of their own, and one whose weight is read."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = Gemma3TextScaledWordEmbedding(9, 7, 0, 7.0), Cosine(7, 5)
        self.read, self.last = nn.Linear(7, 5), Remembering(5, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return self.last(self.head(x) + F.linear(x, self.read.weight))


def test_offloaded_weights():
    accelerate = pytest.importorskip("accelerate")
    base = Offloaded().double()
    targets = ["table", "head", "read", "last"]
    in_memory = peft.get_peft_model(copy.deepcopy(base), config(target_modules=targets)).double()
    offloaded = peft.get_peft_model(accelerate.cpu_offload(base, torch.device("cpu")), config(target_modules=targets))
    factors = {name: p for name, p in in_memory.named_parameters() if "hira_" in name}
    for name, parameter in offloaded.named_parameters():
        if name in factors:
            parameter.data = factors[name].detach().clone()
    outputs = offloaded(ids()), in_memory(ids())
    torch.testing.assert_close(*outputs, **EXACT)
    for y in outputs:
        y.square().sum().backward()
    for name, parameter in offloaded.named_parameters():
        if name in factors:
            torch.testing.assert_close(parameter.grad, factors[name].grad, **EXACT)
        else:
            assert parameter.is_meta
    assert offloaded.base_model.model.last.get_base_layer().calls == 1
