"""One training run, the same for all three methods: only the trainable parameters and their learning rate differ."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from peft import HiraConfig, LoraConfig, PeftModel, get_peft_model
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import (
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

import hira  # noqa: F401  PEFT's HIRA type now means hira's layers; nothing below mentions it
from model import MAX_TOKENS, load_base, load_tokenizer

Method = Literal["head", "LoRA", "HiRA"]
RATES_FILE = Path(__file__).with_name("learning_rates.json")  # written by search.py
METHODS: tuple[Method, ...] = ("head", "LoRA", "HiRA")
DESCRIPTIONS: dict[Method, str] = {
    "head": "the classification head alone, the rest frozen",
    "LoRA": "LoRA, W' = W0 + BA, and the head",
    "HiRA": "HiRA, W' = W0 ⊙ (1 + BA), and the head",
}
BATCH = 32
STEPS = 180  # three epochs of some 1,900 texts
RANK = 8
TARGETS = ["query", "key", "value"]


@dataclass(frozen=True)
class Rates:
    """Learning rates: of the classification head, and of the adapter (None without one)."""

    head: float
    adapter: float | None = None


@dataclass(frozen=True)
class Run:
    """A finished run; its trainer holds the model and the log."""

    trainer: Trainer
    seconds: float  # of training alone, validation taken out

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a logged quantity."""
        rows = [row for row in self.trainer.state.log_history if name in row]
        return [row["step"] for row in rows], [row[name] for row in rows]


class ProgressBar(TrainerCallback):
    """One bar for a run, with the latest training loss and validation accuracy behind it."""

    def __init__(self) -> None:
        columns = (TextColumn("  step"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, TextColumn("{task.fields[loss]}{task.fields[accuracy]}"))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.task = self.progress.add_task("", total=state.max_steps, loss="", accuracy="")
        self.progress.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        row = state.log_history[-1]
        if "loss" in row:
            self.progress.update(self.task, loss=f"training loss {row['loss']:.2f}")
        if "eval_accuracy" in row:
            self.progress.update(self.task, accuracy=f", validation accuracy {row['eval_accuracy']:.3f}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.progress.stop()


def build(method: Method, classes: int) -> PreTrainedModel | PeftModel:
    """The pretrained model with the method's parameters trainable: the head always, and an adapter's A and B."""
    base = load_base(classes)
    if method == "head":
        base.requires_grad_(False)
        base.classifier.requires_grad_(True)
        return base
    # The same rank on the same modules gives LoRA and HiRA the same number of parameters.
    if method == "LoRA":
        config = LoraConfig(
            task_type="SEQ_CLS", r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, modules_to_save=["classifier"]
        )
    else:
        config = HiraConfig(task_type="SEQ_CLS", r=RANK, target_modules=TARGETS, modules_to_save=["classifier"])
    model = get_peft_model(base, config)
    model.print_trainable_parameters()
    return model


def build_optimizer(model: torch.nn.Module, rates: Rates) -> torch.optim.AdamW:
    """AdamW with two parameter groups, because a fresh head and an adapter want different rates."""
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    head = [parameter for name, parameter in trainable if "classifier" in name]
    adapter = [parameter for name, parameter in trainable if "classifier" not in name]
    groups = [{"params": head, "lr": rates.head}]
    if adapter:
        groups.append({"params": adapter, "lr": rates.adapter})
    return torch.optim.AdamW(groups, weight_decay=0.0)


def tokenize(data: DatasetDict) -> DatasetDict:
    """Replace the texts by token ids, at most 64 each, short texts first, so that batches need little padding."""
    tokenizer = load_tokenizer()
    columns = {}
    for name, split in data.items():
        ids = tokenizer(split["text"][:], truncation=True, max_length=MAX_TOKENS)["input_ids"]
        by_length = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        columns[name] = split.remove_columns("text").add_column("input_ids", ids).select(by_length)
    return DatasetDict(columns)


def arrange(split: Dataset, seed: int, steps: int) -> Dataset:
    """The rows of every step in turn: batches of like lengths, which halves the time, in random order."""
    random = np.random.default_rng(seed)
    lengths = np.array([len(ids) for ids in split["input_ids"]])
    batches: list[np.ndarray] = []
    while len(batches) < steps:  # one pass is one epoch
        shuffled = random.permutation(len(lengths))
        by_length = shuffled[np.argsort(lengths[shuffled], kind="stable")]
        whole = by_length[: len(by_length) // BATCH * BATCH]
        batches += list(random.permutation(whole.reshape(-1, BATCH)))
    return split.select(np.concatenate(batches[:steps]))


def train(method: Method, rates: Rates, data: DatasetDict, seed: int, steps: int, output: Path) -> Run:
    """Train on the tokenized split "train", watching the split "validation"."""
    set_seed(seed)
    model = build(method, classes=1 + max(data["train"]["label"]))
    arguments = TrainingArguments(
        output_dir=str(output),
        num_train_epochs=1,  # of the arranged rows, which hold every epoch
        train_sampling_strategy="sequential",
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        lr_scheduler_type="linear",
        seed=seed,
        use_cpu=True,  # sized for two cores, and the same numbers with a GPU in the machine and without
        dataloader_pin_memory=False,
        eval_strategy="steps",
        eval_steps=max(steps // 6, 1),
        logging_steps=max(steps // 12, 1),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        label_names=["labels"],
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=arrange(data["train"], seed, steps),
        eval_dataset=data["validation"],
        data_collator=DataCollatorWithPadding(load_tokenizer()),
        compute_metrics=accuracy,
        optimizers=(build_optimizer(model, rates), None),  # None: the Trainer makes the linear schedule
        callbacks=[ProgressBar()],
    )
    trainer.remove_callback(PrinterCallback)  # it prints each row of the log as a dictionary
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    run = Run(trainer, seconds)
    validation = sum(run.curve("eval_runtime")[1])
    return Run(trainer, seconds - validation)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """The share of texts whose largest logit is the right one."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}
