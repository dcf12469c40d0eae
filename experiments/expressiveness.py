"""Expressiveness: how near can LoRA, HiRA and HiRA with LoRA come to a given update, with equal numbers of parameters?

Each method's best fit of W' - W0 is computed (experiments/fitting.py), nothing is trained, but for the last target: the
update of the layer in a full fine-tuning. W0 is a layer of MiniLM, or of the small decoder after its pretraining.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any, TypedDict

import torch
from experiments.fitting import fit_hira, fit_lora
from experiments.plans import Place, Setting, Size, follow, search
from experiments.runs import Records, Run, fit, load, pretrained, rounded, save
from experiments.tasks import TASKS
from torch import Tensor

from hira.ops.measures import effective_rank

RANKS, SEEDS, TABLE_RANK, TARGET_RANK = (1, 2, 4, 8), (0, 1, 2, 3, 4), 8, 8
GRID = range(3, 6)
# of each task's model: a layer of each kind that the tasks adapt, in the middle of MiniLM and at the end of the decoder
LAYERS = {
    "docstrings": [f"bert.bert.encoder.layer.3.attention.self.{name}" for name in ("query", "key", "value")],
    "English": [f"llama.model.layers.1.{name}" for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")],
}


class Record(TypedDict):
    """A fit: its relative error, by how much that of the worst start was larger, and the update's two ranks."""

    error: float
    spread: float
    rank: int
    effective_rank: float


Fits = dict[str, Record]
METHODS: dict[str, Callable[[Tensor, Tensor, int, int], tuple[Tensor, float, float]]] = {
    "target": lambda W0, target, r, seed: (target, 0.0, 0.0),
    "LoRA": lambda W0, target, r, seed: fit_lora(target, r),
    "HiRA": lambda W0, target, r, seed: fit_hira(W0, target, r, seed=seed),
    "HiLoRA": lambda W0, target, r, seed: fit_hira(W0, target, r - r // 2, r // 2, seed),
}
FULL = "full fine-tuning"
TARGETS = ("Gaussian", "low rank", "W0 ⊙ low rank", "rows and columns rescaled", FULL)


def made_targets(W0: Tensor, seed: int) -> dict[str, Tensor]:
    """Updates of W0 (out, in) that are drawn at random. Their size does not matter to a relative error."""
    generator = torch.Generator().manual_seed(seed)
    (out, width), r = W0.shape, min(TARGET_RANK, *W0.shape)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=W0.dtype)

    made = (
        normal(out, width),
        normal(out, r) @ normal(r, width),
        W0 * (normal(out, r) @ normal(r, width)),
        (1 + 0.1 * normal(out, 1)) * W0 * (1 + 0.1 * normal(1, width)) - W0,
    )
    return dict(zip(TARGETS[:-1], made, strict=True))


def weights(task: str, folder: Path) -> dict[str, Tensor]:
    """W0 of a task's layers, in float64."""
    state = pretrained(TASKS[task].model, folder).state_dict()
    return {layer: state[f"{layer}.weight"].double() for layer in LAYERS[task]}


def rates(known: Records, place: Place) -> Iterator[Run]:
    """The search for the rate of full fine-tuning, the same as everywhere."""
    for task in LAYERS:
        yield from search(known, Setting(task, "full"), sized(place))[0]


def sized(place: Place) -> Size:
    """The size of the search, which begins at the low rates that suit full fine-tuning."""
    return place.size if place.size.steps else replace(place.size, grid=GRID)


def fine_tuned(run: Run, models: Path) -> dict[str, Tensor]:
    """The updates of the layers in a full fine-tuning."""
    model = pretrained(TASKS[run.task].model, models)
    torch.manual_seed(run.seed)
    fit(model, TASKS[run.task].data().train, run.rate, run.steps, run.seed)
    state = model.state_dict()
    return {layer: state[f"{layer}.weight"].double() - W0 for layer, W0 in weights(run.task, models).items()}


def run(place: Place) -> None:
    """Fit what expressiveness.json lacks, and write it after each layer; the rates are those of fine_tuning.json."""
    torch.set_num_threads(1)
    size, path = sized(place), place.results / "expressiveness.json"
    follow(rates, "fine_tuning", place)
    records: Fits = load(path)
    for task, seed in product(LAYERS, size.seeds):
        if key(task, LAYERS[task][-1], FULL, seed, RANKS[-1], "HiLoRA") in records:
            continue
        setting = Setting(task, "full")
        _, rate = search(load(place.results / "fine_tuning.json"), setting, size)
        assert rate is not None
        updates = fine_tuned(setting.run(rate, seed, size), place.models)
        for layer, W0 in weights(task, place.models).items():
            rows = W0[:: size.thinned]
            for name, target in {**made_targets(rows, seed), FULL: updates[layer][:: size.thinned]}.items():
                for r, (method, best) in product(RANKS, METHODS.items()):
                    records[key(task, layer, name, seed, r, method)] = fitted(*best(rows, target, r, seed))
            save(records, path)
            print(f"expressiveness: {layer}, seed {seed}", flush=True)


def fitted(update: Tensor, error: float, spread: float) -> Record:
    """The record of a fit."""
    values = torch.linalg.svdvals(update)
    rank = int((values > 1e-6 * values[0]).sum())
    return Record(
        error=rounded(error), spread=rounded(spread), rank=rank, effective_rank=rounded(effective_rank(values))
    )


def key(task: str, layer: str, target: str, seed: int, r: int, method: str) -> str:
    """The name of a fit in the results."""
    return f"{TASKS[task].model} | {layer} | {target} | seed {seed} | r {r} | {method}"


def over_seeds(fits: Fits, seeds: Sequence[int], task: str, target: str, r: int, method: str) -> Iterator[Record]:
    """For each seed the mean over a task's layers."""
    for seed in seeds:
        found = [fits[key(task, layer, target, seed, r, method)] for layer in LAYERS[task]]
        yield {field: mean(each[field] for each in found) for field in found[0]}  # type: ignore[literal-required, misc]


def table(fits: Fits, size: Size) -> Iterator[str]:
    """The lines of a table at TABLE_RANK."""
    fitting = [method for method in METHODS if method != "target"]
    yield f"| W0 | update | {' | '.join(fitting)} | {' | '.join(f'ranks, {name}' for name in METHODS)} |"
    yield "|---|---|" + "---|" * (len(fitting) + len(METHODS))
    for task, target in product(LAYERS, TARGETS):
        found = {name: list(over_seeds(fits, size.seeds, task, target, TABLE_RANK, name)) for name in METHODS}
        errors = [[each["error"] for each in found[name]] for name in fitting]
        cells = [f"{mean(values):.3f} ± {stdev(values):.3f}" for values in errors]
        for each in found.values():
            rank, effective = (mean(record[field] for record in each) for field in ("rank", "effective_rank"))  # type: ignore[literal-required]
            cells.append(f"{rank:.0f}, {effective:.0f}")
        yield f"| {TASKS[task].model} | {target} | {' | '.join(cells)} |"
    spread = max(each["spread"] for each in fits.values())
    yield f"\nThe worst of a fit's starts ended at an error that was at most {spread:.3f} above that of the best."


def plot(fits: Fits, size: Size) -> Any:
    """The errors by rank: a row for each W0, a panel for each kind of update."""
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(
        len(LAYERS), len(TARGETS), figsize=(13, 5), sharex=True, sharey=True, layout="constrained"
    )
    for task, axes in zip(LAYERS, rows, strict=True):
        for target, axis in zip(TARGETS, axes, strict=True):
            for method in ("LoRA", "HiRA", "HiLoRA"):
                found = [list(over_seeds(fits, size.seeds, task, target, r, method)) for r in RANKS]
                axis.plot(RANKS, [mean(each["error"] for each in records) for records in found], "o-", label=method)
            axis.set_title(f"{TASKS[task].model}\n{target}", fontsize=8)
            axis.set_xscale("log", base=2)
            axis.set_xticks(RANKS, [str(r) for r in RANKS])
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("relative error")
    rows[-1][0].set_xlabel("r")
    rows[0][0].legend(fontsize=8)
    return figure
