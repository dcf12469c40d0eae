"""What HiRA layers of all kinds share: dropout, several adapters, other forwards, copies, autocast, checkpointing."""

from __future__ import annotations

import copy
import io
import math
import pickle
import sys

import pytest
import torch
from layer_kinds import (
    EXACT,
    KINDS,
    adapted,
    assert_alike,
    config,
    delta,
    every_kind,
    expected,
    gradients,
    linear_input,
    update,
    with_weight,
)
from oracle import error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hira import HiraError


@pytest.mark.parametrize("form", ["one product", "two products", "dropout"])
@pytest.mark.parametrize("kind", ["linear", "convolution", "embedding"])
def test_autocast(kind, form):
    """Outputs in autocast's dtype, as near to the exact ones as the plain expression's."""
    layer = adapted(kind, hira_dropout=0.5 if form == "dropout" else 0.0).float()
    layer.get_base_layer().requires_grad_(False)
    x = KINDS[kind][2]()
    exact = expected(copy.deepcopy(layer).double(), x).detach()
    x = x.float() if x.is_floating_point() else x
    if form == "two products":
        layer.get_base_layer().register_forward_hook(lambda module, args, y: None)
    if form == "dropout":
        layer.hira_dropout["default"].forward = lambda x: x
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        if form == "one product":
            usual = expected(layer, x)
        else:
            usual = with_weight(layer, layer.get_base_layer().weight, x) + update(layer, x)
    assert y.dtype == usual.dtype
    assert error(y.detach(), exact) <= 2 * error(usual.detach(), exact) + 1e-6
    trained = layer.parameters_of("default")
    for found, wanted in zip(gradients(y, trained), gradients(usual, trained), strict=True):
        assert found.dtype == torch.float32
        # each is off the exact one by a few bfloat16 roundings
        assert error(found, wanted) < 2**-6


@pytest.mark.parametrize("reentrant", [True, False])
@every_kind
def test_gradient_checkpointing(kind, reentrant):
    layer = adapted(kind, hira_dropout=0.5)
    x = KINDS[kind][2]()
    outer = torch.ones((), dtype=torch.float64, requires_grad=True)
    x = x * outer if x.is_floating_point() else x

    def run(x: Tensor, one: Tensor) -> Tensor:
        return layer(x) * one

    results = []
    for checkpointed in (False, True):
        torch.manual_seed(5)
        y = checkpoint(run, x, outer, use_reentrant=reentrant) if checkpointed else run(x, outer)
        layer.zero_grad()
        outer.grad = None
        y.square().sum().backward(retain_graph=True)
        results.append([y.detach(), outer.grad, *(p.grad for p in layer.parameters())])
    assert len(results[0]) >= 5
    for plain, again in zip(*results, strict=True):
        torch.testing.assert_close(plain, again, **EXACT)


@pytest.mark.parametrize("merged", [False, True])
@every_kind
def test_copies(kind, merged):
    layer = adapted(kind, hira_dropout=0.25)
    layer.update_layer("other", 2, config(2))
    layer.double().eval().set_adapter(["default", "other"])
    layer.name = "blocks.0"
    x = KINDS[kind][2]()
    if merged:
        layer.merge()
    y = layer(x)
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(stream, weights_only=False)]
    for copied in copies:
        assert type(copied) is type(layer)
        assert torch.equal(copied(x), y)
        assert (copied.r, copied.active_adapters, copied.name) == (layer.r, layer.active_adapters, "blocks.0")
        assert copied.merged_adapters == layer.merged_adapters
        if merged:
            copied.unmerge()
        with torch.no_grad():
            copied.get_base_layer().weight.zero_()
            for parameter in copied.parameters():
                parameter.zero_()
        assert torch.equal(layer(x), y)
    if merged:
        layer.unmerge()
        torch.testing.assert_close(layer(x), y, **EXACT)


def test_a_merged_copy_unmerges_to_its_own_base():
    layer = adapted()
    W0 = layer.get_base_layer().weight
    layer.merge()
    copied = copy.deepcopy(layer)
    copied.unmerge()
    assert torch.equal(copied.get_base_layer().weight, W0)
    assert copied.get_base_layer().weight is not W0
    assert layer.merged


def test_attributes_of_the_base_layer():
    base = nn.Linear(7, 5)
    base.tensor_parallel = ["colwise"]
    layer = adapted(base=base)
    assert layer.tensor_parallel is base.tensor_parallel
    assert layer.bias is base.bias
    assert layer.weight is base.weight
    base.later = 3
    assert layer.later == 3
    with pytest.raises(AttributeError, match="'absent'"):
        layer.absent  # noqa: B018
    base._private = 1
    assert not hasattr(layer, "_private")
    assert repr(layer).startswith("hira.Linear(\n")
    assert not layer.supports_lora_conversion()


@pytest.mark.parametrize("name", ["weight", "storage"])
def test_an_error_in_a_property_surfaces(name, monkeypatch):
    """PyTorch asks `__getattr__` where a property raises an AttributeError, and the base layer has a weight too."""
    layer = adapted()
    layer.weight_is_read = True
    layer.get_base_layer().storage = "of the base layer"
    fault = "_factors" if name == "weight" else "_storage_of"
    monkeypatch.setattr(layer, fault, lambda *_: None.absent)
    if name == "storage":
        del layer._storage  # which is made once
    with pytest.raises(AttributeError, match=r"'NoneType'.* 'absent'"):
        getattr(layer, name)


def test_the_weight_is_read_where_the_model_reads_it():
    layer = adapted()
    assert torch.equal(layer.weight, layer.get_base_layer().weight)
    layer.weight_is_read = True
    wanted = layer.get_base_layer().weight * (1 + delta(layer))
    assert_alike(layer, layer.weight, wanted)
    transposed = adapted("Conv1D")
    transposed.weight_is_read = True
    assert_alike(transposed, transposed.weight, transposed.get_base_layer().weight * (1 + delta(transposed)))


@pytest.mark.parametrize("init_weights", [True, None, "gaussian"])
@every_kind
def test_a_reset_adapter_starts_from_the_base(kind, init_weights):
    layer = adapted(kind, r=50)
    A, B = layer.parameters_of("default")
    x = KINDS[kind][2]()
    base = layer.get_base_layer()(x)
    assert not torch.equal(layer(x), base)
    layer.reset_hira_parameters("default", init_weights)
    assert all(after is before for after, before in zip(layer.parameters_of("default"), (A, B), strict=True))
    torch.testing.assert_close(layer(x), base, **EXACT)
    zero, random = (A, B) if kind == "embedding" else (B, A)
    assert zero.eq(0).all()
    assert random.ne(0).all()
    wide = 1.0 if kind == "embedding" else {"gaussian": 1 / 50}.get(init_weights, 1 / math.sqrt(3 * A[0].numel()))
    assert abs(random.std().item() / wide - 1) < 0.2


def test_a_reset_that_leaves_all_as_it_is():
    layer = adapted()
    before = [factor.detach().clone() for factor in layer.parameters_of("default")]
    layer.reset_hira_parameters("default", False)
    layer.reset_hira_parameters("elsewhere", True)
    message = "init_weights.* 'olora'"
    with pytest.raises(HiraError, match=message):
        layer.reset_hira_parameters("default", "olora")
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters_of("default"), before, strict=True))


@pytest.mark.parametrize("requires_grad", [True, False])
@every_kind
def test_an_adapter_is_resized(kind, requires_grad):
    layer = adapted(kind).to(torch.float64)
    for factor in layer.parameters_of("default"):
        factor.requires_grad_(requires_grad)
    layer.resize_adapter("default", 7)
    assert layer.r == {"default": 7}
    factors = layer.parameters_of("default")
    assert tuple(tuple(factor.shape) for factor in factors) == layer._factor_shapes(7)
    assert all(f.requires_grad == requires_grad and f.dtype == torch.float64 for f in factors)
    x = KINDS[kind][2]()
    torch.testing.assert_close(layer(x), layer.get_base_layer()(x), **EXACT)


@pytest.mark.parametrize("r", [0, -2, True, 2.0, "2"], ids=repr)
@every_kind
def test_a_bad_rank_leaves_the_layer(kind, r):
    layer = adapted(kind)
    before = set(dict(layer.named_modules())), set(layer.state_dict())
    with pytest.raises(HiraError, match=rf"`r`.* {r!r}"):
        layer.update_layer("other", r, config())
    assert (set(dict(layer.named_modules())), set(layer.state_dict())) == before
    assert layer.r == {"default": 3}


def test_a_training_forward_of_a_plain_layer_passes_few_python_calls():
    """On a GPU such calls are what small batches cost: PEFT's LoRA passes 40 of them."""
    layer, x = adapted(), linear_input()
    layer(x)
    calls = []
    sys.setprofile(lambda frame, event, argument: calls.append(frame.f_code) if event == "call" else None)
    try:
        layer(x)
    finally:
        sys.setprofile(None)
    assert len(calls) <= 120, [code.co_name for code in calls]
