"""Real architectures, tiny and with random weights: adapted, trained, saved, loaded and merged."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
from architectures import CASES, Case, adapted, factors, layers, logits, make, train
from torch import Tensor, nn


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


def test_the_case_covers_what_it_is_for(case):
    found = {type(layer.get_base_layer()) for layer in layers(adapted(case, make(case)))}
    assert {next(kind for kind in case.bases if issubclass(base, kind)) for base in found} == case.bases


def test_depthwise_convolutions_are_among_them():
    for name in ("mobilenet", "convnext", "mamba"):
        groups = [
            getattr(layer.get_base_layer(), "groups", 1) for layer in layers(adapted(CASES[name], make(CASES[name])))
        ]
        assert max(groups) > 1, name


def test_a_depthwise_weight_that_the_model_reads_itself():
    """As the fast paths of short convolutions do: the layer is never called, and its weight is W'."""

    class ShortConvolution(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(4, 4, 3, groups=4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return F.conv1d(x, self.conv.weight, groups=4)

    model = peft.get_peft_model(ShortConvolution(), peft.HiraConfig(r=2, target_modules=["conv"], init_weights=False))
    layer, x = model.base_model.model.conv, torch.randn(2, 4, 9)
    W = layer.base_layer.weight * (1 + layer.get_delta_weight("default"))
    y = model(x)
    torch.testing.assert_close(y, F.conv1d(x, W, groups=4))
    y.sum().backward()
    assert layer.hira_A["default"].grad.abs().min() > 0
    with model.disable_adapter():
        assert torch.equal(model(x), F.conv1d(x, layer.base_layer.weight, groups=4))
    assert torch.equal(model.merge_and_unload()(x), y)


def test_train_save_load_and_merge(case, tmp_path):
    inputs = case.inputs()
    base = make(case)
    before, untouched = logits(base, inputs), copy.deepcopy(base)
    model = adapted(case, base).eval()
    torch.testing.assert_close(logits(model, inputs), before)
    start, frozen = factors(model), {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}

    losses = train(model, inputs)
    assert losses[-1] < losses[0]
    assert [name for name, value in factors(model).items() if torch.equal(value, start[name])] == []
    assert [name for name, value in frozen.items() if not torch.equal(model.get_parameter(name), value)] == []

    trained = logits(model, inputs)
    assert not torch.allclose(trained, before, rtol=1e-3, atol=1e-3)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(untouched), tmp_path)
    assert torch.equal(logits(loaded, inputs), trained)

    # rounding to one part in 2^24, some hundred roundings deep
    scale = trained.abs().max().item()
    model.merge_adapter()
    torch.testing.assert_close(logits(model, inputs), trained, rtol=0, atol=100 * 2**-24 * scale)
    model.unmerge_adapter()
    assert torch.equal(logits(model, inputs), trained)
    merged = model.merge_and_unload(safe_merge=True)
    assert [type(module) for module in merged.modules()] == [type(module) for module in untouched.modules()]
    torch.testing.assert_close(logits(merged, inputs), trained, rtol=0, atol=100 * 2**-24 * scale)


def test_against_dense_weights(case):
    """Random adapters: the model computes what it would with W0 * (1 + BA) written into its weights, in float64."""
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in case.inputs().items()}
    model = adapted(case, make(case).double(), init_weights=False).eval()
    model.double()
    dense = make(case).double()
    for layer in layers(model):
        weight = dense.get_submodule(layer.name).weight
        dense.get_submodule(layer.name).weight = nn.Parameter(weight * (1 + layer.get_delta_weight("default")))
    found, expected = logits(model, inputs), logits(dense, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert not torch.allclose(found, logits(make(case).double(), inputs), rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", "t5", "gpt2", "whisper", "mamba"])
def test_generate_with_a_cache(name):
    case = CASES[name]
    model = adapted(case, make(case), init_weights=False).eval()
    first = {key: value for key, value in case.inputs().items() if key != "labels"}
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    cached = model.generate(**first, **options, use_cache=True)
    assert torch.equal(model.generate(**first, **options, use_cache=False), cached)
    assert torch.equal(model.merge_and_unload().generate(**first, **options), cached)
