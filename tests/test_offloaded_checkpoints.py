"""Checkpoints of models whose weights accelerate keeps on a CPU or a disk."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload
from offloaded_models import IDS, LOADED, adapt, assert_away, assert_same_training, each, fill, loaded, logits, ways
from offloading import AFTERWARDS, CPU, DEVICES, TARGETS, WAYS, llama
from peft import AutoPeftModelForCausalLM, PeftModel
from torch import nn

from hira import HiraConfig, HiraError
from hira.tuner.model import hira_layers

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Adapter name '.' should not be contained"),
    pytest.mark.filterwarnings("ignore:.*Could not find a config file in"),
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
]


@ways
def test_saving_and_loading(way, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = adapt(llama())
    adapt(way.offload(llama(), tmp_path / "one")).save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path / "adapter")), logits(expected))
    base = way.offload(llama(), tmp_path / "two")
    files = sorted(tmp_path.rglob("*"))
    spread = {f"base_model.model.{name}": device for name, device in DEVICES.items()}
    options = {"device_map": spread, "offload_dir": str(tmp_path / "three")}
    for low in (False, True):
        model = PeftModel.from_pretrained(base, tmp_path / "adapter", low_cpu_mem_usage=low, **options)
        assert_away(model, way)
        assert torch.equal(logits(model), logits(expected))
        base = model.unload()
    assert sorted(tmp_path.rglob("*")) == files  # the base model's own files are not written anew
    assert not hasattr(base, "hf_device_map") or base.hf_device_map == DEVICES


def test_embeddings_of_a_checkpoint_are_loaded(tmp_path):
    other = llama()
    nn.init.normal_(other.model.embed_tokens.weight)
    adapt(other).save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(cpu_offload(llama(), CPU), tmp_path / "adapter")
    assert_away(model, WAYS[0])
    expected = PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    assert not torch.equal(logits(expected), logits(adapt(llama())))
    assert torch.equal(logits(model), logits(expected))


def test_methods_of_transformers(tmp_path):
    adapt(llama()).save_pretrained(tmp_path / "adapter")
    expected = llama()
    expected.add_adapter(HiraConfig(r=3, target_modules=TARGETS))
    fill(expected)
    added, read = loaded(tmp_path), loaded(tmp_path)
    added.add_adapter(HiraConfig(r=3, target_modules=TARGETS))
    assert_same_training(fill(added), expected)
    read.load_adapter(str(tmp_path / "adapter"))
    assert_away(read, LOADED)
    assert torch.equal(logits(read), logits(adapt(llama())))


def test_auto_class(tmp_path):
    base = loaded(tmp_path)
    adapt(base).save_pretrained(tmp_path / "adapter")
    options = {"device_map": DEVICES, "offload_folder": str(tmp_path / "more")}
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", **options)
    assert_away(model, LOADED)
    assert torch.equal(logits(model), logits(adapt(llama())))


@each(AFTERWARDS)
def test_adapted_before_it_was_offloaded(way, tmp_path):
    """The adapter is away with the model: good to run, to merge and to save, but not to train."""
    model, expected = way.offload(adapt(llama()), tmp_path / "off"), adapt(llama())
    assert any(f.is_meta for layer in hira_layers(model) for fs in layer._factor_dicts for f in fs.values())
    assert torch.equal(logits(model), logits(expected))
    with pytest.raises(HiraError, match=r"'default'.* offloaded"):
        model(input_ids=IDS)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path / "adapter")), logits(expected))
    model.merge_adapter()
    assert torch.equal(logits(model), logits(adapt(llama()).merge_and_unload()))
    model.unmerge_adapter()
    assert torch.equal(logits(model), logits(expected))
