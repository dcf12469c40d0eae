"""The pictures of docs/evidence.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from experiments import expressiveness
from experiments.plans import RANK, RANKED_METHODS, RANKED_TASKS, RANKS, SHARES, SMALL_METHODS, SMALL_TASKS
from experiments.report import LORAS_RATE, ROWS, Evidence, curve, forgetful, tests
from experiments.tasks import TASKS
from matplotlib import pyplot

COLOURS = {row: f"C{place}" for place, row in enumerate(ROWS)}


def panels(tasks: list[str], across: int = 3) -> tuple[Any, list[Any]]:
    """A figure with a panel for each task."""
    down = -(-len(tasks) // across)
    figure, axes = pyplot.subplots(down, across, figsize=(4 * across, 3.2 * down), layout="constrained", squeeze=False)
    flat = list(axes.flat)
    for axis in flat[len(tasks) :]:
        axis.axis("off")
    for axis, task in zip(flat, tasks, strict=False):
        axis.set_title(task)
        axis.grid(alpha=0.3)
    return figure, flat


def legend(axes: list[Any], tasks: int) -> None:
    """The legend, in the empty panel where there is one."""
    axes[-1 if len(axes) > tasks else 0].legend(*axes[0].get_legend_handles_labels(), fontsize=7, loc="best")


def fine_tuning(evidence: Evidence) -> Any:
    """Test losses, mean and standard deviation."""
    figure, axes = panels(list(TASKS))
    rows = ROWS[1:]
    for axis, task in zip(axes, TASKS, strict=False):
        for place, row in enumerate(rows):
            losses = tests(evidence.runs(task, row))
            axis.errorbar(mean(losses), place, xerr=stdev(losses), marker="o", color=COLOURS[row], capsize=3)
        axis.axvline(mean(tests(evidence.runs(task, "LoRA"))), color="grey", linewidth=0.8)
        axis.set_yticks(range(len(rows)), rows)
        axis.invert_yaxis()
        axis.set_xlabel("test loss")
    return figure


def forgetting(evidence: Evidence) -> Any:
    """The source task's loss against the test loss, through training."""
    tasks = forgetful()
    figure, axes = panels(tasks, 2)
    for axis, task in zip(axes, tasks, strict=False):
        for row in ROWS[1:]:
            found = evidence.runs(task, row)
            points = range(len(found[0]["step"]))
            losses, sources = (
                [mean(record[key][point] for record in found) for point in points] for key in ("test", "source")
            )
            axis.plot(losses[1:], sources[1:], marker=".", color=COLOURS[row], label=row)
        axis.invert_xaxis()
        axis.set(xlabel="test loss", ylabel="loss on the source task")
    legend(axes, len(tasks))
    return figure


def few_data(evidence: Evidence) -> Any:
    """Test loss by share of the data."""
    figure, axes = panels(list(SMALL_TASKS), len(SMALL_TASKS))
    for axis, task in zip(axes, SMALL_TASKS, strict=True):
        for row in ("LoRA", LORAS_RATE, *SMALL_METHODS[1:]):
            losses = [tests(evidence.runs(task, row, share=share)) for share in SHARES]
            axis.errorbar(
                [share * 100 for share in SHARES], list(map(mean, losses)), list(map(stdev, losses)),
                marker="o", capsize=3, color=COLOURS[row], label=row,
            )  # fmt: skip
        axis.set(xscale="log", xlabel="% of the training data", ylabel="test loss")
    axes[0].legend()
    return figure


def rank(evidence: Evidence) -> Any:
    """The effective rank of the update, and the test loss, by r."""
    figure, axes = panels([f"{task}: {what}" for task in RANKED_TASKS for what in ("effective rank", "test loss")], 2)
    for place, task in enumerate(RANKED_TASKS):
        for method in RANKED_METHODS:
            found = [evidence.runs(task, method, r) for r in RANKS]
            ranks = [mean(record["effective_rank"] for record in each) for each in found]
            axes[2 * place].plot(RANKS, ranks, marker="o", color=COLOURS[method], label=method)
            losses = [tests(each) for each in found]
            axes[2 * place + 1].errorbar(
                RANKS, list(map(mean, losses)), list(map(stdev, losses)),
                marker="o", capsize=3, color=COLOURS[method], label=method,
            )  # fmt: skip
        full = evidence.runs(task, "full", RANK)
        levels = mean(record["effective_rank"] for record in full), mean(tests(full))
        for axis, level in zip(axes[2 * place :], levels, strict=False):
            axis.axhline(level, color=COLOURS["full"], label="full")
            axis.set_xscale("log", base=2)
            axis.set_xlabel("r")
    axes[0].legend()
    return figure


def learning_rate(evidence: Evidence) -> Any:
    """The search's validation loss by rate."""
    figure, axes = panels(list(TASKS))
    for axis, task in zip(axes, TASKS, strict=False):
        best = []
        for row in ROWS[1:]:
            if row != LORAS_RATE:
                losses = curve(evidence, task, row)
                best.append(min(losses.values()))
                axis.plot(list(losses), list(losses.values()), marker=".", color=COLOURS[row], label=row)
        axis.set_ylim(0.97 * min(best), 1.3 * max(best))
        axis.set(xscale="log", xlabel="rate", ylabel="validation loss")
    legend(axes, len(TASKS))
    return figure


def cost(evidence: Evidence) -> Any:
    """Validation loss against the time of training."""
    figure, axes = panels(list(TASKS))
    for axis, task in zip(axes, TASKS, strict=False):
        for row in (*(row for row in ROWS[1:] if row != LORAS_RATE), "LoRA, HiRA's time"):
            long = row not in ROWS
            found = evidence.longer(task) if long else evidence.runs(task, row)
            key = "LoRA" if long else row
            seconds = [step * evidence.steps[task][key]["milliseconds"] / 1e3 for step in found[0]["step"]]
            losses = [mean(record["validation"][point] for record in found) for point in range(len(seconds))]
            style = {"color": "black", "linestyle": ":"} if long else {"color": COLOURS[row]}
            axis.plot(seconds[1:], losses[1:], marker=".", label=row, **style)
        axis.set(xlabel="seconds of training", ylabel="validation loss")
    legend(axes, len(TASKS))
    return figure


PLOTS: dict[str, Callable[[Evidence], Any]] = {
    "fine_tuning": fine_tuning,
    "forgetting": forgetting,
    "few_data": few_data,
    "rank": rank,
    "learning_rate": learning_rate,
    "cost": cost,
    "expressiveness": lambda evidence: expressiveness.plot(evidence.fits, evidence.size),
}


def draw(evidence: Evidence, folder: Path) -> None:
    """Draw all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, plot in PLOTS.items():
        figure = plot(evidence)
        figure.savefig(folder / f"{name}.png", dpi=100)
        pyplot.close(figure)
