"""How the experiments are run: searches, tasks, methods, records that are not repeated, and tables of them."""

from __future__ import annotations

import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import combinations
from multiprocessing import get_context

import pytest
import torch
from experiments import cost, plans, report
from experiments.methods import METHODS
from experiments.plans import FULL, QUICK, RANK, RATES, Place, Setting, best_point, follow, search, searching, tuned
from experiments.runs import adapted
from experiments.tasks import FRENCH, MODELS, TASKS

SIZE = replace(QUICK, seeds=(0, 1))  # a comparison needs two


def record(*validation: float, test: tuple[float, ...] = (), source: tuple[float, ...] = ()) -> dict:
    """A record with these losses."""
    return {"validation": list(validation), "test": list(test or validation), "source": list(source)}


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
    with pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(1, get_context("spawn")) as pool:
        place = Place(folder, folder / "models", pool, 1, SIZE)
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
    lines = "\n".join(table(report.load_evidence(quick.results, SIZE)))
    assert all(f"| {name} |" in lines for name in METHODS if name != "frozen")


def test_a_step_needs_memory_for_what_trains(quick):
    steps = cost.measured_steps(quick)["tumours"]
    assert steps["DoRA"]["bytes"] > steps["LoRA"]["bytes"] > 0
    assert all(step["milliseconds"] > 0 for step in steps.values())
