"""Base weights that are loaded, written or cast while adapters are merged are kept."""

from __future__ import annotations

import math

import pytest
import torch
from mergeable import EXACT, KINDS, NAMES, adapted, several

from hira import HiraError

pytestmark = pytest.mark.filterwarnings("ignore:Already following adapters were merged")


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_base_weight_loaded_while_merged_is_kept(kind, assign):
    layer = adapted(kind)
    other = {name: torch.randn_like(value) for name, value in layer.get_base_layer().state_dict().items()}
    layer.merge()
    layer.get_base_layer().load_state_dict(other, assign=assign)
    message = "replaced.*'default'"
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
    with pytest.warns(UserWarning, match="replaced"):
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
    with pytest.warns(UserWarning, match="replaced"):
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
    with pytest.warns(UserWarning, match="replaced"):
        layer.unload_and_optionally_merge_module(True, False, None) if unload else layer.merge()
    expected = other * (1 + layer.hira_B["a"] @ layer.hira_A["a"])
    torch.testing.assert_close(layer.get_base_layer().weight, expected, **EXACT)


def test_a_safe_merge_checks_the_base_weight_that_was_loaded_while_merged():
    layer = several()
    layer.merge(adapter_names=["a"])
    other = torch.randn(5, 7).double()
    other[1, 2] = math.inf
    layer.get_base_layer().load_state_dict({"weight": other, "bias": torch.zeros(5)})
    message = "adapter b"
    with pytest.warns(UserWarning, match="replaced"), pytest.raises(HiraError, match=message):
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
