"""Inspecting adapters in folders, with their base weights, through the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from commands import run_in_this_process
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hira import HiraError
from hira.files.inspect.inspect_adapter import inspect_adapter

HIRA = str(Path(sys.executable).with_name("hira"))
SIZES = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture
def folders(tmp_path):
    """The folders of a model and of its adapter, and the adapted model."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=2))
    base.save_pretrained(tmp_path / "base", max_shard_size="8KB")
    config = peft.HiraConfig(r=3, target_modules=["q_proj", "down_proj", "embed_tokens"], init_weights=False)
    model = peft.get_peft_model(base, config)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    return tmp_path / "base", tmp_path / "adapter", model.base_model.model


def test_the_update_of_every_layer_is_that_of_the_model(folders):
    base, adapter, model = folders
    report = inspect_adapter(adapter, base)
    assert len(report.layers) == 5
    for found in report.layers:
        layer = model.get_submodule(found.name)
        W0, update = layer.get_base_layer().weight.detach(), layer.get_additive_delta("default").detach()
        assert found.relative_norm == pytest.approx(float(update.norm() / W0.norm()), rel=1e-5)
    assert all(layer.relative_norm is None for layer in inspect_adapter(adapter).layers)


@pytest.mark.parametrize("said", [False, True])
def test_a_square_weight_is_read_the_way_round_that_the_model_has_it(said, tmp_path):
    """The config says what its user guessed; `Conv1D` is (in, out) whatever that was."""
    base = GPT2LMHeadModel(GPT2Config(vocab_size=48, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    base.save_pretrained(tmp_path / "base")
    options = {"target_modules": ["c_proj", "wpe"], "fan_in_fan_out": said, "init_weights": False}
    model = peft.get_peft_model(base, peft.HiraConfig(r=3, **options))
    model.save_pretrained(tmp_path / "adapter")
    report = inspect_adapter(tmp_path / "adapter", tmp_path / "base")
    layers = {layer.name: layer for layer in report.layers}
    assert layers.keys() == {"transformer.wpe", "transformer.h.0.attn.c_proj", "transformer.h.0.mlp.c_proj"}
    for name, found in layers.items():
        layer = model.base_model.model.get_submodule(name)
        update = layer.get_additive_delta("default").detach()
        assert found.update_norm == pytest.approx(float(update.norm()), rel=1e-5)


def test_a_base_of_another_model_is_refused(folders, tmp_path):
    base, adapter, _ = folders
    for name in base.glob("*.safetensors*"):
        name.unlink()
    other = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=1))
    other.save_pretrained(base)
    with pytest.raises(HiraError, match=r"has no parameters for model\.layers\.1\.[a-z_.]+_proj, .*another model"):
        inspect_adapter(adapter, base)


def test_the_command(folders, tmp_path):
    base, adapter, _ = folders
    page = tmp_path / "page.html"
    command = [HIRA, "inspect", adapter, "--base", base, "--json", "--html", page]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(json.dumps(inspect_adapter(adapter, base).to_dict()))
    assert page.read_text().startswith("<!DOCTYPE html>")
    done = run_in_this_process("inspect", base)
    assert done.returncode == 1
    # other libraries may have written before
    assert done.stderr.splitlines()[-1].startswith("hira: ")
    assert "adapter_config.json" in done.stderr
    done = run_in_this_process("verify", adapter)
    assert (done.returncode, done.stdout) == (1, "")
    assert "manifest" in done.stderr
