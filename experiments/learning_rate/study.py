"""Which learning rate suits HiRA, plain and with hira_alpha, where LoRA's is known.

    python experiments/learning_rate/study.py run RESULTS.json --processes 2
    python experiments/learning_rate/study.py table RESULTS.json

Three models that this script trains itself, and MiniLM, are adapted to another task by four methods with equal numbers
of parameters, at the same rates: LoRA; HiRA; HiRA with `hira_alpha`; and HiRA with A's start times the same scale
instead. All use Adam without weight decay, a cosine schedule and alpha = 2 r. The adapters are on every linear layer
and convolution, in MiniLM on query, key and value; its new head trains too, at a rate of its own that is the same for
all. A run that is in RESULTS already is not repeated. `table` writes what docs/learning_rate.md shows.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, pstdev
from typing import NamedTuple

import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[2]))

from experiments.methods import Method, hira, lora, plain_hira
from experiments.runs import adapted, fit, pretrain, pretrained
from experiments.tasks import TASKS, Data, Splits, measured

from hira import HiraLayer
from hira.layers.alpha_scale import scale_of_alpha


def larger_start(model: nn.Module, targets: list[str], r: int) -> nn.Module:
    """HiRA whose A starts larger by the scale of LoRA's alpha."""
    model = plain_hira(model, targets, r)
    for layer in model.modules():
        if isinstance(layer, HiraLayer):
            layer.hira_A["default"].data *= scale_of_alpha(2 * r, r, layer.get_base_layer().weight)
    return model


METHODS = {"LoRA": lora, "HiRA": plain_hira, "HiRA, hira_alpha": hira, "HiRA, A's start": larger_start}
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
RANKS = (4, 16)
SEEDS = (0, 1, 2)
STEPS, MINILM_STEPS = 120, 60
MODELS = {
    "decoder of width 64": "English",
    "decoder of width 128": "English",
    "convolutional net": "digits",
    "MiniLM": "docstrings",
}


class Run(NamedTuple):
    """One training run."""

    model: str
    r: int
    method: str
    rate: float
    seed: int

    @property
    def key(self) -> str:
        """Its name in the results."""
        return f"{self.model} | {self.r} | {self.method} | {self.rate:g} | {self.seed}"

    @property
    def accuracy_key(self) -> str:
        """The name of its accuracy in the results."""
        return f"{self.key} | accuracy"


def adapt(run: Run, folder: Path, steps: int | None = None) -> tuple[float, float]:
    """The loss and the accuracy on the test data after a run."""
    torch.set_num_threads(1)
    data = TASKS[MODELS[run.model]].data()
    base = pretrained(run.model, folder)
    torch.manual_seed(run.seed)
    model = adapted(Method(METHODS[run.method]), base, run.model, run.r)
    fit(model, data.train, run.rate, steps or (MINILM_STEPS if run.model == "MiniLM" else STEPS), run.seed)
    return measured(model, all_digits(data) if run.model == "convolutional net" else data.test)


def all_digits(data: Splits) -> Data:
    """The validation data and the test data."""
    return torch.cat((data.validation[0], data.test[0])), torch.cat((data.validation[1], data.test[1]))


def study(path: Path, folder: Path, processes: int) -> None:
    """Run what is not in a file of results yet, and write the file after each run."""
    results: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    runs = [Run(*each) for each in product(MODELS, RANKS, METHODS, RATES, SEEDS)]
    runs = [run for run in runs if run.key not in results]
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        for future in [pool.submit(pretrain, model, folder) for model in dict.fromkeys(run.model for run in runs)]:
            future.result()
        waiting = {pool.submit(adapt, run, folder): run for run in runs}
        for count, future in enumerate(as_completed(waiting), 1):
            run = waiting[future]
            results[run.key], accuracy = future.result()
            if run.model == "MiniLM":
                results[run.accuracy_key] = accuracy
            path.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
            print(f"\r{count} of {len(waiting)} runs", end="", flush=True)
    print()


def table(path: Path) -> Iterator[str]:
    """The lines of a table of what is complete: each method's best rate, its loss there, and at LoRA's best rate."""
    results = json.loads(path.read_text())
    complete = [
        (model, r)
        for model, r in product(MODELS, RANKS)
        if all(Run(model, r, *others).key in results for others in product(METHODS, RATES, SEEDS))
    ]

    def losses(model: str, r: int, method: str, rate: float) -> list[float]:
        return [results[Run(model, r, method, rate, seed).key] for seed in SEEDS]

    def shown(model: str, r: int, method: str, rate: float) -> str:
        values = losses(model, r, method, rate)
        keys = [Run(model, r, method, rate, seed).accuracy_key for seed in SEEDS]
        accuracy = f", {mean(results[key] for key in keys):.1%}".replace("%", " %") if keys[0] in results else ""
        return f"{mean(values):.3f} ± {pstdev(values):.3f}{accuracy}"

    yield "| model | r | method | best rate | loss there | loss at LoRA's best rate |"
    yield "|---|---|---|---|---|---|"
    for model, r in complete:
        best = {method: min(RATES, key=lambda rate: mean(losses(model, r, method, rate))) for method in METHODS}
        for method, rate in best.items():
            there, at_loras = (shown(model, r, method, each) for each in (rate, best["LoRA"]))
            yield f"| {model} | {r} | {method} | {rate:g} | {there} | {at_loras} |"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "table"))
    parser.add_argument("results", type=Path)
    parser.add_argument("--models", type=Path, default=Path("tmp"), help="the folder for the models that are adapted")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.action == "run":
        study(arguments.results, arguments.models, arguments.processes)
    else:
        print("\n".join(table(arguments.results)))


if __name__ == "__main__":
    main()
