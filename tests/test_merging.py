"""Merging: the merged weight is that of the forward, unmerging is exact, and a failure changes nothing."""

from __future__ import annotations

import gc
import math
import weakref

import hypothesis
import hypothesis.strategies as st
import peft
import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

import hira
from hira import HiraError
from hira.ops import effective_weight, heuristics, reference
from hira.ops.workspace import formation_dtype

pytestmark = pytest.mark.filterwarnings("ignore:Already following adapters were merged")

# Sums of a few float64 products in another order.
EXACT = {"rtol": 1e-12, "atol": 1e-12}
NAMES = ("a", "b", "c")
KINDS = {
    "linear": (hira.Linear, lambda: nn.Linear(7, 5, bias=False)),
    "Conv1D": (hira.Linear, lambda: Conv1D(5, 7)),
    "conv 1d": (hira.Conv1d, lambda: nn.Conv1d(4, 6, 3, bias=False)),
    "conv 2d": (hira.Conv2d, lambda: nn.Conv2d(3, 6, (3, 2), bias=False)),
    "depthwise": (hira.Conv1d, lambda: nn.Conv1d(6, 6, 3, groups=6, bias=False)),
    "embedding": (hira.Embedding, lambda: nn.Embedding(9, 5)),
}


def adapted(kind: str, dtype: torch.dtype = torch.float32, r: int = 3) -> hira.HiraLayer:
    """A layer whose adapter does something; its factors are in float32 unless dtype is float64, as in training."""
    cls, base = KINDS[kind]
    options = {"fan_in_fan_out": True} if kind == "Conv1D" else {}
    layer = cls(base().to(dtype), "default", hira.HiraConfig(r=r, init_weights=False), **options)
    for factors in layer._factor_dicts:
        factors.to(formation_dtype(dtype))
    return layer.eval()


def several(ranks: tuple[int, ...] = (1, 3, 2)) -> hira.Linear:
    layer = hira.Linear(nn.Linear(7, 5), "a", hira.HiraConfig(r=ranks[0], init_weights=False))
    for name, r in zip(NAMES[1:], ranks[1:], strict=True):
        layer.update_layer(name, r, hira.HiraConfig(r=r, init_weights=False))
    layer.set_adapter(list(NAMES))
    return layer.double()


def weight_of_forward(layer: hira.HiraLayer) -> Tensor:
    """W' as the forward applies it, in the base weight's shape: the output for an identity, one term for each entry."""
    base = layer.get_base_layer()
    weight, dtype = base.weight, base.weight.dtype
    if isinstance(base, nn.Embedding):
        return layer(torch.arange(len(weight)))
    if isinstance(layer, hira.Linear):
        rows = layer(torch.eye(layer.in_features, dtype=dtype))
        return rows if isinstance(base, Conv1D) else rows.t()
    channels, *kernel = weight.shape[1:]
    inputs = torch.eye(channels * math.prod(kernel), dtype=dtype).view(-1, channels, *kernel)
    inputs = torch.cat([inputs] * base.groups, dim=1)
    return layer(inputs).flatten(1).t().reshape(weight.shape)


class Body(nn.Sequential):
    """A model of three adapted layers; `last` is the one that is merged last."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("first", nn.Linear(6, 6))
        self.add_module("middle", Conv1D(6, 6))
        self.add_module("last", nn.Linear(6, 4))


def model(adapter_names: tuple[str, ...] = ("default",)) -> peft.PeftModel:
    config = peft.HiraConfig(r=2, target_modules=["first", "middle", "last"], init_weights=False, fan_in_fan_out=True)
    with pytest.warns(UserWarning, match="fan_in_fan_out is set to True but the target module is a Linear"):
        adapted = get_peft_model(Body(), config, adapter_name=adapter_names[0])
    for name in adapter_names[1:]:
        adapted.add_adapter(name, config)
    return adapted.eval()


def state(module: nn.Module) -> dict[str, tuple[int, Tensor]]:
    return {name: (id(value), value.detach().clone()) for name, value in module.named_parameters()}


def assert_same_state(module: nn.Module, before: dict[str, tuple[int, Tensor]]) -> None:
    after = state(module)
    assert after.keys() == before.keys()
    for name, (identity, value) in before.items():
        assert after[name][0] == identity, name
        assert after[name][1].dtype == value.dtype, name
        assert torch.equal(after[name][1].nan_to_num(), value.nan_to_num()), name


def layers(model: nn.Module) -> list[hira.HiraLayer]:
    return [module for module in model.modules() if isinstance(module, hira.HiraLayer)]


# The merged weight


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
        # another order: two sums of r + 1 products, each multiplied by W0
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


# Several adapters


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
    W0 = layer._record.original
    delta = layer.hira_B["a"] @ layer.hira_A["a"] + layer.hira_B["c"] @ layer.hira_A["c"]
    torch.testing.assert_close(layer.get_base_layer().weight, W0 * (1 + delta), **EXACT)


def test_adapters_that_are_merged_already_stay_so():
    layer = several()
    layer.merge(adapter_names=["a"])
    weight = layer.get_base_layer().weight
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        layer.merge(adapter_names=["a"])
    assert layer.get_base_layer().weight is weight
    with pytest.warns(
        UserWarning, match=r"^Already following adapters were merged a\. You are now additionally merging b\.$"
    ):
        layer.merge(adapter_names=["a", "b"])
    assert layer.merged_adapters == ["a", "b"]
    W0 = layer._record.original
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
    with pytest.warns(UserWarning, match=r"^Already unmerged\. Nothing to do\.$"):
        layer.unmerge()
    assert layer.get_base_layer().weight is weight


# Failures


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_safe_merge_checks_every_layer_first(merge, value):
    adapted = model()
    last = layers(adapted)[-1]
    with torch.no_grad():
        last.hira_B["default"][1, 1] = value
    before = state(adapted)
    message = (
        r"^NaNs detected in the merged weights\. The adapter default seems to be broken: W0 \* \(1 \+ BA\) of last "
    )
    with pytest.raises(HiraError, match=message):
        getattr(adapted, merge)(safe_merge=True)
    assert_same_state(adapted, before)
    assert len(layers(adapted)) == 3
    for layer in layers(adapted):
        assert not layer.merged
        assert layer._record is None
    with torch.no_grad():
        last.hira_B["default"][1, 1] = 0.5
    expected = [
        layer._effective_weight(layer.storage.read(), *layer._factors(["default"])) for layer in layers(adapted)
    ]
    adapted.merge_adapter(safe_merge=True)
    for layer, weight in zip(layers(adapted), expected, strict=True):
        assert torch.equal(layer.storage.read(), weight)


def test_safe_merge_of_a_second_adapter():
    layer = several()
    layer.merge(safe_merge=True, adapter_names=["a"])
    merged = layer.get_base_layer().weight
    with torch.no_grad():
        layer.hira_A["b"][0, 0] = math.nan
    with pytest.raises(HiraError, match=r"The adapter b seems to be broken: W0 \* \(1 \+ BA\) of this layer would not"):
        layer.merge(safe_merge=True, adapter_names=["b"])
    assert layer.get_base_layer().weight is merged
    assert layer.merged_adapters == ["a"]
    layer.check_merge(["a", "c"])


def test_a_safe_merge_of_a_second_adapter_is_checked_on_the_base_weight():
    layer = several().float()
    with torch.no_grad():
        layer.hira_B["a"].fill_(1e25)  # squared it would not be finite
    layer.merge(safe_merge=True, adapter_names=["a"])
    layer.merge(safe_merge=True, adapter_names=["b"])
    assert layer.merged_adapters == ["a", "b"]
    assert layer.get_base_layer().weight.isfinite().all()


def test_a_merge_without_the_check_does_as_told():
    layer = several()
    W0 = layer.get_base_layer().weight
    with torch.no_grad():
        layer.hira_A["b"][0, 0] = math.nan
    layer.merge()
    assert layer.get_base_layer().weight.isnan().any()
    layer.unmerge()
    assert layer.get_base_layer().weight is W0
    assert W0.isfinite().all()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_merge_leaves_nothing_behind(error, monkeypatch):
    adapted = model()
    before, x = state(adapted), torch.randn(3, 6)
    y = adapted(x)

    def fail(*_):
        raise error("no memory")

    last = layers(adapted)[-1]
    with monkeypatch.context() as patch:
        patch.setattr(last, "_effective_weight", fail)
        with pytest.raises(error, match="no memory"):
            adapted.merge_adapter()
    assert_same_state(adapted, before)
    for layer in layers(adapted):
        assert (layer.merged, layer.merged_adapters, layer._record) == (False, [], None)
    with torch.no_grad():
        for layer in layers(adapted):
            layer.get_base_layer().weight.mul_(2)  # a stale copy would be without this
    doubled = adapted(x)
    assert not torch.allclose(doubled, y)
    adapted.merge_adapter()
    torch.testing.assert_close(adapted(x), doubled)


@pytest.mark.parametrize("step", ["_effective_weight", "_factors"])
def test_a_failed_second_merge_keeps_the_first(step, monkeypatch):
    layer = several()
    W0 = layer.get_base_layer().weight
    layer.merge(adapter_names=["a"])
    merged = layer.get_base_layer().weight

    def fail(*_):
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(layer, step, fail)
        with pytest.raises(RuntimeError, match="no memory"):
            layer.merge(adapter_names=["b"])
    assert layer.get_base_layer().weight is merged
    assert layer.merged_adapters == ["a"]
    layer.unmerge()
    assert layer.get_base_layer().weight is W0


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_a_computed_weight_is_refused():
    adapted = model()
    last = layers(adapted)[-1]
    parametrize.register_parametrization(last.get_base_layer(), "weight", Doubled())
    before, x = state(adapted), torch.randn(3, 6)
    y = adapted(x)
    message = (
        r"^{}The weight of ParametrizedLinear is computed, not stored, so nothing can be merged into it; remove its "
        r"parametrization first\.$"
    )
    for merge in (adapted.merge_adapter, adapted.merge_and_unload, last.merge):
        name = "" if merge == last.merge else f"{last.name}: "
        with pytest.raises(HiraError, match=message.format(name)):
            merge()
        assert_same_state(adapted, before)
        assert not any(layer.merged for layer in layers(adapted))
    assert torch.equal(adapted(x), y)
    parametrize.remove_parametrizations(last.get_base_layer(), "weight")
    adapted.merge_adapter()
    torch.testing.assert_close(adapted(x), y)


# Base weights that change while merged


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_base_weight_loaded_while_merged_is_kept(kind, assign):
    layer = adapted(kind)
    other = {name: torch.randn_like(value) for name, value in layer.get_base_layer().state_dict().items()}
    layer.merge()
    layer.get_base_layer().load_state_dict(other, assign=assign)
    message = r"^The base weight of a layer was replaced while \['default'\] were merged; it is kept, and the adapters"
    with pytest.warns(UserWarning, match=message):
        layer.unmerge()
    assert torch.equal(layer.get_base_layer().weight, other["weight"])
    assert not layer.merged
    expected = layer._effective_weight(layer.storage.read(), *layer._factors(["default"])).detach()
    layer.merge()
    assert torch.equal(layer.storage.read(), expected)
    layer.unmerge()
    assert torch.equal(layer.get_base_layer().weight, other["weight"])


WRITES = {
    "an entry": lambda weight: weight.data.view(-1)[1].add_(1),
    "two rows exchanged": lambda weight: weight.data.copy_(weight.data[[1, 0, *range(2, len(weight))]].clone()),
    "all by NumPy": lambda weight: weight.detach().numpy().__imul__(2),
    "other data": lambda weight: setattr(weight, "data", weight.data * 3),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_past_the_version_counter_while_merged_is_kept(kind, dtype, write):
    layer = adapted(kind, dtype)
    layer.merge()
    write(layer.get_base_layer().weight)
    written = layer.get_base_layer().weight.detach().clone()
    with pytest.warns(UserWarning, match="was replaced while"):
        layer.unmerge()
    assert torch.equal(layer.get_base_layer().weight, written)
    assert not layer.merged


@pytest.mark.parametrize("dtypes", [[torch.bfloat16], [torch.bfloat16, torch.float32], [torch.float16, torch.float32]])
def test_a_cast_while_merged_is_no_other_weight(dtypes, recwarn):
    layer = adapted("linear")
    W0 = layer.get_base_layer().weight.detach().clone()
    layer.merge()
    for dtype in dtypes:
        layer.to(dtype)
    layer.unmerge()
    assert torch.equal(layer.get_base_layer().weight, W0.to(dtypes[-1]))
    assert not [w for w in recwarn if "replaced" in str(w.message)]


def test_factors_that_change_while_merged_are_no_other_weight(recwarn):
    layer = adapted("linear")
    W0 = layer.get_base_layer().weight.detach().clone()
    layer.merge()
    layer.hira_B["default"].data.mul_(2)
    layer.unmerge()
    assert torch.equal(layer.get_base_layer().weight, W0)
    assert not [w for w in recwarn if "replaced" in str(w.message)]


def test_a_base_weight_loaded_between_two_merges_is_the_base_of_the_second():
    layer = several()
    layer.merge(adapter_names=["a"])
    other = torch.randn(5, 7).double()
    layer.get_base_layer().load_state_dict({"weight": other, "bias": torch.zeros(5)})
    with pytest.warns(UserWarning, match="was replaced while"):
        layer.merge(adapter_names=["b"])
    assert layer.merged_adapters == ["b"]
    torch.testing.assert_close(
        layer.get_base_layer().weight, other * (1 + layer.hira_B["b"] @ layer.hira_A["b"]), **EXACT
    )


@pytest.mark.parametrize("unload", [False, True])
def test_merging_again_after_a_base_weight_was_loaded(unload):
    """The adapter counts as unmerged from then on, and so is not left out as merged already."""
    layer = several()
    layer.set_adapter(["a"])
    layer.merge()
    other = torch.randn(5, 7).double()
    layer.get_base_layer().load_state_dict({"weight": other, "bias": torch.zeros(5)})
    with pytest.warns(UserWarning, match="was replaced while"):
        layer.unload_and_optionally_merge_module(True, False, None) if unload else layer.merge()
    expected = other * (1 + layer.hira_B["a"] @ layer.hira_A["a"])
    torch.testing.assert_close(layer.get_base_layer().weight, expected, **EXACT)


def test_a_safe_merge_checks_the_base_weight_that_was_loaded_while_merged():
    layer = several()
    layer.merge(adapter_names=["a"])
    other = torch.randn(5, 7).double()
    other[1, 2] = math.inf
    layer.get_base_layer().load_state_dict({"weight": other, "bias": torch.zeros(5)})
    message = r"The adapter b seems to be broken: W0 \* \(1 \+ BA\) of this layer would not be finite"
    with pytest.warns(UserWarning, match="was replaced while"), pytest.raises(HiraError, match=message):
        layer.merge(safe_merge=True, adapter_names=["b"])
    assert torch.equal(layer.get_base_layer().weight, other)
    assert not layer.merged


def test_loading_what_was_saved_while_merged_changes_nothing(recwarn):
    layer = several()
    W0 = layer.get_base_layer().weight
    layer.merge()
    merged = {name: value.clone() for name, value in layer.get_base_layer().state_dict().items()}
    layer.get_base_layer().load_state_dict(merged)
    assert layer.merged_adapters == list(NAMES)
    layer.unmerge()
    assert layer.get_base_layer().weight is W0
    assert not [warning for warning in recwarn if "was replaced" in str(warning.message)]


# Tied weights


def test_a_weight_merged_in_inference_mode_is_an_ordinary_one():
    layer = adapted("linear")
    W0 = layer.base_layer.weight.detach().clone()
    with torch.inference_mode():
        layer.merge()
    assert not layer.base_layer.weight.is_inference()
    layer.base_layer(torch.randn(2, 7)).sum().backward()
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, W0)
