"""The experiments behind docs/evidence.md: how they are run, and that the page shows what was found."""

from __future__ import annotations

import math
from itertools import combinations, product
from pathlib import Path
from statistics import mean

import pytest
import torch
from experiments import cost, plans, report
from experiments.methods import METHODS
from experiments.plans import FULL, QUICK, RANK, RATES, Place, Setting, best_point, follow, search, searching, tuned
from experiments.runs import adapted
from experiments.statistics import LEVEL, Comparison, paired
from experiments.tasks import FRENCH, MODELS, TASKS

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs" / "evidence.md", ROOT / "experiments" / "results"


def record(*validation: float, test: tuple[float, ...] = (), source: tuple[float, ...] = ()) -> dict:
    """A record with these losses."""
    return {"validation": list(validation), "test": list(test or validation), "source": list(source)}


def test_the_page_shows_the_results():
    page = PAGE.read_text(encoding="utf-8")
    assert report.with_tables(page, report.load_evidence(RESULTS)) == page
    for name in report.TABLES:
        assert f"{report.BEGIN.format(name)}|" in page


# Searches


def found(setting: Setting, losses: dict[float, float]) -> dict:
    """Records of a search: the validation loss at each rate."""
    return {
        run.key: record(9, losses[rate])
        for place, rate in enumerate(RATES)
        if rate in losses
        for run in searching(setting, place, FULL)
    }


def test_a_search_takes_the_best_rate_on_validation_data():
    setting = Setting("digits", "HiRA")
    grid = {RATES[place]: 1 + abs(place - 8) for place in FULL.grid}
    assert search({}, setting, FULL)[1] is None
    runs, rate = search(found(setting, grid), setting, FULL)
    assert rate == RATES[8]
    assert not {run.seed for run in runs} & set(FULL.seeds)


@pytest.mark.parametrize("edge", ["first", "last"])
def test_a_search_goes_on_where_the_best_rate_is_at_its_edge(edge):
    setting = Setting("digits", "HiRA")
    best = FULL.grid[0] - 1 if edge == "first" else FULL.grid[-1] + 1
    losses = {RATES[place]: 1 + abs(place - best) for place in FULL.grid}
    runs, rate = search(found(setting, losses), setting, FULL)
    assert rate is None and RATES[best] in {run.rate for run in runs}
    further = best - 1 if edge == "first" else best + 1
    losses |= {RATES[best]: 1, RATES[further]: 2}
    assert search(found(setting, losses), setting, FULL)[1] == RATES[best]


def test_hira_is_run_at_loras_rate_as_well():
    losses = {RATES[place]: 1 + abs(place - 8) for place in FULL.grid}
    known = found(Setting("digits", "LoRA"), losses) | found(Setting("digits", "HiRA"), {**losses, RATES[7]: 0.5})
    rates = {run.rate for run in tuned(known, Setting("digits", "HiRA"), FULL) if run.seed in FULL.seeds}
    assert rates == {RATES[7], RATES[8]}


def test_the_point_is_chosen_on_validation_data():
    assert best_point(record(1, 4, 2, 3)) == 2
    assert best_point(record(1)) == 0


# Forgetting


def test_the_source_loss_is_taken_where_the_target_is_reached():
    run = record(4, 2, 1, source=(1, 3, 9))
    assert report.source_at(run, 4) == 1
    assert report.source_at(run, 3) == 2
    assert report.source_at(run, 1) == 9


# Tasks and methods


@pytest.mark.parametrize("task", ["digits", "tumours"])
def test_no_row_is_in_two_splits(task):
    splits = [{tuple(row.flatten().tolist()) for row in split[0]} for split in TASKS[task].data()]
    assert all(splits)
    assert not any(one & other for one, other in combinations(splits, 2))


def test_the_french_is_split():
    pytest.importorskip(FRENCH, reason="jupyterlab-language-pack-fr-FR is not installed")
    train, validation, test = TASKS["French"].data()
    assert len(train[0]) > 1000 and len(validation[0]) == 199 and len(test[0]) == 400


def test_adapters_have_equal_numbers_of_parameters():
    counts = {}
    for name, method in METHODS.items():
        torch.manual_seed(0)
        model = adapted(method, MODELS["regressor"].make(), "regressor", RANK)
        counts[name] = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    magnitudes = 64 + 64 + 10
    assert counts["frozen"] == 0 < counts["LoRA"] < counts["full"]
    assert counts["DoRA"] == counts["LoRA"] + magnitudes
    assert {counts[name] for name in ("rsLoRA", "LoRA+", "HiRA", "plain HiRA", "HiLoRA")} == {counts["LoRA"]}


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The results of two experiments on one task, a step each."""
    folder = tmp_path_factory.mktemp("results")
    place = Place(folder, folder / "models", 1, QUICK)
    with pytest.MonkeyPatch.context() as patch:
        for module in (plans, cost, report):
            patch.setattr(module, "TASKS", {"tumours": TASKS["tumours"]})
        for name, plan in {"fine_tuning": plans.fine_tuning, "cost": cost.longer}.items():
            follow(plan, name, place)
        yield place


def test_each_method_is_searched_and_run(quick):
    known = plans.records(quick.results)
    assert {key.split(" | ")[1] for key in known} == set(METHODS)
    loras = [each for key, each in known.items() if " | LoRA | " in key]
    hiras = [each for key, each in known.items() if " | HiRA | " in key]
    assert all(each["rank"] <= RANK for each in loras) and all(each["rank"] > RANK for each in hiras)
    assert all(math.isfinite(each["test"][-1]) and each["source"] for each in known.values())


def test_what_is_run_is_not_repeated(quick):
    before = {path: path.read_text() for path in quick.results.glob("*.json")}
    follow(plans.fine_tuning, "fine_tuning", quick)
    follow(cost.longer, "cost", quick)
    assert {path: path.read_text() for path in quick.results.glob("*.json")} == before


@pytest.mark.parametrize("table", [report.fine_tuning, report.forgetting, report.learning_rate, report.cost])
def test_the_tables_name_each_method(quick, table):
    lines = "\n".join(table(report.load_evidence(quick.results, QUICK)))
    assert all(f"| {name} |" in lines for name in METHODS if name != "frozen")


def test_a_step_needs_memory_for_what_trains(quick):
    steps = cost.measured_steps(quick)["tumours"]
    assert steps["DoRA"]["bytes"] > steps["LoRA"]["bytes"] > 0
    assert all(step["milliseconds"] > 0 for step in steps.values())


# What the page says of the results


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
    for task in TASKS:
        lora, *others = (report.tests(verdict.evidence.runs(task, row)) for row in ("LoRA", *hiras))
        assert all(paired(lora, other).p > 0.001 for other in others)


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
