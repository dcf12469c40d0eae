"""What each experiment runs, as far as the records at hand decide it: first a search, then seeds at the best rate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean

from experiments.methods import METHODS, Method
from experiments.runs import PRETRAINING_STEPS, Record, Records, Run, load, pretrain, save, train
from experiments.tasks import TASKS

RANK, RANKS = 8, (2, 8, 32)
# the search begins with GRID of them, and goes on where the best is the first or the last
RATES = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
GRID = range(5, 11)
FIRST_SEARCH = 100  # seeds of searches are from here on, those of what is reported are below
SHARES, SMALL_TASKS, SMALL_METHODS = (0.01, 0.1, 1), ("digits", "English", "French"), ("LoRA", "HiRA", "full")
RANKED_TASKS, RANKED_METHODS = ("digits", "tumours", "French"), ("LoRA", "HiRA")


@dataclass(frozen=True)
class Size:
    """How large the experiments are.

    Args:
        grid: the places in RATES where a search begins.
        extended: whether a search goes on beyond them.
        searches: seeds of a search, beginning with FIRST_SEARCH; the task's own number if it is None.
        seeds: of the runs that are reported.
        steps: of a run; the task's own if it is None.
        pretraining_steps: of a model.
        points: how often a run is measured; the task's own number if it is None.
        thinned: 20 where only every twentieth row is measured of those that would be.
        rounds: of the measurement of time.
    """

    grid: range = GRID
    extended: bool = True
    searches: int | None = None
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    steps: int | None = None
    pretraining_steps: int = PRETRAINING_STEPS
    points: int | None = None
    thinned: int = 1
    rounds: int = 15


FULL = Size()
QUICK = Size(range(7, 8), False, searches=1, seeds=(0,), steps=1, pretraining_steps=1, points=1, thinned=20, rounds=2)


@dataclass(frozen=True)
class Place:
    """Where results go, and how they are made.

    Args:
        results: the folder of the results, a file for each experiment.
        models: that of the pretrained models.
        pool: of the processes that train; new processes, not forks, so that each has its own threads.
        processes: how many runs at once.
        size: of the experiments.
    """

    results: Path
    models: Path
    pool: Executor
    processes: int
    size: Size


@dataclass(frozen=True)
class Setting:
    """What a method is tuned for."""

    task: str
    method: str
    r: int = RANK
    share: float = 1

    def run(self, rate: float, seed: int, size: Size) -> Run:
        """A run of it."""
        steps = size.steps or TASKS[self.task].steps
        return Run(self.task, self.method, self.r, rate, seed, steps, self.share)

    def at(self, rate: float, size: Size) -> list[Run]:
        """The runs that are reported, at a rate."""
        return [self.run(rate, seed, size) for seed in size.seeds]


def best_point(record: Record) -> int:
    """The place of the point with the lowest validation loss, the start aside where there is another."""
    losses = record["validation"]
    return min(range(1, len(losses)), key=losses.__getitem__, default=0)


def search(known: Records, setting: Setting, size: Size) -> tuple[list[Run], float | None]:
    """The runs of the search for a rate, and the rate; None for it where a run is still missing."""
    if setting.method == "frozen":  # nothing but a new head trains
        return [], 0.0
    places = size.grid
    while True:
        runs = [run for place in places for run in searching(setting, place, size)]
        if any(run.key not in known for run in runs):
            return runs, None
        losses = [search_loss(known, setting, place, size) for place in places]
        best = losses.index(min(losses))
        first, last = max(places[0] - (best == 0), 0), min(places[-1] + (best == len(places) - 1), len(RATES) - 1)
        if not size.extended or range(first, last + 1) == places:
            return runs, RATES[places[best]]
        places = range(first, last + 1)


def searching(setting: Setting, place: int, size: Size) -> list[Run]:
    """The runs of a search at a rate, given by its place."""
    seeds = range(FIRST_SEARCH, FIRST_SEARCH + (size.searches or TASKS[setting.task].searches))
    return [setting.run(RATES[place], seed, size) for seed in seeds]


def search_loss(known: Records, setting: Setting, place: int, size: Size) -> float:
    """The mean validation loss of these runs, each at its best point."""
    found = [known[run.key] for run in searching(setting, place, size)]
    return mean(record["validation"][best_point(record)] for record in found)


def searched(known: Records, setting: Setting, size: Size) -> dict[float, float]:
    """The validation loss by rate, of all rates that were tried."""
    return {
        rate: search_loss(known, setting, place, size)
        for place, rate in enumerate(RATES)
        if all(run.key in known for run in searching(setting, place, size))
    }


def tuned(known: Records, setting: Setting, size: Size) -> Iterator[Run]:
    """The search, and once it is complete the runs that are reported; HiRA at LoRA's rate as well."""
    runs, rate = search(known, setting, size)
    yield from runs
    if rate is not None:
        yield from setting.at(rate, size)
    if setting.method == "HiRA":
        loras = search(known, Setting(setting.task, "LoRA", setting.r, setting.share), size)[1]
        if loras is not None:
            yield from setting.at(loras, size)


def fine_tuning(known: Records, place: Place) -> Iterator[Run]:
    """Every method on every task."""
    for task, method in product(TASKS, METHODS):
        yield from tuned(known, Setting(task, method), place.size)


def few_data(known: Records, place: Place) -> Iterator[Run]:
    """Shares of the training data."""
    for task, share, method in product(SMALL_TASKS, SHARES, SMALL_METHODS):
        yield from tuned(known, Setting(task, method, share=share), place.size)


def rank(known: Records, place: Place) -> Iterator[Run]:
    """Other ranks."""
    for task, r, method in product(RANKED_TASKS, RANKS, RANKED_METHODS):
        yield from tuned(known, Setting(task, method, r), place.size)


Plan = Callable[[Records, Place], Iterator[Run]]
FILES = ("fine_tuning", "few_data", "rank", "cost", "is_it_w0")


def records(results: Path) -> Records:
    """The records of all experiments in a folder."""
    return {key: record for name in FILES for key, record in load(results / f"{name}.json").items()}


def follow(plan: Plan, name: str, place: Place, methods: Mapping[str, Method] = METHODS) -> None:
    """Run what a plan asks for, in its order, until it asks for no more; the file is written after each run.

    Args:
        plan: the plan. What any experiment has run already is not repeated.
        name: of the file for the records.
        place: where they go.
        methods: the methods by name, made of functions that other processes can import.
    """
    path, size = place.results / f"{name}.json", place.size
    own = load(path)
    have = {**records(place.results), **own}
    path.parent.mkdir(parents=True, exist_ok=True)
    waiting: dict[Future[Record], Run] = {}
    while True:
        missing = {run: None for run in plan(have, place) if run.key not in have}
        for run in [run for run in missing if run not in waiting.values()][: place.processes - len(waiting)]:
            pretrain(TASKS[run.task].model, place.models, size.pretraining_steps)
            arguments = (run, methods[run.method], place.models, size.points, size.thinned)
            waiting[place.pool.submit(train, *arguments)] = run
        if not waiting:
            return
        for future in wait(waiting, return_when=FIRST_COMPLETED).done:
            run = waiting.pop(future)
            have[run.key] = own[run.key] = future.result()
            save(own, path)
            print(f"{name}: {len(own)} runs done, the last {run.key}", flush=True)
