"""Merging: the merged weight is that of the forward, unmerging is exact, and a failure changes nothing."""

from __future__ import annotations

import gc
import weakref

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from mergeable import EXACT, KINDS, NAMES, adapted, assert_same_state, layers, model, several, state, weight_of_forward
from torch import nn

from hira.ops import effective_weight, heuristics, reference

pytestmark = pytest.mark.filterwarnings("ignore:Already following adapters were merged")


@pytest.mark.parametrize("block", [None, 12], ids=["one block", "blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_weight_is_that_of_the_forward_bit_for_bit(kind, dtype, block, monkeypatch):
    if block is not None:
        monkeypatch.setattr(heuristics, "CPU_BLOCK_ENTRIES", block)
    layer = adapted(kind, dtype)
    W0 = layer.get_base_layer().weight
    assert block is None or len(list(effective_weight.row_blocks(layer.storage.read().flatten(1)))) > 1
    with torch.no_grad():
        expected = weight_of_forward(layer)
    layer.merge()
    merged = layer.get_base_layer().weight
    assert layer.merged_adapters == ["default"]
    assert (merged.dtype, merged.shape) == (dtype, W0.shape)
    assert merged.requires_grad == W0.requires_grad
    assert not torch.equal(merged, W0)
    if kind == "embedding" and dtype == torch.float32:
        # the products are of other shapes, over ids and over blocks of the table, and some processors sum them in
        # another order: two sums of r products, each multiplied by W0, which is added
        A, B = (factors["default"].detach() for factors in layer._factor_dicts)
        terms = W0.abs() * (1 + (B.abs() @ A.abs()).t())
        assert ((merged - expected).abs() <= 2 * (len(A) + 2) * 2**-24 * terms).all()
    else:
        assert torch.equal(merged, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_weight_is_that_of_the_reference(kind):
    layer = adapted(kind, torch.float64)
    W0 = layer.storage.read().detach().clone()
    A, B = (factors["default"].detach() for factors in layer._factor_dicts)
    expected = W0 * (1 + (B @ A).t()) if kind == "embedding" else reference.modulated_weight(W0, A, B)
    layer.merge()
    torch.testing.assert_close(layer.storage.read().detach(), expected, **EXACT)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dither", [False, True])
def test_a_bfloat16_merge_rounds_once(kind, dither, monkeypatch):
    """W' is a neighbour of the exact one, or the nearest, but for the float32 rounding of the modulation."""
    monkeypatch.setattr(heuristics, "DITHER", dither)
    layer = adapted(kind, torch.bfloat16, r=4)
    W0 = layer.storage.read().detach().clone()
    A, B = (factors["default"].detach().mul_(0.25) for factors in layer._factor_dicts)
    layer.merge()
    found = layer.storage.read().detach()
    if kind == "embedding":
        A, B = B.t(), A.t()
    modulation = 1 + reference.delta(A.double(), B.double())
    exact = W0.double() * modulation
    half_unit = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - 1 - 8)
    distance = half_unit * (2 if dither else 1)
    terms = 1 + reference.delta(A.double().abs(), B.double().abs())
    float32_error = 7 * 2**-24 * W0.double().abs() * terms  # five terms, their sum and the product with W0
    assert (found.double() - exact).abs().le(distance + float32_error).all()
    rounded_often = W0 * (1 + reference.delta(A.bfloat16(), B.bfloat16()))
    assert not (rounded_often.double() - exact).abs().le(half_unit + float32_error).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_unmerging_is_exact(kind, dtype):
    layer = adapted(kind, dtype)
    weight = layer.get_base_layer().weight
    W0 = weight.detach().clone()
    for _ in range(3):
        layer.merge()
        layer.unmerge()
        assert layer.get_base_layer().weight is weight
        assert torch.equal(weight, W0)
        assert not layer.merged


def test_a_merged_layer_follows_a_change_of_dtype():
    layer = adapted("linear")
    W0 = layer.get_base_layer().weight.detach().clone()
    layer.merge()
    layer.bfloat16()
    layer.unmerge()
    assert torch.equal(layer.get_base_layer().weight, W0.bfloat16())


def test_disabling_adapters_unmerges():
    layer = adapted("linear")
    x, W0 = torch.randn(2, 7), layer.get_base_layer().weight
    layer.merge()
    layer.enable_adapters(False)
    torch.testing.assert_close(layer(x), x @ W0.t())
    assert layer.get_base_layer().weight is W0
    assert not layer.merged


def test_whole_models():
    adapted = model()
    x, base = torch.randn(5, 6), adapted.get_base_model()
    y, before = adapted(x), state(adapted)
    adapted.merge_adapter()
    assert all(layer.merged for layer in layers(base))
    torch.testing.assert_close(adapted(x), y)
    adapted.unmerge_adapter()
    assert_same_state(adapted, before)
    unloaded = adapted.merge_and_unload()
    assert not layers(unloaded)
    assert type(unloaded.first) is nn.Linear
    torch.testing.assert_close(unloaded(x), y)


@pytest.mark.parametrize("merge_first", [False, True])
def test_unloading_keeps_no_copy_of_the_base_weight(merge_first):
    adapted = model()
    old = [weakref.ref(layer.get_base_layer().weight) for layer in layers(adapted)]
    if merge_first:
        adapted.merge_adapter()
        assert all(weight() is not None for weight in old)
    unloaded = adapted.merge_and_unload()
    del adapted
    gc.collect()
    assert [weight() for weight in old] == [None, None, None]
    assert type(unloaded.first) is nn.Linear


def test_unloading_without_a_merge_leaves_the_base_weights():
    adapted = model()
    old = [layer.get_base_layer().weight for layer in layers(adapted)]
    unloaded = adapted.unload()
    found = [unloaded.first.weight, unloaded.middle.weight, unloaded.last.weight]
    assert all(weight is before for weight, before in zip(found, old, strict=True))


@hypothesis.given(order=st.permutations(NAMES), size=st.integers(1, 3), split=st.integers(0, 3))
def test_any_adapters_merge_in_any_order_at_once_or_in_turn(order, size, split):
    names = order[:size]
    torch.manual_seed(0)
    layer = several()
    weight, x = layer.get_base_layer().weight, torch.randn(4, 7).double()
    W0 = weight.detach().clone()
    expected = W0 * (1 + sum(layer.hira_B[name] @ layer.hira_A[name] for name in names))
    layer.merge(adapter_names=names)
    at_once = layer.get_base_layer().weight
    torch.testing.assert_close(at_once, expected, **EXACT)
    layer.unmerge()
    assert layer.get_base_layer().weight is weight
    for part in (names[:split], names[split:]):
        if part:
            layer.merge(adapter_names=part)
    assert layer.merged_adapters == names
    assert torch.equal(layer.get_base_layer().weight, at_once)
    layer.set_adapter(names)
    y = layer(x)
    layer.unmerge()
    assert layer.get_base_layer().weight is weight
    assert torch.equal(weight, W0)
    torch.testing.assert_close(layer(x), y, **EXACT)


def test_the_active_adapters_are_merged_by_default():
    layer = several()
    layer.set_adapter(["a", "c"])
    layer.merge()
    assert layer.merged_adapters == ["a", "c"]
    W0 = layer.record.original
    delta = layer.hira_B["a"] @ layer.hira_A["a"] + layer.hira_B["c"] @ layer.hira_A["c"]
    torch.testing.assert_close(layer.get_base_layer().weight, W0 * (1 + delta), **EXACT)


def test_adapters_that_are_merged_already_stay_so():
    layer = several()
    layer.merge(adapter_names=["a"])
    weight = layer.get_base_layer().weight
    with pytest.warns(UserWarning, match="already merged"):
        layer.merge(adapter_names=["a"])
    assert layer.get_base_layer().weight is weight
    with pytest.warns(UserWarning, match=r"merged a.* merging b"):
        layer.merge(adapter_names=["a", "b"])
    assert layer.merged_adapters == ["a", "b"]
    W0 = layer.record.original
    delta = layer.hira_B["a"] @ layer.hira_A["a"] + layer.hira_B["b"] @ layer.hira_A["b"]
    torch.testing.assert_close(layer.get_base_layer().weight, W0 * (1 + delta), **EXACT)


def test_a_layer_without_the_adapter_is_left():
    layer = several()
    weight = layer.get_base_layer().weight
    layer.merge(adapter_names=["elsewhere"])
    assert layer.get_base_layer().weight is weight
    assert not layer.merged


def test_unloading_with_adapters_chosen():
    adapted = model(("a", "b"))
    first = layers(adapted)[0]
    W0 = first.get_base_layer().weight.detach().clone()
    delta = first.hira_B["b"] @ first.hira_A["b"]
    adapted.merge_adapter(["a"])
    adapted.unmerge_adapter()
    unloaded = adapted.merge_and_unload(adapter_names=["b"])
    torch.testing.assert_close(unloaded.first.weight, W0 * (1 + delta))


def test_unmerging_with_nothing_merged_warns():
    layer = several()
    weight = layer.get_base_layer().weight
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()
    assert layer.get_base_layer().weight is weight


def test_a_weight_merged_in_inference_mode_is_an_ordinary_one():
    layer = adapted("linear")
    W0 = layer.base_layer.weight.detach().clone()
    with torch.inference_mode():
        layer.merge()
    assert not layer.base_layer.weight.is_inference()
    layer.base_layer(torch.randn(2, 7)).sum().backward()
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, W0)
