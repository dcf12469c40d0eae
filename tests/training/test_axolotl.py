"""The plug-in for axolotl, against the contract of its `BasePlugin`; against axolotl itself where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from types import ModuleType

import peft
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import hira
from hira import HiraConfig, HiraError

LINEAR = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


class Cfg(dict):
    """As axolotl's DictDefault: settings are attributes, None where they are not given."""

    def __getattr__(self, name):
        return self.get(name)


@dataclass(frozen=True)
class AdapterCapabilities:
    name: str
    lora_like: bool = False
    relora: bool = False


def stand_in(monkeypatch) -> None:
    """Modules with what the plug-in takes from axolotl."""
    base, adapter = ModuleType("axolotl.integrations.base"), ModuleType("axolotl.loaders.adapter")
    base.AdapterCapabilities, base.BasePlugin = AdapterCapabilities, type("BasePlugin", (), {})
    adapter.find_all_linear_names = lambda model: list(reversed(LINEAR))
    for name in ("axolotl", "axolotl.integrations", "axolotl.loaders"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for module in (base, adapter):
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.fixture
def plugin(monkeypatch):
    if importlib.util.find_spec("axolotl") is None:
        stand_in(monkeypatch)
        monkeypatch.delitem(sys.modules, "hira.training.axolotl", raising=False)
    # as axolotl loads it, from `plugins: [hira.training.axolotl.HiraPlugin]`
    made = importlib.import_module("hira.training.axolotl").HiraPlugin()
    yield made
    sys.modules.pop("hira.training.axolotl")


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))


def cfg(**options) -> Cfg:
    return Cfg({"adapter": "hira", "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, **options})


def test_it_offers_the_adapter(plugin):
    (capability,) = plugin.get_adapter_capabilities()
    assert (capability.name, capability.lora_like, capability.relora) == ("hira", False, False)


def test_other_adapters_are_left_to_others(plugin):
    assert plugin.load_adapter(llama(), cfg(adapter="lora")) is None


def test_loras_settings_are_hiras(plugin):
    model, config = plugin.load_adapter(llama(), cfg(lora_target_linear=True, lora_target_modules=["embed_tokens"]))
    assert isinstance(model, peft.PeftModelForCausalLM)
    assert isinstance(config, HiraConfig)
    assert (config.r, config.hira_alpha, config.hira_dropout) == (4, 8, 0.0)
    assert config.target_modules == {*LINEAR, "embed_tokens"}
    layers = [layer for layer in model.modules() if isinstance(layer, hira.HiraLayer)]
    assert len(layers) == 15
    assert all(layer.alpha_scale["default"] != 1 for layer in layers)


def test_settings_that_are_off_are_none(plugin):
    off = {"peft_use_dora": False, "peft_use_rslora": None, "lora_modules_to_save": [], "lora_alpha": None}
    _, config = plugin.load_adapter(llama(), cfg(lora_target_modules=["q_proj"], **off), config_only=True)
    assert config.hira_alpha is None


def test_the_configuration_alone(plugin):
    base = llama()
    model, config = plugin.load_adapter(base, cfg(lora_target_modules="q_proj"), config_only=True)
    assert model is None and config.target_modules == "q_proj"
    assert not any(isinstance(layer, hira.HiraLayer) for layer in base.modules())


def test_a_saved_adapter(plugin, tmp_path):
    model, _ = plugin.load_adapter(llama(), cfg(lora_target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    for inference in (False, True):
        again, _ = plugin.load_adapter(llama(), cfg(lora_model_dir=str(tmp_path)), inference=inference)
        assert any(p.requires_grad for p in again.parameters()) is not inference


def test_a_classifier(plugin):
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    base = BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=2))
    model, _ = plugin.load_adapter(base, cfg(lora_target_modules=["query"]))
    assert isinstance(model, peft.PeftModelForSequenceClassification)


def test_the_learning_rate_is_checked(plugin):
    (callback,) = plugin.add_callbacks_post_trainer(cfg(), None)
    assert isinstance(callback, hira.HiraCallback) and callback.every is None
    assert plugin.add_callbacks_post_trainer(cfg(adapter="lora"), None) == []


@pytest.mark.parametrize(
    ("setting", "value", "named"),
    [
        ("peft_use_dora", True, "use_dora"),
        ("peft_init_lora_weights", "pissa", "init_weights"),
        ("peft", Cfg(loftq_config={"loftq_bits": 4}), "loftq_config"),
    ],
)
def test_settings_without_a_counterpart_are_refused(plugin, setting, value, named):
    with pytest.raises(HiraError, match=named):
        plugin.load_adapter(llama(), cfg(**{setting: value}))
