"""TRL's trainers take the adapter that they are given as the reference, not the base model."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import HiraConfig, LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

trl = pytest.importorskip("trl")

IDS = torch.tensor([[3, 4, 5, 6]])
CASES = {
    "DPO": {"prompt": ["a b", "c"], "chosen": [" d", " e f"], "rejected": [" g", " h"]},
    "KTO": {"prompt": ["a b", "c"], "completion": [" d", " e f"], "label": [True, False]},
    "GRPO": {"prompt": ["a b", "c"]},
    "RLOO": {"prompt": ["a b", "c"]},
}


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"]
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))


def trained(folder, **options) -> PeftModel:
    """A model with an adapter that was trained before."""
    config = HiraConfig(r=4, init_weights=False, **{"target_modules": ["q_proj", "embed_tokens"], **options})
    get_peft_model(llama(), config).save_pretrained(folder)
    return PeftModel.from_pretrained(llama(), folder, is_trainable=True)


def trainer(kind: str, model: PeftModel, folder):
    cls, config = getattr(trl, f"{kind}Trainer"), getattr(trl, f"{kind}Config")
    options = {"output_dir": folder, "report_to": [], "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    if kind in ("GRPO", "RLOO"):
        options |= {"beta": 0.1, "num_generations": 2}
        more = {"reward_funcs": lambda completions, **kwargs: [0.0] * len(completions)}
    else:
        options |= {"max_steps": 1, "learning_rate": 0.0, "logging_steps": 1}
        more = {}
    args = config(per_device_train_batch_size=2, **options)
    data = Dataset.from_dict(CASES[kind])
    return cls(model=model, args=args, train_dataset=data, processing_class=tokenizer(), **more)


def outputs(model: PeftModel) -> dict[str, torch.Tensor]:
    model.eval()
    found = {}
    with torch.no_grad():
        for name in ("default", "ref"):
            model.set_adapter(name)
            found[name] = model(input_ids=IDS).logits
        with model.disable_adapter():
            found["base"] = model(input_ids=IDS).logits
    model.set_adapter("default")
    return found


@pytest.mark.parametrize("kind", CASES)
def test_the_reference_is_the_adapter(kind, tmp_path):
    model = trainer(kind, trained(tmp_path), tmp_path / "out").model
    found = outputs(model)
    assert torch.equal(found["ref"], found["default"])
    assert not torch.allclose(found["ref"], found["base"], atol=1e-3)
    for name, parameter in model.named_parameters():
        if name.endswith(".ref"):
            of_default = model.get_parameter(name.removesuffix("ref") + "default")
            assert torch.equal(parameter, of_default)
            assert parameter.data_ptr() != of_default.data_ptr()
            assert not parameter.requires_grad


def test_the_loss_of_the_first_step_is_log_2(tmp_path):
    """At the first step the adapter has moved nowhere from its reference."""
    result = trainer("DPO", trained(tmp_path), tmp_path / "out").train()
    assert result.training_loss == pytest.approx(0.6931472, abs=1e-6)


def test_ranks_that_a_file_decided_are_those_of_the_reference(tmp_path):
    """A file's rank r wins over its rank_pattern; the reference is of that rank too."""
    config = {"target_modules": ["q_proj", "v_proj"]}
    model = trained(tmp_path, **config)
    model.peft_config["default"].rank_pattern = {"v_proj": 2}
    model.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert model.get_base_model().model.layers[0].self_attn.v_proj.r == {"default": 4}
    found = outputs(trainer("DPO", model, tmp_path / "out").model)
    assert torch.equal(found["ref"], found["default"])


def test_other_callers_get_a_new_adapter():
    model = get_peft_model(llama(), HiraConfig(r=4, target_modules=["q_proj"], init_weights=False))
    config = model.peft_config["default"]
    model.add_adapter("ref", config)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert not torch.equal(layer.hira_A["ref"], layer.hira_A["default"])


def test_lora_is_left_alone(tmp_path):
    get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).save_pretrained(
        tmp_path
    )
    model = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    found = outputs(trainer("DPO", model, tmp_path / "out").model)
    assert torch.equal(found["ref"], found["default"])
