"""docs/evidence.md shows the committed results, and what its text says of them holds."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from statistics import mean

import pytest
from experiments import plans, report
from experiments.plans import RANK, RATES
from experiments.statistics import LEVEL, Comparison, paired
from experiments.tasks import TASKS

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs" / "evidence.md", ROOT / "experiments" / "results"


def test_the_page_shows_the_results():
    page = PAGE.read_text(encoding="utf-8")
    assert report.with_tables(page, report.load_evidence(RESULTS)) == page
    for name in report.TABLES:
        assert f"{report.BEGIN.format(name)}|" in page


@pytest.fixture(scope="module")
def verdict():
    """(task, row) -> -1 where the row's test loss is lower than LoRA's by p < 0.05, 1 where it is higher, or 0."""
    evidence = report.load_evidence(RESULTS)

    def compare(task: str, row: str, base: list | None = None, **options: float) -> int:
        lora = report.tests(base or evidence.runs(task, "LoRA", **options))
        return sign(paired(lora, report.tests(evidence.runs(task, row, **options))))

    compare.evidence = evidence
    return compare


def sign(compared: Comparison) -> int:
    """-1, 0 or 1."""
    return 0 if compared.p >= LEVEL else int(math.copysign(1, compared.difference))


def test_what_is_said_of_fine_tuning(verdict):
    hiras = (report.LORAS_RATE, "HiRA", "plain HiRA")
    for row in (*hiras, "LoRA+", "full"):
        assert verdict("digits", row) == -1
        values = [mean(report.tests(verdict.evidence.runs("digits", each))) for each in (row, "LoRA")]
        assert values[0] < values[1] / 2
    for task in ("tumours", "docstrings"):
        assert {verdict(task, row) for row in report.ADAPTERS if row != "LoRA"} == {0}
    assert [verdict("English", row) for row in hiras] == [0, 1, 0]
    assert [verdict("French", row) for row in hiras] == [0, 0, -1]
    assert {verdict(task, "HiLoRA") for task in TASKS} == {0}
    assert {verdict(task, "full") for task in TASKS} == {-1}
    full = max(report.tests(verdict.evidence.runs("French", "full")))
    assert all(full < 0.9 * min(report.tests(verdict.evidence.runs("French", row))) for row in report.ADAPTERS)
    english = [mean(report.tests(verdict.evidence.runs("English", row))) for row in ("HiRA", "LoRA")]
    assert 0.002 < english[0] / english[1] - 1 < 0.003
    for task in TASKS:
        lora, *others = (report.tests(verdict.evidence.runs(task, row)) for row in ("LoRA", *hiras))
        assert all(paired(lora, other).p > 0.01 for other in others)


def test_what_is_said_of_forgetting(verdict):
    def forgets(task: str, row: str) -> int:
        target = report.target_of(verdict.evidence, task)
        losses = [
            [report.source_at(each, target) for each in verdict.evidence.runs(task, name)] for name in ("LoRA", row)
        ]
        return sign(paired(*losses))

    tasks = report.forgetful()
    assert [forgets(task, "HiRA") for task in tasks] == [0, -1, -1, 1]
    assert [forgets(task, report.LORAS_RATE) for task in tasks] == [0, 0, 0, 1]
    assert all(max(forgets(task, row) for task in tasks) >= 0 for row in report.ROWS[2:])
    rates = [verdict.evidence.rate(task, row) for task in ("tumours", "English") for row in ("LoRA", "HiRA")]
    assert rates == [0.01, 0.003, 0.01, 0.003]


def test_what_is_said_of_few_data(verdict):
    shares = {task: [verdict(task, "HiRA", share=share) for share in (0.01, 0.1, 1)] for task in plans.SMALL_TASKS}
    assert shares == {"digits": [0, 0, -1], "English": [0, 0, 1], "French": [1, 0, 0]}
    assert verdict("digits", report.LORAS_RATE, share=0.01) == 1


def test_what_is_said_of_the_rank(verdict):
    evidence = verdict.evidence

    def found(task: str, method: str, r: int, what: str) -> float:
        runs = evidence.runs(task, method, r)
        return mean(report.tests(runs) if what == "loss" else [each[what] for each in runs])

    for task, r in product(plans.RANKED_TASKS, plans.RANKS):
        assert found(task, "LoRA", r, "rank") <= r
    for task, r in product(("tumours", "French"), plans.RANKS):
        assert abs(found(task, "HiRA", r, "rank") - found(task, "full", RANK, "rank")) < 0.5
    assert found("French", "HiRA", 2, "effective_rank") > 1.9 * found("French", "LoRA", 32, "effective_rank")
    assert found("French", "HiRA", 2, "loss") > found("French", "LoRA", 32, "loss")
    assert verdict("French", "HiRA", r=32) == 1
    assert found("digits", "LoRA", 32, "loss") > found("digits", "LoRA", 2, "loss")


def test_what_is_said_of_rates(verdict):
    places = {
        (task, row): RATES.index(verdict.evidence.rate(task, row)) - RATES.index(verdict.evidence.rate(task, "LoRA"))
        for task, row in product(TASKS, ("HiRA", "plain HiRA", "LoRA+"))
    }
    assert {place for (_, row), place in places.items() if row == "HiRA"} <= {-1, 0, 1}
    assert {place for (_, row), place in places.items() if row == "plain HiRA"} == {1, 2}
    assert {place for (_, row), place in places.items() if row == "LoRA+"} == {-1, -2, -3}


def test_what_is_said_of_time(verdict):
    evidence = verdict.evidence
    found = [verdict(task, "HiRA", evidence.longer(task)) for task in TASKS]
    assert dict(zip(TASKS, found, strict=True)) == {
        "digits": -1,
        "tumours": 0,
        "English": 0,
        "French": -1,
        "docstrings": 0,
    }
    ratios = [each["HiRA"]["milliseconds"] / each["LoRA"]["milliseconds"] for each in evidence.steps.values()]
    assert min(ratios) >= 0.85 and max(ratios) <= 1.35
    assert all(each["DoRA"]["milliseconds"] > each["LoRA"]["milliseconds"] for each in evidence.steps.values())
