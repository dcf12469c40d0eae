"""The ways into PEFT and transformers: injection, add_adapter, auto classes, loading on the meta device."""

from __future__ import annotations

import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hira

IDS = torch.tensor([[1, 5, 9, 13], [1, 6, 7, 8]])
# outputs of one model by two orders of the same float32 operations
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "eos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()


def config(**options) -> peft.HiraConfig:
    return peft.HiraConfig(**{"r": 3, "target_modules": ["q_proj", "embed_tokens"], "init_weights": False, **options})


def layers(model: nn.Module) -> list[hira.HiraLayer]:
    return [module for module in model.modules() if isinstance(module, hira.HiraLayer)]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


# transformers


def test_transformers_add_adapter():
    model = llama()
    before = logits(model)
    model.add_adapter(config())
    assert len(layers(model)) == 3
    adapted = logits(model)
    assert not torch.allclose(adapted, before)
    model.disable_adapters()
    assert torch.equal(logits(model), before)
    model.enable_adapters()
    assert torch.equal(logits(model), adapted)
    model.add_adapter(config(r=2), "other")
    assert model.active_adapters() == ["other"]
    assert layers(model)[0].r == {"default": 3, "other": 2}
    model.set_adapter("default")
    assert torch.equal(logits(model), adapted)
    model.delete_adapter("other")
    assert torch.equal(logits(model), adapted)


def test_transformers_add_adapter_refuses_a_name_that_is_taken():
    model = llama()
    model.add_adapter(config())
    before = logits(model)
    with pytest.raises(ValueError, match="default"):
        model.add_adapter(config(r=2))
    assert torch.equal(logits(model), before)


def test_transformers_save_and_load(tmp_path):
    """What save_pretrained of a model with an adapter writes is a PEFT adapter, for both kinds of loading."""
    model = llama()
    model.add_adapter(config())
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    loaded = llama()
    loaded.load_adapter(str(tmp_path))
    assert torch.equal(logits(loaded), expected)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), expected)


def test_transformers_auto_model_loads_base_and_adapter(tmp_path):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config()).eval()
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert len(layers(loaded)) == 3
    assert torch.equal(logits(loaded), expected)


# PEFT


def test_peft_auto_model(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, config(task_type="CAUSAL_LM")).eval()
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert type(loaded.base_model) is hira.HiraModel
    assert isinstance(loaded.peft_config["default"], hira.HiraConfig)
    assert torch.equal(logits(loaded), expected)


def test_inject_adapter_in_model():
    model = llama()
    before = logits(model)
    injected = peft.inject_adapter_in_model(config(), model, adapter_name="mine")
    assert injected is model
    assert [layer.r for layer in layers(model)] == [{"mine": 3}] * 3
    assert not torch.allclose(logits(model), before)
    state = get_peft_model_state_dict(model, adapter_name="mine", save_embedding_layers=False)
    factors = {"hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"}
    assert {key.rpartition(".")[2] for key in state} == factors
    again = peft.inject_adapter_in_model(config(), llama(), adapter_name="mine", low_cpu_mem_usage=True)
    result = set_peft_model_state_dict(again, state, adapter_name="mine", low_cpu_mem_usage=True)
    assert result.unexpected_keys == []
    assert torch.equal(logits(again), logits(model))


def test_inject_from_a_state_dict():
    """PEFT can take the modules to adapt from a state dict's keys instead of the configuration."""
    source = peft.inject_adapter_in_model(config(target_modules=["q_proj"]), llama())
    state = get_peft_model_state_dict(source)
    model = peft.inject_adapter_in_model(config(target_modules=["o_proj"]), llama(), state_dict=state)
    assert {layer.name.rpartition(".")[2] for layer in layers(model)} == {"q_proj"}


def test_state_dict_round_trip():
    model = get_peft_model(llama(), config()).eval()
    state = get_peft_model_state_dict(model)
    other = llama()
    torch.manual_seed(1)
    other = get_peft_model(other, config()).eval()
    assert not torch.equal(logits(other), logits(model))
    result = set_peft_model_state_dict(other, state)
    assert result.unexpected_keys == []
    assert torch.equal(logits(other), logits(model))
    assert all(torch.equal(value, state[key]) for key, value in get_peft_model_state_dict(other).items())
    whole = get_peft_model(llama(), config()).eval()
    whole.load_state_dict(model.state_dict())
    assert torch.equal(logits(whole), logits(model))


@pytest.mark.parametrize("how", ["from_pretrained", "load_adapter"])
def test_low_cpu_mem_usage(tmp_path, how):
    model = get_peft_model(llama(), config(rank_pattern={"layers.0.self_attn.q_proj": 1})).eval()
    expected = logits(model)
    model.save_pretrained(tmp_path)
    if how == "from_pretrained":
        loaded = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=True)
    else:
        loaded = get_peft_model(llama(), config(target_modules=["q_proj"], init_weights=True)).eval()
        loaded.load_adapter(tmp_path, "second", low_cpu_mem_usage=True)
        loaded.set_adapter("second")
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}
    assert torch.equal(logits(loaded), expected)


def test_low_cpu_mem_usage_makes_the_adapter_on_the_meta_device():
    model = get_peft_model(llama(), config(), low_cpu_mem_usage=True)
    devices = {"hira_" in name: set() for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        devices["hira_" in name].add(parameter.device.type)
    assert devices == {True: {"meta"}, False: {"cpu"}}


@pytest.mark.parametrize("trainable", [False, True])
def test_is_trainable(tmp_path, trainable):
    get_peft_model(llama(), config()).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=trainable)
    found = {"hira_" in name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert found == {True: trainable, False: False}


@pytest.mark.parametrize(("cast", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_adapter_dtype(tmp_path, cast, dtype):
    """PEFT keeps adapters of half-precision models in float32, unless asked not to."""
    model = get_peft_model(llama().bfloat16(), config(), autocast_adapter_dtype=cast).eval()
    assert {parameter.dtype for name, parameter in model.named_parameters() if "hira_" in name} == {dtype}
    assert logits(model).dtype == torch.bfloat16
    y = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama().bfloat16(), tmp_path, autocast_adapter_dtype=cast)
    assert torch.equal(logits(loaded), y)


def test_model_status():
    model = get_peft_model(llama(), config())
    status = peft.get_model_status(model)
    assert status.active_adapters == ["default"]
    assert status.enabled is True
    assert status.num_adapter_layers == 3
    assert status.peft_types == {"default": "HIRA"}
    model.merge_adapter()
    assert peft.get_model_status(model).merged_adapters == ["default"]
    layer = next(status for status in peft.get_layer_status(model) if status.name.endswith("embed_tokens"))
    assert layer.module_type == "hira.Embedding"
    assert layer.available_adapters == ["default"]


def test_gradient_checkpointing_reaches_the_adapters():
    model = get_peft_model(llama(), config(target_modules=["q_proj", "down_proj"])).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    for reentrant in (True, False):
        model.zero_grad()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(input_ids=IDS, labels=IDS).loss.backward()
        for name, gradient in gradients.items():
            torch.testing.assert_close(model.get_parameter(name).grad, gradient, **CLOSE)
