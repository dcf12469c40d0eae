"""Several adapters on one layer: summed, disabled, deleted, resized, or one for each row."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from layer_kinds import (
    EXACT,
    KINDS,
    adapted,
    assert_alike,
    config,
    every_kind,
    expected,
    gradients,
    linear_input,
    random_input,
)
from torch import nn

from hira import HiraError


@every_kind
@hypothesis.given(ranks=st.lists(st.integers(1, 4), min_size=1, max_size=4), data=st.data())
def test_active_adapters_are_one_of_the_summed_rank(kind, ranks, data):
    torch.manual_seed(0)
    layer = adapted(kind, r=ranks[0])
    names = ["default", *map(str, range(1, len(ranks)))]
    for name, r in zip(names[1:], ranks[1:], strict=True):
        layer.update_layer(name, r, config(r))
    layer.double()
    active = data.draw(st.lists(st.sampled_from(names), unique=True, min_size=1))
    layer.set_adapter(active)
    assert layer.active_adapters == active
    x = random_input(kind)
    y = layer(x)
    assert_alike(layer, y, expected(layer, x), x)
    together = adapted(kind, base=layer.get_base_layer(), r=sum(layer.r[name] for name in active))
    with torch.no_grad():
        for factors, joined in zip(together._factor_dicts, layer._factors(active)[:2], strict=True):
            factors["default"].copy_(joined)
    assert torch.equal(together(x), y)


@pytest.mark.parametrize("low", range(4), ids=bin)
def test_adapters_of_other_dtypes_add_up(low):
    """None is rounded to the dtype of another, whichever comes first and last."""
    layer = adapted()
    layer.update_layer("b", 2, config(2))
    layer.update_layer("c", 2, config(2))
    layer.double().set_adapter(["default", "b", "c"])
    dtypes = {name: torch.bfloat16 for name in (["default", "c"], ["b", "c"], ["b"], ["default", "b"])[low]}
    for factors in layer._factor_dicts:
        for name, dtype in dtypes.items():
            factors[name] = nn.Parameter(factors[name].detach().to(dtype))
    x = linear_input()
    torch.testing.assert_close(layer(x), expected(layer, x), **EXACT)
    found = gradients(layer(x), [layer.hira_A[name] for name in layer.active_adapters])
    assert [grad.dtype for grad in found] == [dtypes.get(name, torch.float64) for name in layer.active_adapters]


@every_kind
def test_disabled_adapters(kind):
    layer = adapted(kind)
    x, base = KINDS[kind][2](), layer.get_base_layer()
    y = layer(x)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), base(x))
    assert layer.disable_adapters
    layer.enable_adapters(True)
    assert torch.equal(layer(x), y)
    layer.set_adapter([])
    assert torch.equal(layer(x), base(x))


def test_an_adapter_that_the_layer_does_not_have():
    layer = adapted()
    x = linear_input()
    y = layer(x)
    layer._active_adapter = ["default", "elsewhere"]
    assert torch.equal(layer(x), y)
    layer._active_adapter = ["elsewhere"]
    assert torch.equal(layer(x), layer.get_base_layer()(x))


def test_an_adapter_is_deleted():
    layer = adapted()
    layer.update_layer("other", 2, config(2))
    layer.set_adapter(["default", "other"])
    layer.delete_adapter("other")
    assert layer.r == {"default": 3}
    assert [set(factors) for factors in layer._factor_dicts] == [{"default"}] * 2
    assert set(layer.hira_dropout) == {"default"}
    assert layer.active_adapters == ["default"]


@every_kind
def test_a_name_for_each_row(kind):
    layer = adapted(kind)
    layer.update_layer("other", 2, config(2))
    layer.double().eval()
    x = KINDS[kind][2]()
    x = torch.cat([x, x.flip(0), x])[:4]
    names = ["other", "__base__", "default", "other"]
    y = layer(x, adapter_names=names)
    base = layer.get_base_layer()
    for row, name in enumerate(names):
        wanted = base(x[row : row + 1]) if name == "__base__" else expected(layer, x[row : row + 1], name)
        torch.testing.assert_close(y[row : row + 1], wanted, **EXACT)
    torch.testing.assert_close(layer(x, adapter_names=["default"] * 4), expected(layer, x, "default"), **EXACT)
    torch.testing.assert_close(layer(x, adapter_names=["__base__"] * 4), base(x), **EXACT)


def test_names_that_do_not_fit_the_rows():
    layer = adapted()
    layer.name = "blocks.0.q"
    x = linear_input()
    message = r"adapter_names.* blocks\.0\.q"
    with pytest.raises(HiraError, match=message):
        layer(x, adapter_names=["default", "default"])
    layer.merge()
    message = r"'default'.* blocks\.0\.q.* unmerge_adapter"
    with pytest.raises(HiraError, match=message):
        layer(x, adapter_names=["default"] * 3)
