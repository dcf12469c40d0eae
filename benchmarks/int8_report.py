"""Tables and a picture of what `int8_gradient.py` measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# the arms of a comparison
EXACT, INT8, NUDGED, LORA = "exact", "int8", "nudged", "LoRA"


def show(records: list[dict[str, Any]]) -> None:
    console = Console()
    for task in ("docstrings", "tiny_lm"):
        runs = [record for record in records if record["task"] == task]
        if runs:
            console.print(training_table(task, runs))
    for record in records:
        if record["task"] == "errors":
            console.print(error_table(record))
        elif record["task"] == "step":
            console.print(step_table(record))


def training_table(task: str, runs: list[dict[str, Any]]) -> Table:
    """Final values, and what the other arms add to the exact one's, seed by seed: mean ± standard deviation."""
    n = {arm: sum(arm in run["arms"] for run in runs) for arm in (EXACT, INT8, NUDGED)}
    table = Table(title=f"{task}: seeds' mean ± standard deviation", title_justify="left")
    for column in ("", EXACT, f"{INT8} - {EXACT}", f"{NUDGED} - {EXACT}"):
        table.add_column(column and f"{column} (n = {n[column.split()[0]]})", justify="right")
    for metric in next(iter(runs[0]["arms"].values()))["final"]:
        row = [spread([run["arms"][EXACT]["final"][metric] for run in runs], sign="")]
        for arm in (INT8, NUDGED):
            pairs = [(run["arms"][arm], run["arms"][EXACT]) for run in runs if arm in run["arms"]]
            row.append(spread([one["final"][metric] - other["final"][metric] for one, other in pairs], sign="+"))
        table.add_row(metric, *row)
    return table


def spread(values: list[float], sign: str) -> str:
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.4f}{deviation}"


def error_table(record: dict[str, Any]) -> Table:
    table = Table(title=f"relative errors over layers, seed {record['seed']}: min / median / max", title_justify="left")
    for column in ("steps", "", "int8", "int8, mean of 16 batches", "one batch from the mean", "batch / int8, least"):
        table.add_column(column, justify="right")
    for steps, factors in record["states"].items():
        for factor, found in factors.items():
            if not found:
                table.add_row(steps, factor, "zero, as B is")
                continue
            three = [
                " / ".join(f"{f(found[measure].values()):.2%}" for f in (min, statistics.median, max))
                for measure in ("int8", "mean", "batch")
            ]
            least = min(found["batch"][layer] / found["int8"][layer] for layer in found["int8"])
            table.add_row(steps, factor, *three, f"{least:.0f}")
    return table


def step_table(record: dict[str, Any]) -> Table:
    table = Table(title=f"the demo's training step, {record['settings']['threads']} threads", title_justify="left")
    for column in ("", "median ms", "LoRA = 1", "exact = 1", "peak MB", "kept for backward, MB"):
        table.add_column(column, justify="right")
    times = record["times_ms"]
    for arm, values in times.items():
        ratios = [statistics.median(a / b for a, b in zip(values, times[to], strict=True)) for to in (LORA, EXACT)]
        peaks = " ".join(f"{value / 1e6:.0f}" for value in sorted(record["peak_bytes"][arm]))
        kept = f"{record['kept_bytes'][arm] / 1e6:.1f}"
        table.add_row(arm, f"{statistics.median(values):.1f}", *(f"{ratio:.3f}" for ratio in ratios), peaks, kept)
    return table


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Draw the curves of every training task: the mean over seeds, and a band from the least to the largest."""
    panels = [
        (task, name)
        for task in ("docstrings", "tiny_lm")
        for run in [next((record for record in records if record["task"] == task), None)]
        if run
        for name in next(iter(run["arms"].values()))["curves"]
    ]
    if not panels:
        return
    columns = 3
    rows = -(-len(panels) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.4 * rows), layout="constrained", squeeze=False)
    for axes, (task, name) in zip(grid.flat, panels, strict=False):
        for arm, steps, values in curves(records, task, name):
            by_step = list(zip(*values, strict=True))
            means = [statistics.mean(v) for v in by_step]
            (line,) = axes.plot(steps, means, "--" if arm == INT8 else "-", label=f"{arm}, {len(values)} seeds")
            low, high = [min(v) for v in by_step], [max(v) for v in by_step]
            axes.fill_between(steps, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
        axes.set(title=f"{task}: {name.replace('eval_', 'validation ')}", xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    for axes in list(grid.flat)[len(panels) :]:
        axes.remove()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def curves(records: list[dict[str, Any]], task: str, name: str) -> Iterator[tuple[str, list[int], list[list[float]]]]:
    """For each arm the steps, and the values of every seed."""
    for arm in (EXACT, INT8):
        found = [r["arms"][arm]["curves"][name] for r in records if r["task"] == task and arm in r["arms"]]
        if found:
            yield arm, found[0][0], [values for _, values in found]
