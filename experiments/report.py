"""The tables of docs/evidence.md, and its pictures, from the committed results."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Literal

from benchmarks.readme_table import with_lines
from experiments import expressiveness, is_it_w0
from experiments.cost import Steps, hiras_time
from experiments.plans import (
    FULL,
    RANK,
    RANKED_METHODS,
    RANKED_TASKS,
    RANKS,
    SHARES,
    SMALL_METHODS,
    SMALL_TASKS,
    Setting,
    Size,
    best_point,
    records,
    search,
    searched,
)  # fmt: skip
from experiments.runs import Record, Records, load
from experiments.statistics import LEVEL, paired
from experiments.tasks import MODELS, TASKS

LORAS_RATE = "HiRA, LoRA's rate"
ROWS = ("frozen", "LoRA", "rsLoRA", "DoRA", "LoRA+", LORAS_RATE, "HiRA", "plain HiRA", "HiLoRA", "full")
ADAPTERS = ROWS[1:-1]
BEGIN = "<!-- python -m experiments report writes {} from here -->\n"
Field = Literal["test", "test_metric"]


@dataclass(frozen=True)
class Evidence:
    """What was found: the records, the times of a step, the fits to updates, and the size of the experiments."""

    known: Records
    steps: Steps
    size: Size = FULL
    fits: expressiveness.Fits = field(default_factory=dict)

    def rate(self, task: str, row: str, r: int = RANK, share: float = 1) -> float:
        """The rate of a row of the tables: the best of the search, of LoRA's for HiRA at LoRA's."""
        rate = search(self.known, Setting(task, "LoRA" if row == LORAS_RATE else row, r, share), self.size)[1]
        if rate is None:
            raise KeyError(f"the search for the rate of {row} on {task} is not complete")
        return rate

    def runs(self, task: str, row: str, r: int = RANK, share: float = 1) -> list[Record]:
        """The records of a row, by seed."""
        setting = Setting(task, "HiRA" if row == LORAS_RATE else row, r, share)
        return [self.known[run.key] for run in setting.at(self.rate(task, row, r, share), self.size)]

    def longer(self, task: str) -> list[Record]:
        """The records of LoRA with HiRA's time."""
        runs = Setting(task, "LoRA").at(self.rate(task, "LoRA"), self.size)
        count = hiras_time(self.steps, task, self.size)
        return [self.known[run._replace(steps=count).key] for run in runs]


def load_evidence(results: Path, size: Size = FULL) -> Evidence:
    """The results of a folder."""
    steps = json.loads((results / "steps.json").read_text())
    return Evidence(records(results), steps, size, load(results / "expressiveness.json"))


def tests(found: list[Record], field: Field = "test") -> list[float]:
    """The loss or metric on test data, at the point where the validation loss is lowest."""
    return [record[field][best_point(record)] for record in found]


def shown(values: list[float], digits: int = 3) -> str:
    """Mean and standard deviation over the seeds."""
    if not all(map(math.isfinite, values)):
        return "diverged"
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def against(base: list[float], values: list[float], digits: int = 3) -> str:
    """Three cells: the difference, bold where p is below LEVEL; p; the smallest difference that would be seen."""
    if not all(map(math.isfinite, base + values)):
        return " | | "
    difference, p, detectable = paired(base, values)
    text = f"{difference:+.{digits}f}"
    return (
        f"{f'**{text}**' if p < LEVEL else text} | {f'{p:.3f}' if p >= 0.001 else '< 0.001'} | {detectable:.{digits}f}"
    )


# Tables


def fine_tuning(evidence: Evidence) -> Iterator[str]:
    """Every method on every task."""
    for task, what in TASKS.items():
        yield f"| {task} | parameters | rate | test loss | {what.metric} | loss − LoRA's | p | would be seen |"
        yield "|---|---|---|---|---|---|---|---|"
        lora = tests(evidence.runs(task, "LoRA"))
        for row in ROWS:
            found, rate = evidence.runs(task, row), evidence.rate(task, row)
            losses, metrics = tests(found), tests(found, "test_metric")
            compared = " | | " if row == "LoRA" else against(lora, losses)
            cells = f"{found[0]['parameters']:,} | {f'{rate:g}' if rate else ''}"
            yield f"| {row} | {cells} | {shown(losses)} | {shown(metrics)} | {compared} |"
        yield ""


def few_data(evidence: Evidence) -> Iterator[str]:
    """Shares of the training data."""
    yield "| task | data | method | rate | test loss | metric | loss − LoRA's | p | would be seen |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for task in SMALL_TASKS:
        for share in SHARES:
            lora = tests(evidence.runs(task, "LoRA", share=share))
            for row in ("LoRA", LORAS_RATE, *SMALL_METHODS[1:]):
                found = evidence.runs(task, row, share=share)
                compared = " | | " if row == "LoRA" else against(lora, tests(found))
                cells = f"{task} | {share * 100:g} % | {row} | {evidence.rate(task, row, share=share):g}"
                yield f"| {cells} | {shown(tests(found))} | {shown(tests(found, 'test_metric'))} | {compared} |"


def rank(evidence: Evidence) -> Iterator[str]:
    """The rank of the update, and the loss."""
    yield "| task | r | method | rate | rank of W' − W0 | effective rank | test loss |"
    yield "|---|---|---|---|---|---|---|"
    for task in RANKED_TASKS:
        for r in RANKS:
            for method in RANKED_METHODS:
                yield f"| {task} | {r} | {ranked(evidence, task, method, r)} |"
        yield f"| {task} | | {ranked(evidence, task, 'full', RANK)} |"


def ranked(evidence: Evidence, task: str, method: str, r: int) -> str:
    """The cells of a method at a rank."""
    found = evidence.runs(task, method, r)
    ranks, effective = (mean(record[key] for record in found) for key in ("rank", "effective_rank"))  # type: ignore[literal-required]
    return f"{method} | {evidence.rate(task, method, r):g} | {ranks:.1f} | {effective:.1f} | {shown(tests(found))}"


def source_at(record: Record, target: float) -> float:
    """The source task's loss where the test loss first falls to a target, linear between the points."""
    losses, sources = record["test"], record["source"]
    after = next(point for point, loss in enumerate(losses) if loss <= target)
    if after == 0:
        return sources[0]
    part = (losses[after - 1] - target) / (losses[after - 1] - losses[after])
    return sources[after - 1] + part * (sources[after] - sources[after - 1])


def target_of(evidence: Evidence, task: str) -> float:
    """The loss that every run of every adapter reaches."""
    return max(min(record["test"]) for row in ADAPTERS for record in evidence.runs(task, row))


def forgetting(evidence: Evidence) -> Iterator[str]:
    """The source task's loss, at the end and where the target is reached."""
    yield "| task | method | before | at the end | target | source loss there | − LoRA's | p | would be seen |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for task in forgetful():
        target = target_of(evidence, task)
        loras = [source_at(record, target) for record in evidence.runs(task, "LoRA")]
        for row in ROWS[1:]:
            found = evidence.runs(task, row)
            reached = [source_at(record, target) for record in found]
            compared = " | | " if row == "LoRA" else against(loras, reached)
            ends = shown([record["source"][best_point(record)] for record in found])
            cells = f"{task} | {row} | {found[0]['source'][0]:.3f} | {ends} | {target:.3f} | {shown(reached)}"
            yield f"| {cells} | {compared} |"


def forgetful() -> list[str]:
    """The tasks whose models have a source."""
    return [task for task, what in TASKS.items() if MODELS[what.model].source]


def learning_rate(evidence: Evidence) -> Iterator[str]:
    """The validation loss at each rate of the search, above the method's best."""
    rows = [row for row in ROWS[1:] if row != LORAS_RATE]
    rates = sorted({rate for task in TASKS for row in rows for rate in curve(evidence, task, row)})
    yield f"| task | method | {' | '.join(f'{rate:g}' for rate in rates)} |"
    yield "|---|---|" + "---|" * len(rates)
    for task in TASKS:
        for row in rows:
            losses = curve(evidence, task, row)
            best = min(losses.values())
            cells = [percent(losses[rate] / best - 1) if rate in losses else "" for rate in rates]
            yield f"| {task} | {row} | {' | '.join(cells)} |"


def percent(value: float) -> str:
    """A share as a percentage."""
    return f"+{value:.1%}".replace("%", " %") if math.isfinite(value) else "diverged"


def curve(evidence: Evidence, task: str, row: str) -> dict[float, float]:
    """The search's validation loss by rate."""
    return searched(evidence.known, Setting(task, row), evidence.size)


def cost(evidence: Evidence) -> Iterator[str]:
    """Time and memory of a step, and LoRA given HiRA's time."""
    yield "| task | method | steps | ms a step | time of LoRA's | peak memory, MB | of LoRA's | test loss | metric |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for task, what in TASKS.items():
        loras = evidence.steps[task]["LoRA"]
        for row in (*(row for row in ROWS[1:] if row != LORAS_RATE), "LoRA, HiRA's time"):
            long = row not in ROWS
            found = evidence.longer(task) if long else evidence.runs(task, row)
            step = evidence.steps[task]["LoRA" if long else row]
            count = hiras_time(evidence.steps, task, evidence.size) if long else evidence.size.steps or what.steps
            time = step["milliseconds"] * count / (loras["milliseconds"] * (evidence.size.steps or what.steps))
            cells = f"{count} | {step['milliseconds']:.3g} | {time:.2f} | {step['bytes'] / 1e6:.3g}"
            cells += f" | {step['bytes'] / loras['bytes']:.2f}"
            yield f"| {task} | {row} | {cells} | {shown(tests(found))} | {shown(tests(found, 'test_metric'))} |"


def same_time(evidence: Evidence) -> Iterator[str]:
    """HiRA against LoRA that was given HiRA's time."""
    yield "| task | HiRA | LoRA, HiRA's time | HiRA − LoRA | p | would be seen |"
    yield "|---|---|---|---|---|---|"
    for task in TASKS:
        hira, lora = tests(evidence.runs(task, "HiRA")), tests(evidence.longer(task))
        yield f"| {task} | {shown(hira)} | {shown(lora)} | {against(lora, hira)} |"


def matrices(evidence: Evidence) -> Iterator[str]:
    """HiRA with other matrices in the place of W0."""
    yield "| task | M | rate | test loss | loss − W0's | p | would be seen | effective rank |"
    yield "|---|---|---|---|---|---|---|---|"
    for task in is_it_w0.COMPARED_ON:
        base = tests(evidence.runs(task, "W0"))
        for name in is_it_w0.METHODS:
            found = evidence.runs(task, name)
            compared = " | | " if name == "W0" else against(base, tests(found))
            effective = mean(record["effective_rank"] for record in found)
            cells = f"{task} | {name} | {evidence.rate(task, name):g} | {shown(tests(found))}"
            yield f"| {cells} | {compared} | {effective:.1f} |"


TABLES = {
    "fine_tuning": fine_tuning,
    "forgetting": forgetting,
    "few_data": few_data,
    "rank": rank,
    "learning_rate": learning_rate,
    "cost": cost,
    "same_time": same_time,
    "expressiveness": lambda evidence: expressiveness.table(evidence.fits, evidence.size),
    "is_it_w0": matrices,
}


def with_tables(page: str, evidence: Evidence) -> str:
    """The page with the tables between their marks."""
    for name, table in TABLES.items():
        page = with_lines(page, BEGIN.format(name), [line for line in table(evidence)])
    return page
