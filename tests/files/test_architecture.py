"""What is asked of transformers about a model, and what is known without asking."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as hf
from transformers.conversion_mapping import get_model_conversion_mapping

from hira.errors import HiraError
from hira.files.model.architecture import architecture_of
from hira.files.model.parameters import AS_IN_MODEL, THEIR_EMBEDDINGS, Location

SMALL = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}


def architecture(config: hf.PretrainedConfig, name: str):
    found = architecture_of({**config.to_dict(), "architectures": [name]}, "config.json")
    assert found is not None
    return found


@pytest.mark.parametrize("name", sorted(AS_IN_MODEL))
def test_models_that_need_no_asking(name):
    """Their files have every parameter under its own name, as (out, in), and only the embeddings share a weight."""
    kind = getattr(hf, name).config_class
    config = kind(**SMALL, **HEADS, head_dim=8, tie_word_embeddings=True, pad_token_id=0)
    with torch.device("meta"):
        model = getattr(hf, name)(config)
    names = list(model.state_dict())
    found = architecture(config, name)
    assert found.locate(names) == {name: Location(((name,),)) for name in names}
    assert get_model_conversion_mapping(model, add_legacy=False) == []
    assert not any(found.is_transposed(name) for name in names)
    assert found.embeddings() == THEIR_EMBEDDINGS
    assert {found.tied(name) for name in names if len(found.tied(name)) > 1} == {THEIR_EMBEDDINGS}


def test_experts_that_lie_in_tensors_of_their_own():
    found = architecture(hf.MixtralConfig(**SMALL, **HEADS, num_local_experts=11), "MixtralForCausalLM")
    start = "model.layers.0.block_sparse_moe.experts"
    names = [f"{start}.{e}.{w}.weight" for e in sorted(range(11), key=str) for w in ("w1", "w2", "w3")]
    located = found.locate(names)
    assert located == {
        "model.layers.0.mlp.experts.gate_up_proj": Location(
            tuple((f"{start}.{e}.w1.weight", f"{start}.{e}.w3.weight") for e in range(11)), stacked=True
        ),
        "model.layers.0.mlp.experts.down_proj": Location(
            tuple((f"{start}.{e}.w2.weight",) for e in range(11)), stacked=True
        ),
    }
    assert found.locate(names[:-1])["model.layers.0.mlp.experts.gate_up_proj"] is None  # one is missing


def test_orientation():
    gpt2 = architecture(hf.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2), "GPT2LMHeadModel")
    assert gpt2.is_transposed("transformer.h.0.attn.c_proj.weight")
    assert not gpt2.is_transposed("lm_head.weight")
    config = hf.GptOssConfig(**SMALL, **HEADS, num_local_experts=3, head_dim=8)
    assert architecture(config, "GptOssForCausalLM").is_transposed("model.layers.0.mlp.experts.down_proj")


def test_models_without_embeddings():
    mobile = hf.MobileNetV2Config(depth_multiplier=0.1, min_depth=4, depth_divisible_by=4)
    assert architecture(mobile, "MobileNetV2ForImageClassification").embeddings() == ()


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"architectures": ["LlamaForCausalLM"]},
        {"architectures": ["NoSuchModel"], "model_type": "llama"},
        {"architectures": ["LlamaForCausalLM"], "model_type": "no-such-type"},
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "auto_map": {"AutoModel": "code.Model"}},
        {"architectures": "LlamaForCausalLM", "model_type": ["llama"]},
        {"architectures": [None], "model_type": "llama"},
    ],
)
def test_unknown_architectures(config):
    assert architecture_of(config, "config.json") is None


def test_a_configuration_that_makes_no_model():
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": "wide"}
    with pytest.raises(HiraError, match=r"here/config\.json does not describe a LlamaForCausalLM of transformers"):
        architecture_of(config, "here/config.json")


MAMBA = {"num_heads": 4, "head_dim": 8, "hidden_size": 16, "n_groups": 1, "num_hidden_layers": 1, "vocab_size": 12}


def test_numbers_that_JSON_does_not_have():
    """As transformers 5 writes those of the models whose steps in time have no limit."""
    config = json.loads(hf.Mamba2Config(**MAMBA).to_json_string()) | {"architectures": ["Mamba2ForCausalLM"]}
    assert config["time_step_limit"][1] == {"__float__": "Infinity"}
    found = architecture_of(config, "config.json")
    assert found is not None and found.locate(["backbone.embeddings.weight"]).keys() == {"backbone.embeddings.weight"}
