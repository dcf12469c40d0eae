"""A merge that fails, or that is refused, changes nothing."""

from __future__ import annotations

import math

import pytest
import torch
from mergeable import assert_same_state, layers, model, several, state
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hira import HiraError
from hira.layers import merging

pytestmark = pytest.mark.filterwarnings("ignore:Already following adapters were merged")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_safe_merge_checks_every_layer_first(merge, value):
    adapted = model()
    last = layers(adapted)[-1]
    with torch.no_grad():
        last.hira_B["default"][1, 1] = value
    before = state(adapted)
    message = "NaNs.* default.* last"
    with pytest.raises(HiraError, match=message):
        getattr(adapted, merge)(safe_merge=True)
    assert_same_state(adapted, before)
    assert len(layers(adapted)) == 3
    for layer in layers(adapted):
        assert not layer.merged
        assert layer.record is None
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
    with pytest.raises(HiraError, match="adapter b"):
        layer.merge(safe_merge=True, adapter_names=["b"])
    assert layer.get_base_layer().weight is merged
    assert layer.merged_adapters == ["a"]
    merging.check_merge(layer, ["a", "c"])


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
        assert (layer.merged, layer.merged_adapters, layer.record) == (False, [], None)
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
    message = "^{}.*ParametrizedLinear.* parametrization"
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
