"""Merging into weights that accelerate keeps on a CPU or a disk: as in memory, and undone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from offloaded_models import IDS, adapt, assert_away, fill, loaded, logits, trained, ways
from offloading import CPU, llama
from torch import Tensor
from transformers import AutoModelForCausalLM

from hira import HiraConfig, HiraError
from hira.base_weights import offloaded
from hira.tuner.model import hira_layers

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Adapter name '.' should not be contained"),
    pytest.mark.filterwarnings("ignore:.*Could not find a config file in"),
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
]


@ways
def test_merging_and_unmerging(way, tmp_path):
    model, expected = adapt(way.offload(llama(), tmp_path)), adapt(llama())
    with model.disable_adapter():
        plain = logits(model)
    before = [layer.storage.read().clone() for layer in hira_layers(model)]
    identities = [layer.storage.identity()[0] for layer in hira_layers(model) if layer.storage.stored.is_meta]
    for _ in range(2):
        model.merge_adapter(safe_merge=True)
        expected.merge_adapter()
        assert_away(model, way)
        for layer, other in zip(hira_layers(model), hira_layers(expected), strict=True):
            assert torch.equal(layer.storage.read(), other.storage.read())
        assert torch.equal(logits(model), logits(expected))
        assert not torch.equal(logits(model), plain)
        model.unmerge_adapter()
        expected.unmerge_adapter()
        for layer, W0 in zip(hira_layers(model), before, strict=True):
            assert torch.equal(layer.storage.read(), W0)
        assert torch.equal(logits(model), logits(expected))
    after = [layer.storage.identity()[0] for layer in hira_layers(model) if layer.storage.stored.is_meta]
    assert all(new is old for new, old in zip(after, identities, strict=True))
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)


@ways
@pytest.mark.parametrize("merge", [True, False])
def test_unloading(way, merge, tmp_path):
    model, expected = adapt(way.offload(llama(), tmp_path)), adapt(llama())
    found, wanted = ((each.merge_and_unload if merge else each.unload)() for each in (model, expected))
    assert not hira_layers(found)
    assert any(parameter.is_meta for parameter in found.parameters()) == (way.away != "none")
    assert torch.equal(logits(found), logits(wanted))
    if merge:
        assert not torch.equal(logits(found), logits(llama()))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_merged_model_is_saved_with_what_was_merged(tied, tmp_path):
    bases = llama(), llama()
    for base in bases:
        if tied:
            base.lm_head.weight, base.config.tie_word_embeddings = base.model.embed_tokens.weight, True
    targets = ["q_proj", "lm_head"]
    model = adapt(loaded(tmp_path, bases[0]), target_modules=targets).merge_and_unload()
    model.save_pretrained(tmp_path / "merged")
    expected = adapt(bases[1], target_modules=targets).merge_and_unload()
    assert not model.config.tie_word_embeddings
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(expected))


def test_several_adapters():
    model, expected = adapt(cpu_offload(llama(), CPU)).eval(), adapt(llama()).eval()
    for each in (model, expected):
        each.add_adapter("b", HiraConfig(r=2, target_modules=["q_proj", "lm_head"]))
        fill(each).base_model.set_adapter(["default", "b"])
    assert torch.equal(logits(model), logits(expected))
    names = ["default", "b"]
    assert torch.equal(logits(model, adapter_names=names), logits(expected, adapter_names=names))
    for names in (["b"], ["default"]):
        model.merge_adapter(names)
        expected.merge_adapter(names)
        assert torch.equal(logits(model), logits(expected))
    model.unmerge_adapter()
    expected.unmerge_adapter()
    assert torch.equal(logits(model), logits(expected))


def test_merged_then_brought_back():
    model, expected = adapt(cpu_offload(llama(), CPU)), adapt(llama())
    model.merge_adapter()
    expected.merge_adapter()
    remove_hook_from_submodules(model.get_base_model())
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(logits(model), logits(expected))
    model.unmerge_adapter()
    expected.unmerge_adapter()
    assert torch.equal(logits(model), logits(expected))


def test_merged_then_offloaded():
    model, expected = adapt(llama()), adapt(llama())
    model.merge_adapter()
    cpu_offload(model, CPU)
    expected.merge_adapter()
    assert torch.equal(logits(model), logits(expected))
    model.unmerge_adapter()
    expected.unmerge_adapter()
    assert torch.equal(logits(model), logits(expected))


def test_merged_and_offloaded_anew():
    """The second hooks know W' alone; W0 is what was remembered."""
    model, expected = adapt(cpu_offload(llama(), CPU)), adapt(llama())
    model.merge_adapter()
    remove_hook_from_submodules(model.get_base_model())
    cpu_offload(model, CPU)
    assert not torch.equal(logits(model), logits(llama()))
    model.unmerge_adapter()
    assert torch.equal(logits(model), logits(expected))


def test_a_backward_between_whose_passes_was_a_merge():
    model, expected = adapt(cpu_offload(llama(), CPU)), adapt(llama())
    losses = [each(input_ids=IDS, labels=IDS).loss for each in (model, expected)]
    model.merge_adapter()
    for loss in losses:
        loss.backward()
    for name, parameter in trained(model).items():
        assert torch.equal(parameter.grad, trained(expected)[name].grad)


def test_a_failing_merge_leaves_the_model_as_it_was(monkeypatch):
    model = adapt(cpu_offload(llama(), CPU))
    before = logits(model)
    layers = hira_layers(model)
    maps = [offloaded.offloading_hook(layer.base_layer).weights_map for layer in layers]
    with torch.no_grad():
        layers[-1]._factor_dicts[0]["default"].fill_(torch.inf)
    with pytest.raises(HiraError, match="NaNs"):
        model.merge_adapter(safe_merge=True)
    with torch.no_grad():
        layers[-1]._factor_dicts[0]["default"].zero_()
    before = logits(model)
    monkeypatch.setattr(type(layers[-1]), "_effective_weight", _failing(layers[-1]))
    with pytest.raises(RuntimeError, match="on purpose"):
        model.merge_adapter()
    monkeypatch.undo()
    assert all(
        offloaded.offloading_hook(layer.base_layer).weights_map is kept
        for layer, kept in zip(layers, maps, strict=True)
    )
    assert torch.equal(logits(model), before)


def _failing(last: Any) -> Any:
    form = type(last)._effective_weight

    def effective_weight(self: Any, *args: Any) -> Tensor:
        if self is last:
            raise RuntimeError("on purpose")
        return form(self, *args)

    return effective_weight
