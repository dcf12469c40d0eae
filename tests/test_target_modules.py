"""Which modules are adapted, by name, by expression and by default, and warnings of names that match none."""

from __future__ import annotations

import dataclasses
import types
import warnings
from collections.abc import Callable

import peft
import pytest
import torch
from peft import get_peft_model
from small_models import CLOSE, adapted, bert, config, llama
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import hira
from hira import HiraError


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"layers_to_transform": [0, 2]}, {"0.self_attn.q_proj", "2.self_attn.q_proj"}),
        ({"layers_to_transform": 1, "layers_pattern": "layers"}, {"1.self_attn.q_proj"}),
        ({"exclude_modules": ["layers.1.self_attn.q_proj"]}, {"0.self_attn.q_proj", "2.self_attn.q_proj"}),
        ({"exclude_modules": r".*layers\.[02].*"}, {"1.self_attn.q_proj"}),
        ({"target_modules": r".*\.1\..*(k_proj|gate_proj)"}, {"1.self_attn.k_proj", "1.mlp.gate_proj"}),
    ],
    ids=["indices", "index and pattern", "names", "regular expression", "target expression"],
)
def test_which_modules_are_adapted(options, expected):
    model = get_peft_model(llama(), config(**{"target_modules": ["q_proj"], **options}))
    assert {name.removeprefix("model.layers.") for name in adapted(model)} == expected


def test_all_linear_leaves_the_output_layer_alone():
    model = get_peft_model(llama(), config(target_modules="all-linear"))
    assert {name.rpartition(".")[2] for name in adapted(model)} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }


def t5() -> T5ForConditionalGeneration:
    sizes = {"vocab_size": 48, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    torch.manual_seed(0)
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (llama, {"q_proj", "v_proj"}),
        (bert, {"query", "value"}),
        (t5, {"q", "v"}),
        (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=48, n_embd=16, n_layer=2, n_head=2)), {"c_attn"}),
        (lambda: OPTForCausalLM(OPTConfig(vocab_size=48, hidden_size=16, ffn_dim=24, word_embed_proj_dim=16,
                                          num_attention_heads=2, num_hidden_layers=2)), {"q_proj", "v_proj"}),
    ],
    ids=["llama", "bert", "t5", "gpt2", "opt"],
)  # fmt: skip
def test_default_targets_of_known_architectures(build, expected):
    model = get_peft_model(build(), peft.HiraConfig(r=2))
    assert {name.rpartition(".")[2] for name in adapted(model)} == expected


class Projection(nn.Module):
    def __init__(self, config: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config, self.c_attn = config, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_attn(x)


@dataclasses.dataclass
class Width:
    n_embd: int = 8


CONFIGS = {
    "dataclass": Width(),
    "dict": {"width": 8},
    "dict without a type": {"model_type": None},
    "namespace": types.SimpleNamespace(model_type=None),
    "none": None,
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_config_need_not_say_the_type_of_the_model(config):
    hira_config = hira.HiraConfig(r=2, target_modules=["c_attn"], init_weights=False)
    for add in (get_peft_model, lambda model, config: peft.inject_adapter_in_model(config, model)):
        model = add(Projection(config), hira_config)
        x = torch.randn(3, 8)
        layer = next(module for module in model.modules() if isinstance(module, hira.HiraLayer))
        W = layer.base_layer.weight * (1 + layer.hira_B["default"] @ layer.hira_A["default"])
        torch.testing.assert_close(model(x), x @ W.T + layer.base_layer.bias, **CLOSE)


@pytest.mark.parametrize("config", [*CONFIGS.values(), {"model_type": "own"}], ids=[*CONFIGS, "own type"])
def test_only_default_modules_need_the_type_of_the_model(config):
    with pytest.raises(HiraError, match="target_modules"):
        get_peft_model(Projection(config), hira.HiraConfig(r=2))


def warnings_of(add: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        add()
    return [str(warning.message) for warning in caught if "target_modules" in str(warning.message)]


@pytest.mark.parametrize("mixed", [False, True])
def test_names_that_match_nothing_beside_others_that_do_are_warned_of(mixed):
    config = hira.HiraConfig(target_modules=["q_proj", "w1_typo", "self_attn.v_proj", "v_attn"])
    (message,) = warnings_of(lambda: get_peft_model(llama(), config, mixed=mixed))
    assert "no module for 'v_attn', 'w1_typo' in target_modules" in message
    assert "['q_proj', 'self_attn.v_proj'] are adapted" in message


def test_a_second_adapter_is_warned_of_too():
    model = get_peft_model(llama(), hira.HiraConfig(target_modules=["q_proj"]))
    (message,) = warnings_of(lambda: model.add_adapter("b", hira.HiraConfig(target_modules=["q_proj", "qkv"])))
    assert "'qkv'" in message


@pytest.mark.parametrize(
    "targets",
    [["q_proj", "model.layers.1.mlp.up_proj"], "all-linear", ".*q_proj", None, ["embed_tokens", "lm_head"]],
    ids=str,
)
def test_names_that_all_match_are_not_warned_of(targets):
    model = get_peft_model(llama(), hira.HiraConfig(target_modules=targets))
    assert not warnings_of(lambda: model.add_adapter("b", hira.HiraConfig(target_modules=targets)))


def test_layers_and_exclusions_are_not_misspelt_names():
    config = hira.HiraConfig(
        target_modules=["q_proj", "v_proj"], layers_to_transform=[1], exclude_modules=[".*v_proj", "v_proj"]
    )
    assert not warnings_of(lambda: get_peft_model(llama(), config))
