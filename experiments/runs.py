"""One run: a model is pretrained, made ready by a method, trained, and measured on the way."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypedDict

import torch
from experiments.methods import Method
from experiments.tasks import BATCH, HEAD, HEAD_RATE, MODELS, TASKS, Data, loss, measured
from torch import Tensor, nn

from hira.ops.measures import effective_rank

PRETRAINING_STEPS, PRETRAINING_RATE = 1500, 2e-3
ROUNDING = 1e-6  # a singular value of an update that is smaller, beside the largest, does not count


class Run(NamedTuple):
    """One training run."""

    task: str
    method: str
    r: int
    rate: float
    seed: int
    steps: int
    share: float = 1  # of the training data

    @property
    def key(self) -> str:
        """Its name in the results."""
        share = "" if self.share == 1 else f" | {self.share:.0%} of the data"
        return f"{self.task} | {self.method} | r {self.r} | {self.rate:g} | seed {self.seed} | {self.steps}{share}"


class Record(TypedDict):
    """What a run gives: values at some steps, the first of them 0; those of the source task where there is one.

    Seconds are of the processor, in training alone. The ranks are means over the adapted layers' W' - W0.
    """

    parameters: int
    step: list[int]
    seconds: list[float]
    validation: list[float]
    validation_metric: list[float]
    test: list[float]
    test_metric: list[float]
    source: list[float]
    rank: float
    effective_rank: float


Records = dict[str, Record]


def fit(
    model: nn.Module,
    data: Data,
    rate: float,
    steps: int,
    seed: int,
    faster: float = 1,
    watch: Callable[[int], None] | None = None,
) -> None:
    """Train what has requires_grad by Adam with a cosine schedule; `watch` is called with the number of steps taken.

    B of a LoRA has `faster` times the rate; a new head has its own.
    """
    inputs, targets = data
    generator = torch.Generator().manual_seed(seed)
    groups: dict[float, list[Tensor]] = {rate: [], HEAD_RATE: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own = HEAD_RATE if HEAD in name else rate * faster if "lora_B" in name else rate
            groups.setdefault(own, []).append(parameter)
    optimizer = torch.optim.Adam([{"params": group, "lr": own} for own, group in groups.items()])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps))
    model.train()
    for step in range(steps):
        rows = torch.randint(len(inputs), (BATCH,), generator=generator)
        optimizer.zero_grad()
        loss(model(inputs[rows]), targets[rows]).backward()
        optimizer.step()
        schedule.step()
        if watch:
            watch(step + 1)
            model.train()


def pretrain(name: str, folder: Path, steps: int = PRETRAINING_STEPS) -> None:
    """Train a model on its first task and keep it in a folder; nothing where it is there already."""
    path = folder / f"{name}.pt"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(1)
        torch.manual_seed(0)
        model, source = MODELS[name].make(), MODELS[name].source
        if source is not None:
            fit(model, source().train, PRETRAINING_RATE, steps, seed=0)
        torch.save(model.state_dict(), path)


def pretrained(name: str, folder: Path) -> nn.Module:
    """A model that `pretrain` has kept."""
    model = MODELS[name].make()
    model.load_state_dict(torch.load(folder / f"{name}.pt", weights_only=True))
    return model


def adapted(method: Method, model: nn.Module, name: str, r: int) -> nn.Module:
    """A model made ready by a method, its new head with it."""
    ready = method.adapt(model, MODELS[name].targets.split(), r)
    for parameter_name, parameter in ready.named_parameters():
        if HEAD in parameter_name:
            parameter.requires_grad_(True)
    return ready


def train(run: Run, method: Method, folder: Path, points: int | None = None, every: int = 1) -> Record:
    """Run it.

    Args:
        run: what to run. Its seed chooses the adapter's start, the order of the data, and which share of it.
        method: the method that its name stands for.
        folder: where `pretrain` has kept the model.
        points: how often to measure, beside the start; the task's own number if it is None.
        every: 2 to measure every second row of those that the task has measured, and so on.
    """
    torch.set_num_threads(1)
    task = TASKS[run.task]
    data, source = task.data(), MODELS[task.model].source
    base = pretrained(task.model, folder)
    torch.manual_seed(run.seed)
    model = adapted(method, base, task.model, run.r)
    rows = torch.randperm(len(data.train[0]), generator=torch.Generator().manual_seed(run.seed))
    rows = rows[: max(1, round(run.share * len(rows)))] if run.share < 1 else torch.arange(len(rows))
    record = Record(
        parameters=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        step=[], seconds=[], validation=[], validation_metric=[], test=[], test_metric=[], source=[],
        rank=0, effective_rank=0,
    )  # fmt: skip
    steps = run.steps if record["parameters"] else 0
    points = points or task.points
    marks = {round(steps * point / points) for point in range(points + 1)}
    every *= task.every
    watched = [
        (thinned(data.validation, every), record["validation"], record["validation_metric"]),
        (thinned(data.test, every), record["test"], record["test_metric"]),
    ]
    if source is not None:
        watched.append((thinned(source().test, every), record["source"], []))
    started, measuring = time.process_time(), 0.0

    def watch(step: int) -> None:
        nonlocal measuring
        if step in marks:
            before = time.process_time()
            record["step"].append(step)
            record["seconds"].append(round(before - started - measuring, 3))
            for split, losses, metrics in watched:
                value, share = measured(model, split)
                losses.append(rounded(value))
                metrics.append(rounded(share))
            measuring += time.process_time() - before

    watch(0)
    train_data = (data.train[0][rows], data.train[1][rows])
    if steps:
        fit(model, train_data, run.rate, steps, run.seed, method.faster, watch)
    found = [torch.linalg.svdvals(update) for update in updates(model, task.model, folder)]
    ranks = [int((values > ROUNDING * values[0]).sum()) for values in found]
    record["rank"] = rounded(sum(ranks) / len(ranks))
    record["effective_rank"] = rounded(sum(map(effective_rank, found)) / len(found))
    return record


def thinned(data: Data, every: int) -> Data:
    """Every second row, or third, or so on."""
    return data[0][::every], data[1][::every]


def updates(model: nn.Module, name: str, folder: Path) -> Iterator[Tensor]:
    """W' - W0 of each adapted layer of a trained model, as a matrix in float64. It spoils the model."""
    before = torch.load(folder / f"{name}.pt", weights_only=True)
    merged = model.double()
    if hasattr(merged, "merge_and_unload"):
        merged = merged.merge_and_unload()
    after = merged.state_dict()
    for module, _ in merged.named_modules():
        if module.split(".")[-1] in MODELS[name].targets.split():
            yield (after[f"{module}.weight"] - before[f"{module}.weight"].double()).flatten(1)


def rounded(value: float) -> float:
    """A number with five digits."""
    return float(f"{value:.5g}")


def load(path: Path) -> Records:
    """The records of a file, none where there is no file."""
    records: Records = json.loads(path.read_text()) if path.exists() else {}
    return records


def save(records: Records, path: Path) -> None:
    """Write records, a line each."""
    lines = [f"{json.dumps(key, ensure_ascii=False)}: {json.dumps(record)}" for key, record in sorted(records.items())]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
