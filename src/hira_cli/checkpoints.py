"""The commands for adapters and models on disk: `hira convert`, `hira inspect`, `hira verify`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


class Source(str, Enum):
    """The formats besides PEFT's that `hira convert` reads."""

    original = "original"


class Form(str, Enum):
    """The methods besides HiRA that `hira convert` writes."""

    lora = "lora"


def convert(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="The adapter's folder.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="OUT", help="The folder to write.")],
    source: Annotated[Source | None, typer.Option("--from", help="It is of the paper's repository.")] = None,
    to: Annotated[Form | None, typer.Option("--to", help="Approximate it by a LoRA, which loses.")] = None,
    rank: Annotated[int | None, typer.Option(min=1, metavar="N", help="The LoRA's rank.")] = None,
    base: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="The model that it was trained on, for a LoRA.")
    ] = None,
    fold: Annotated[bool, typer.Option("--fold", help="Leave nothing that PEFT's own HiRA does not know.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what OUT holds.")] = False,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read adapter_model.bin, if need be.")] = False,
) -> None:
    """Write an adapter in another form: from the paper's repository, as a LoRA, or for PEFT's own HiRA.

    A LoRA of some rank cannot hold HiRA's update; what each layer and all of them lose is printed.
    """
    with _failing():
        from hira.checkpoint.convert import contradiction, convert_adapter

        if (problem := contradiction(source and source.value, to and to.value, rank, base, fold)) is not None:
            raise typer.BadParameter(problem)
        result = convert_adapter(
            adapter,
            out,
            source="original" if source else None,
            to="lora" if to else None,
            rank=rank,
            base=base,
            fold=fold,
            overwrite=overwrite,
            allow_pickle=allow_pickle,
        )
        if result.lora is not None:
            errors = {layer.name: layer.relative_error for layer in result.lora.layers}
            Console().print(_losses(result.lora.rank, errors, result.lora.relative_error))
            print(result.lora.statement)
        method = "LoRA" if result.lora else "HiRA"
        print(f"{result.path}: {method} of rank {result.rank}, modules: {result.modules}")


def inspect(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="The adapter's folder.")],
    base: Annotated[Path | None, typer.Option(metavar="FOLDER", help="The model that it was trained on.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw it here.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Write a page with pictures here.")] = None,
    spectra: Annotated[bool, typer.Option(help="Find singular values of W0 and of the update.")] = True,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read adapter_model.bin, if need be.")] = False,
) -> None:
    """Show what an adapter did: size, ranks and spectra of its update, layer by layer."""
    if plot is not None and find_spec("matplotlib") is None:
        raise typer.BadParameter("matplotlib is not installed: pip install matplotlib", param_hint="--plot")
    with _failing():
        from hira.checkpoint import inspection, report_page, report_table

        report = inspection.inspect_adapter(adapter, base, spectra=spectra, allow_pickle=allow_pickle)
        if json:
            print(report_table.to_json(report))
        else:
            Console().print(report_table.table(report))
        if plot is not None:
            report_table.plot(report, plot)
        if html is not None:
            report_page.write_page(report, html, adapter.name)


def verify(folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder that hira wrote.")]) -> None:
    """Compare the files of a folder with the hashes in its manifest; status 1 if any differs."""
    with _failing():
        from hira.checkpoint import manifest

        problems = manifest.verify(folder)
    for problem in problems:
        print(problem, file=sys.stderr)
    raise typer.Exit(1 if problems else 0)


@contextmanager
def _failing() -> Iterator[None]:
    """Print a HiraError as a message, and fail with status 1."""
    from hira import HiraError

    try:
        yield
    except HiraError as error:
        print(f"hira: {error}", file=sys.stderr)
        raise typer.Exit(1) from error


def _losses(rank: int, errors: dict[str, float], overall: float) -> Table:
    """What a LoRA lost of each module, and of all."""
    from hira.checkpoint.report_table import printable

    table = Table(box=box.SIMPLE, title=f"LoRA of rank {rank}", title_justify="left", show_footer=True)
    table.add_column("module", "all", overflow="fold")
    table.add_column("relative error", f"{overall:.4f}", justify="right")
    for name, error in errors.items():
        table.add_row(Text(printable(name)), f"{error:.4f}")
    return table
