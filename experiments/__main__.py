"""The command `python -m experiments`."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Literal

import typer
from experiments import cost, expressiveness, is_it_w0, plans
from experiments.methods import METHODS
from experiments.plans import FULL, QUICK, Place

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"
EXPERIMENTS = {
    "fine_tuning": plans.fine_tuning,
    "few_data": plans.few_data,
    "rank": plans.rank,
    "cost": cost.longer,
    "is_it_w0": is_it_w0.plan,
}
Name = Literal["fine_tuning", "few_data", "rank", "cost", "is_it_w0", "expressiveness", "all"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)


@app.callback()
def experiments() -> None:
    """When HiRA beats LoRA, when it does not, and what it costs."""


@app.command()
def run(
    name: Annotated[Name, typer.Argument(help="What to run.")],
    results: Annotated[Path, typer.Option(help="The folder of the results.")] = Path("tmp/experiments"),
    models: Annotated[Path | None, typer.Option(help="That of the pretrained models; in RESULTS by default.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="How many runs at once.")] = 2,
    quick: Annotated[bool, typer.Option("--quick", help="One step of each run, to see that all of it works.")] = False,
) -> None:
    """Run an experiment. A run whose record is in RESULTS already is not repeated."""
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        place = Place(results, models or results / "models", pool, processes, QUICK if quick else FULL)
        for each, plan in EXPERIMENTS.items():
            if name in (each, "all"):
                plans.follow(plan, each, place, {**METHODS, **is_it_w0.METHODS})
        if name in ("expressiveness", "all"):
            expressiveness.run(place)


@app.command()
def report(
    results: Annotated[Path, typer.Option(help="The folder of the results.")] = RESULTS,
    page: Annotated[Path, typer.Option(help="The page whose tables are written.")] = DOCS / "evidence.md",
    pictures: Annotated[Path, typer.Option(help="The folder of its pictures.")] = DOCS / "evidence",
    decision: Annotated[Path, typer.Option(help="The page that decides.")] = DOCS / "hira_or_lora.md",
) -> None:
    """Write the tables and pictures of docs/evidence.md, and the lines of docs/hira_or_lora.md, from the results."""
    from experiments.decision import with_decision
    from experiments.plots import draw
    from experiments.report import load_evidence, with_tables

    evidence = load_evidence(results)
    page.write_text(with_tables(page.read_text(encoding="utf-8"), evidence), encoding="utf-8")
    decision.write_text(with_decision(decision.read_text(encoding="utf-8"), evidence), encoding="utf-8")
    draw(evidence, pictures)


if __name__ == "__main__":
    app()
