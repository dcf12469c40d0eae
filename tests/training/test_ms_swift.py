"""The tuner for ms-swift, against the contract of its `tuners_map`; against ms-swift itself where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hira
from hira import HiraError

ARGUMENTS = {
    "task_type": "causal_lm",
    "lora_rank": 4,
    "lora_alpha": 8.0,
    "lora_dropout": 0.0,
    "lora_bias": "none",
    "lora_dtype": None,
    "use_dora": False,
    "use_rslora": False,
    "init_weights": True,
    "target_modules": ["q_proj", "down_proj"],
    "target_parameters": None,
    "modules_to_save": [],
}


def stand_in(monkeypatch) -> None:
    """Modules with what the tuner takes from ms-swift."""
    tuner, plugin = ModuleType("swift.pipelines.train.tuner"), ModuleType("swift.tuner_plugin")
    tuner.get_target_modules = lambda args, model: args.target_modules
    tuner.get_modules_to_save = lambda args, model, task_type=None: args.modules_to_save
    plugin.PeftTuner, plugin.tuners_map = type("PeftTuner", (), {}), {"ia3": object}
    for name in ("swift", "swift.pipelines", "swift.pipelines.train"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for module in (tuner, plugin):
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.fixture
def tuner(monkeypatch):
    if importlib.util.find_spec("swift") is None:
        stand_in(monkeypatch)
    monkeypatch.delitem(sys.modules, "hira.training.ms_swift", raising=False)
    importlib.import_module("hira.training.ms_swift")  # what a file for --external_plugins does
    tuners = importlib.import_module("swift.tuner_plugin")
    yield tuners.tuners_map["hira"]
    del tuners.tuners_map["hira"], sys.modules["hira.training.ms_swift"]


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
    model.model_meta = SimpleNamespace(is_multimodal=False, model_arch=None)
    return model


def prepared(tuner, **options):
    return tuner.prepare_model(SimpleNamespace(**{**ARGUMENTS, **options}), llama())


def test_loras_arguments_are_hiras(tuner):
    model = prepared(tuner)
    config = model.peft_config["default"]
    assert isinstance(model, peft.PeftModelForCausalLM)
    assert (config.r, config.hira_alpha, config.hira_dropout) == (4, 8.0, 0.0)
    layers = [layer for layer in model.modules() if isinstance(layer, hira.HiraLayer)]
    assert len(layers) == 4
    assert all(layer.alpha_scale["default"] != 1 for layer in layers)
    assert [name for name, p in model.named_parameters() if p.requires_grad and "hira_" not in name] == []


def test_an_alpha_of_zero_is_the_papers_hira(tuner):
    assert prepared(tuner, lora_alpha=0.0).peft_config["default"].hira_alpha is None


@pytest.mark.parametrize(
    ("task", "of_peft"), [("causal_lm", "CAUSAL_LM"), ("reranker", "SEQ_CLS"), ("embedding", None)]
)
def test_tasks(tuner, task, of_peft):
    assert prepared(tuner, task_type=task).peft_config["default"].task_type == of_peft


@pytest.mark.parametrize(
    ("argument", "value", "named"),
    [
        ("use_dora", True, "use_dora"),
        ("lora_bias", "all", "lora_bias"),
        ("lora_dtype", "bfloat16", "lora_dtype"),
        ("init_weights", "pissa", "init_weights"),
    ],
)
def test_arguments_without_a_counterpart_are_refused(tuner, argument, value, named):
    with pytest.raises(HiraError, match=named):
        prepared(tuner, **{argument: value})
