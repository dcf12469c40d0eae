"""The command `python -m experiments`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from experiments import cost, plans
from experiments.plans import FULL, QUICK, Place

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"
EXPERIMENTS = {
    "fine_tuning": plans.fine_tuning,
    "few_data": plans.few_data,
    "rank": plans.rank,
    "cost": cost.longer,
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)


@app.callback()
def experiments() -> None:
    """When HiRA beats LoRA, when it does not, and what it costs."""


@app.command()
def run(
    name: Annotated[Literal["fine_tuning", "few_data", "rank", "cost", "all"], typer.Argument(help="What to run.")],
    results: Annotated[Path, typer.Option(help="The folder of the results.")] = Path("tmp/experiments"),
    models: Annotated[Path | None, typer.Option(help="That of the pretrained models; in RESULTS by default.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="How many runs at once.")] = 2,
    quick: Annotated[bool, typer.Option("--quick", help="One step of each run, to see that all of it works.")] = False,
) -> None:
    """Run an experiment. A run whose record is in RESULTS already is not repeated."""
    place = Place(results, models or results / "models", processes, QUICK if quick else FULL)
    for each in EXPERIMENTS if name == "all" else [name]:
        plans.follow(EXPERIMENTS[each], each, place)


@app.command()
def report(
    results: Annotated[Path, typer.Option(help="The folder of the results.")] = RESULTS,
    page: Annotated[Path, typer.Option(help="The page whose tables are written.")] = DOCS / "evidence.md",
    pictures: Annotated[Path, typer.Option(help="The folder of its pictures.")] = DOCS / "evidence",
) -> None:
    """Write the tables and pictures of docs/evidence.md from the results."""
    from experiments.plots import draw
    from experiments.report import load_evidence, with_tables

    evidence = load_evidence(results)
    page.write_text(with_tables(page.read_text(encoding="utf-8"), evidence), encoding="utf-8")
    draw(evidence, pictures)


if __name__ == "__main__":
    app()
