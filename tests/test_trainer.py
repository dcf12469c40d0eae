"""transformers' Trainer, unmodified, with bfloat16, gradient checkpointing and accumulation; and resuming."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import hira

STEPS = 6


class Tokens(Dataset):
    """Sequences that count upwards, so that there is something to learn."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = torch.arange(i, i + 8) % 30 + 2
        return {"input_ids": ids, "labels": ids}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "eos_token_id": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads))


def model(dropout: float) -> PeftModel:
    base = llama()
    torch.manual_seed(1)
    targets = ["q_proj", "v_proj", "down_proj", "embed_tokens"]
    return get_peft_model(base, peft.HiraConfig(r=4, target_modules=targets, hira_dropout=dropout))


def trainer(adapted: PeftModel, folder: Path, steps: int = STEPS, **options) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        bf16=True,
        use_cpu=True,
        learning_rate=3e-2,
        lr_scheduler_type="constant",
        save_steps=STEPS // 2,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        seed=3,
        **options,
    )
    return Trainer(model=adapted, args=arguments, train_dataset=Tokens(), eval_dataset=Tokens())


def factors(adapted: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in adapted.named_parameters() if "hira_" in name}


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_resuming_ends_at_the_same_weights(tmp_path, dropout):
    straight = model(dropout)
    start = factors(straight)
    frozen = {name: p.clone() for name, p in straight.named_parameters() if "hira_" not in name}
    run = trainer(straight, tmp_path)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]
    end = factors(straight)
    assert [name for name in start if torch.equal(start[name], end[name])] == []
    assert [name for name, p in frozen.items() if not torch.equal(straight.get_parameter(name), p)] == []

    checkpoint = tmp_path / f"checkpoint-{STEPS // 2}"
    assert (checkpoint / "adapter_model.safetensors").is_file()
    assert not (checkpoint / "model.safetensors").exists()
    half = PeftModel.from_pretrained(llama(), checkpoint)
    assert [name for name, value in factors(half).items() if torch.equal(value, end[name])] == []

    resumed = model(dropout)
    again = trainer(resumed, tmp_path / "resumed")
    again.train(resume_from_checkpoint=str(checkpoint))
    assert again.state.global_step == STEPS
    assert [name for name, value in factors(resumed).items() if not torch.equal(value, end[name])] == []


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    adapted = model(0.0)
    half = {"eval_strategy": "steps", "eval_steps": STEPS // 2}
    run = trainer(adapted, tmp_path, load_best_model_at_end=True, metric_for_best_model="eval_loss", **half)
    run.train()
    best = PeftModel.from_pretrained(llama(), run.state.best_model_checkpoint)
    assert [name for name, value in factors(best).items() if not torch.equal(value, factors(adapted)[name])] == []


def test_an_adapter_that_transformers_added(tmp_path):
    """`model.add_adapter`, without a PeftModel around the model."""
    base = llama()
    base.add_adapter(peft.HiraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    start = factors(base)
    assert any(isinstance(module, hira.HiraLayer) for module in base.modules())
    trainer(base, tmp_path, steps=2).train()
    assert [name for name, value in factors(base).items() if torch.equal(value, start[name])] == []
