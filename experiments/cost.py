"""What a step of each method takes, and LoRA given the time that HiRA takes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TypedDict

import torch
from experiments.methods import METHODS
from experiments.plans import RANK, Place, Setting, Size, search
from experiments.runs import Records, Run, adapted, fit, pretrain, pretrained
from experiments.tasks import TASKS, Data
from torch import nn
from torch.profiler import ProfilerActivity, profile

STEPS = 4  # of each measurement


class Step(TypedDict):
    """Milliseconds of the processor, and the most bytes that PyTorch held at once above the model."""

    milliseconds: float
    bytes: int


Steps = dict[str, dict[str, Step]]  # by task and method


def measured_steps(place: Place) -> Steps:
    """One training step of each method on each task, the methods in turn, medians; measured where a file lacks it."""
    path = place.results / "steps.json"
    steps: Steps = json.loads(path.read_text()) if path.exists() else {}
    torch.set_num_threads(1)
    for name, task in TASKS.items():
        if name in steps:
            continue
        pretrain(task.model, place.models, place.size.pretraining_steps)
        data = task.data().train
        models = {
            key: adapted(method, pretrained(task.model, place.models), task.model, RANK)
            for key, method in METHODS.items()
        }
        models = {key: model for key, model in models.items() if any(p.requires_grad for p in model.parameters())}
        times: dict[str, list[float]] = {key: [] for key in models}
        for _ in range(place.size.rounds):
            for key, model in models.items():
                before = time.process_time()
                fit(model, data, 1e-4, STEPS, seed=0)
                times[key].append((time.process_time() - before) / STEPS * 1e3)
        steps[name] = {
            key: Step(milliseconds=round(median(times[key][1:]), 3), bytes=peak(model, data))
            for key, model in models.items()
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(steps, indent=1) + "\n")
    return steps


def peak(model: nn.Module, data: Data) -> int:
    """The most that PyTorch's allocator held at once during a step, above what it held before."""
    model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        fit(model, data, 1e-4, 1, seed=0)
    with TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    memory = [event for event in events if event["name"] == "[memory]"]
    changes = [event["args"]["Bytes"] for event in sorted(memory, key=lambda event: event["ts"])]
    return max(accumulate(changes, initial=0))


def hiras_time(steps: Steps, task: str, size: Size) -> int:
    """How many steps LoRA takes in the time of a run of HiRA."""
    times = steps[task]
    ratio = times["HiRA"]["milliseconds"] / times["LoRA"]["milliseconds"]
    return round((size.steps or TASKS[task].steps) * ratio)


def longer(known: Records, place: Place) -> Iterator[Run]:
    """LoRA at its best rate, with as many steps as take HiRA's time."""
    steps = measured_steps(place)
    for task in TASKS:
        setting = Setting(task, "LoRA")
        runs, rate = search(known, setting, place.size)
        yield from runs
        if rate is not None:
            count = hiras_time(steps, task, place.size)
            yield from (run._replace(steps=count) for run in setting.at(rate, place.size))
