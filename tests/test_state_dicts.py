"""Adapters whose names are those of another layout of the model: compiled, wrapped, or of an older transformers."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from peft import HiraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from renamed_models import TENSORS, compiled, logits, noisy, renamed
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import LlamaConfig, LlamaForCausalLM

import hira
from hira import HiraError


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)).eval()


def each_layer(wrap):
    def wrapped(model: nn.Module) -> nn.Module:
        for i, layer in enumerate(model.model.layers):
            model.model.layers[i] = wrap(layer)
        return model

    return wrapped


LAYOUTS = {
    "plain": lambda model: model,
    "compiled": compiled,
    "layers compiled": each_layer(compiled),
    "layers checkpointed": each_layer(checkpoint_wrapper),
    "layers checkpointed and compiled": each_layer(lambda layer: compiled(checkpoint_wrapper(layer))),
}
OPTIONS = {
    "names": {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
    # names and patterns that reach over a wrapper
    "paths": {"target_modules": ["model.layers.1.self_attn.q_proj", "layers.0.mlp.up_proj"]},
    "patterns": {
        "target_modules": r"model\.layers\.\d\.self_attn\.[qv]_proj",
        "rank_pattern": {"layers.1.self_attn.v_proj": 1},
        "exclude_modules": r"model\.layers\.0\.self_attn\.q_proj",
    },
}


@pytest.fixture(params=OPTIONS)
def made_plain(request, tmp_path):
    options = {"r": 2, "init_weights": False, **OPTIONS[request.param]}
    torch.manual_seed(1)
    model = noisy(get_peft_model(llama(), HiraConfig(**options)))
    model.save_pretrained(tmp_path)
    return options, logits(model), tmp_path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_wrappers_are_no_part_of_names(made_plain, layout, tmp_path_factory):
    """Saved from any layout the file is the same, and it loads on any."""
    options, expected, folder = made_plain
    torch.manual_seed(1)
    model = noisy(get_peft_model(LAYOUTS[layout](llama()), HiraConfig(**options)))
    assert torch.equal(logits(model), expected)
    other = tmp_path_factory.mktemp("other")
    model.save_pretrained(other)
    saved, plain = load_file(other / TENSORS), load_file(folder / TENSORS)
    assert saved.keys() == plain.keys()
    assert all(torch.equal(saved[key], plain[key]) for key in plain)
    given = get_peft_model_state_dict(model, state_dict=model.state_dict())
    assert given.keys() == plain.keys()
    loaded = PeftModel.from_pretrained(LAYOUTS[layout](llama()), folder).eval()
    assert torch.equal(logits(loaded), expected)
    set_peft_model_state_dict(loaded, {key: torch.zeros_like(value) for key, value in plain.items()})
    assert not torch.equal(logits(loaded), expected)
    set_peft_model_state_dict(loaded, plain)
    assert torch.equal(logits(loaded), expected)


FILES = {
    "torch.compile": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
    "torch.compile of a PeftModel": lambda key: f"_orig_mod.{key}",
    "torch.compile of layers": lambda key: key.replace("layers.1.", "layers.1._orig_mod."),
    "FSDP of layers": lambda key: key.replace("layers.1.", "layers.1._fsdp_wrapped_module."),
    "checkpointed layers": lambda key: key.replace("layers.1.", "layers.1._checkpoint_wrapped_module."),
    "DDP": lambda key: f"module.{key}",
}


@pytest.mark.parametrize("names", FILES)
@pytest.mark.parametrize("layout", ["plain", "layers compiled"])
def test_files_with_names_of_wrappers(made_plain, names, layout, tmp_path_factory):
    """Those that versions before saved, or other tools: loaded, and merged on a disk."""
    _, expected, folder = made_plain
    renamed(folder, FILES[names])
    assert torch.equal(logits(PeftModel.from_pretrained(LAYOUTS[layout](llama()), folder).eval()), expected)
    if layout == "plain":
        other = tmp_path_factory.mktemp("other")
        llama().save_pretrained(other / "base")
        hira.merge_checkpoint(other / "base", folder, other / "merged")
        torch.testing.assert_close(logits(LlamaForCausalLM.from_pretrained(other / "merged").eval()), expected)
        assert hira.inspect_adapter(folder, base=other / "base")


def test_names_that_differ_by_wrappers_alone_are_refused(tmp_path):
    get_peft_model(llama(), HiraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    name = next(iter(tensors))
    tensors[name.replace("base_model.model.", "base_model.model._orig_mod.")] = tensors[name] + 1
    save_file(tensors, tmp_path / TENSORS)
    with pytest.raises(HiraError, match="wrappers"):
        PeftModel.from_pretrained(llama(), tmp_path)
    with pytest.raises(HiraError, match="wrappers"):
        hira.inspect_adapter(tmp_path)


class Plain(nn.Module):
    """A model that is none of transformers', one of whose modules has the name of what DDP wraps."""

    def __init__(self) -> None:
        super().__init__()
        self.module, self.head = nn.Sequential(nn.Linear(6, 6)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.module(x))


WRAPS = {"plain": lambda model: model, "compiled": compiled, "in DataParallel": nn.DataParallel}


@pytest.mark.parametrize("saved_on", WRAPS)
@pytest.mark.parametrize("loaded_on", WRAPS)
def test_a_model_that_is_not_of_transformers(saved_on, loaded_on, tmp_path):
    torch.manual_seed(0)
    base, x = Plain(), torch.randn(2, 6)
    config = HiraConfig(r=2, target_modules=["0"], modules_to_save=["head"], init_weights=False)
    model = noisy(get_peft_model(WRAPS[saved_on](copy.deepcopy(base)), config))
    model.save_pretrained(tmp_path)
    assert "base_model.model.module.0.hira_A" in load_file(tmp_path / TENSORS)
    loaded = PeftModel.from_pretrained(WRAPS[loaded_on](copy.deepcopy(base)), tmp_path).eval()
    assert torch.equal(loaded(x), model(x))
    renamed(tmp_path, lambda key: key.replace("base_model.model.", "base_model.model.module."))
    again = PeftModel.from_pretrained(WRAPS[loaded_on](copy.deepcopy(base)), tmp_path).eval()
    assert torch.equal(again(x), model(x))


def test_an_adapter_added_by_transformers(tmp_path):
    """In a model that is no PeftModel, names have no prefix."""
    model = each_layer(compiled)(llama())
    model.add_adapter(HiraConfig(r=2, target_modules=["q_proj"], init_weights=False))
    noisy(model)
    state = get_peft_model_state_dict(model)
    assert not any("_orig_mod" in key for key in state)
    other = llama()
    other.add_adapter(HiraConfig(r=2, target_modules=["q_proj"]))
    set_peft_model_state_dict(other, {f"base_model.model.{key}": value for key, value in state.items()})
    assert torch.equal(logits(other), logits(model))


def test_lora_is_left_alone():
    model = get_peft_model(compiled(llama()), peft.LoraConfig(target_modules=["q_proj"]))
    assert all("_orig_mod" in key for key in get_peft_model_state_dict(model))
