"""HiraCallback in transformers' Trainer and TRL's: what it logs, where it goes, and what it leaves alone."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings

import pytest
import torch
from datasets import Dataset
from peft import HiraConfig, get_peft_model
from tokenizers import Tokenizer, models
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from hira import HiraCallback, HiraError
from hira.training.measures import measure
from hira.tuner.model import hira_layers

ROWS = [{"input_ids": [(i + k) % 30 + 2 for k in range(8)]} for i in range(24)]
TARGETS = ["q_proj", "down_proj", "embed_tokens"]
OPTIONS = {"max_steps": 6, "per_device_train_batch_size": 3, "use_cpu": True, "report_to": [], "disable_tqdm": True}


class Reporter(TrainerCallback):
    """Stands for TensorBoard and the like: keeps what it is told to log."""

    def __init__(self) -> None:
        self.rows: list[dict] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.rows.append({**logs, "step": state.global_step})


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, pad_token_id=0))


def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["<pad>", "<eos>", *map(str, range(2, 32))])}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")), pad_token="<pad>", eos_token="<eos>"
    )


def adapted(**options) -> nn.Module:
    torch.manual_seed(1)
    return get_peft_model(llama(), HiraConfig(r=4, target_modules=TARGETS, **options))


def trainer(folder, model: nn.Module | None = None, **options) -> Trainer:
    rows = [{**row, "labels": row["input_ids"]} for row in ROWS]
    arguments = TrainingArguments(str(folder), **{**OPTIONS, "learning_rate": 1e-1, **options})
    return Trainer(model or adapted(), arguments, train_dataset=Dataset.from_list(rows), callbacks=[Reporter()])


def reported(run: Trainer) -> list[dict]:
    return next(each for each in run.callback_handler.callbacks if isinstance(each, Reporter)).rows


def test_measures_go_where_the_trainer_reports(tmp_path):
    run = trainer(tmp_path, logging_steps=2)
    run.add_callback(HiraCallback(run, every=3))
    run.train()
    for rows in (run.state.log_history, reported(run)):
        measured = [row for row in rows if any(key.startswith("hira/") for key in row)]
        assert [row["step"] for row in measured] == [3, 6]
        assert [row["step"] for row in rows if "loss" in row] == [2, 4, 6]  # the trainer's own are all there
    layers = hira_layers(run.model)
    assert len(layers) == 5
    for layer in layers:
        for key, value in measure(layer, ["default"])._asdict().items():
            assert measured[-1][f"hira/{key}/{layer.name}"] == pytest.approx(value)
    assert len(measured[-1]) == 15 + 2  # and step, epoch
    assert all(math.isfinite(value) and value > 0 for value in measured[-1].values())


def test_it_changes_nothing_of_the_training(tmp_path):
    losses = []
    for every in (None, 1):
        run = trainer(tmp_path, logging_steps=1)
        if every:
            run.add_callback(HiraCallback(run, every=every))
        run.train()
        losses.append([row["loss"] for row in run.state.log_history if "loss" in row])
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_trl_keeps_its_own_metrics(tmp_path):
    """They are means over the steps since the last row, which a row in between would cut short."""
    rows = []
    for every in (None, 3):
        torch.manual_seed(1)
        run = SFTTrainer(
            llama(),
            SFTConfig(str(tmp_path), learning_rate=1e-1, logging_steps=2, **OPTIONS),
            train_dataset=Dataset.from_list(ROWS),
            processing_class=tokenizer(),
            peft_config=HiraConfig(r=4, target_modules=TARGETS),
        )
        if every:
            run.add_callback(HiraCallback(run, every=every))
        run.train()
        rows.append([row for row in run.state.log_history if "loss" in row])
    assert [row["mean_token_accuracy"] for row in rows[0]] == [row["mean_token_accuracy"] for row in rows[1]]
    assert any("hira/effective_rank/model.embed_tokens" in row for row in run.state.log_history)
    assert not any("hira/" in key and "mean_token_accuracy" in row for row in run.state.log_history for key in row)


def test_only_the_main_process_measures(tmp_path):
    run = trainer(tmp_path)
    callback = HiraCallback(run, every=1)
    run.state.is_world_process_zero, run.state.global_step = False, 1
    callback.on_step_end(run.args, run.state, run.control, model=run.model)
    assert run.state.log_history == []


def test_a_learning_rate_for_lora_is_told_of_once(tmp_path):
    for rate, hira_alpha, told in ((1e-4, None, 1), (1e-4, 8, 0), (1e-1, None, 0)):
        run = trainer(tmp_path, adapted(hira_alpha=hira_alpha), learning_rate=rate)
        run.add_callback(HiraCallback(run))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run.train()
        assert sum("hira_alpha=8" in str(each.message) for each in caught) == told


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "10"])
def test_an_interval_that_is_none(tmp_path, every):
    with pytest.raises(HiraError, match="every"):
        HiraCallback(trainer(tmp_path), every=every)


def test_weights_divided_over_processes_are_refused_before_the_first_step(tmp_path):
    run = trainer(tmp_path)
    run.add_callback(HiraCallback(run))
    layer = hira_layers(run.model)[0]
    layer.get_base_layer().weight.ds_id = 1  # as DeepSpeed marks what ZeRO-3 divides
    with pytest.raises(HiraError, match="ZeRO-3"):
        run.train()
    assert run.state.global_step == 0


def test_the_check_of_the_learning_rate_alone(tmp_path):
    run = trainer(tmp_path, learning_rate=1e-4)
    run.add_callback(HiraCallback(run, every=None))
    hira_layers(run.model)[0].get_base_layer().weight.ds_id = 1  # which only measuring would mind
    run.train()
    assert not any("hira/" in key for row in run.state.log_history for key in row)


def test_hira_is_imported_without_transformers():
    program = "import hira, sys; assert 'transformers' not in sys.modules; assert 'HiraCallback' in dir(hira)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_model_without_hira(tmp_path):
    """Nothing to measure is no error: the same script may train LoRA too."""
    run = trainer(tmp_path, llama())
    run.add_callback(HiraCallback(run, every=1))
    run.train()
    assert run.state.global_step == 6
