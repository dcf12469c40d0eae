"""The commands for adapters and models on disk: `hira merge`, `hira convert`, `hira inspect`, `hira verify`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hira.cli.messages import errors_as_messages, print_line

if TYPE_CHECKING:
    from hira.files.merge.merge_checkpoint import MergeReport


_HUB = ", or owner/name[@revision] on the hub"
Adapter = Annotated[str, typer.Argument(metavar="ADAPTER", help=f"The adapter's folder{_HUB}.")]
Out = Annotated[Path, typer.Option("-o", "--out", metavar="OUT", help="The folder to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the content of OUT.")]
AnyBase = Annotated[
    bool,
    typer.Option("--any-base", help="Go on although the adapter was trained on another model, or is merged already."),
]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Read adapter_model.bin if there is no safetensors file.")
]


def merge(
    base: Annotated[str, typer.Argument(metavar="BASE", help=f"The base model's folder, in safetensors{_HUB}.")],
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER...", help=f"The folders of adapters{_HUB}.")],
    out: Out,
    weight: Annotated[
        list[float] | None, typer.Option(help="A factor for BA, passed once for each adapter; the default is 1.")
    ] = None,
    dtype: Annotated[
        Literal["float64", "float32", "bfloat16", "float16"] | None,
        typer.Option(help="The dtype of the merged weights; by default each tensor keeps its dtype."),
    ] = None,
    rounding: Annotated[
        Literal["nearest", "dither"] | None,
        typer.Option(
            help="How to round to half precision; the default is a dither if the base model is in half precision."
        ),
    ] = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="The largest file to write, such as 5GB; by default the base model's files are kept."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be written, and write nothing.")] = False,
    overwrite: Overwrite = False,
    any_base: AnyBase = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """Merge adapters into a model on the disk, W' = W0 * (1 + BA), without loading it.

    OUT is written completely or not at all. After an interruption, the same command resumes.
    """
    # threads that wait for the next product leave their cores to those that hash and write; read as torch is imported
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with errors_as_messages():
        from hira.files.merge.merge_checkpoint import merge_checkpoint, size_in_bytes

        if weight and len(weight) != len(adapters):
            raise typer.BadParameter(f"{len(weight)} weights for {len(adapters)} adapters", param_hint="--weight")
        if max_shard_size is not None and size_in_bytes(max_shard_size) is None:
            raise typer.BadParameter(f"{max_shard_size!r} is not a size such as 5GB", param_hint="--max-shard-size")
        with _progress() as advance:
            report = merge_checkpoint(
                base,
                adapters,
                out,
                weights=weight or None,
                dtype=dtype,
                rounding=rounding,
                max_shard_size=max_shard_size,
                overwrite=overwrite,
                dry_run=dry_run,
                any_base=any_base,
                allow_pickle=allow_pickle,
                progress=advance,
            )
        for line in _merge_lines(report):
            print_line(line)


def convert(
    adapter: Adapter,
    out: Out,
    source: Annotated[
        Literal["original"] | None, typer.Option("--from", help="The adapter was saved by the HiRA paper's repository.")
    ] = None,
    to: Annotated[
        Literal["lora"] | None,
        typer.Option("--to", help="Approximate the adapter by a LoRA; part of the update is lost."),
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, metavar="N", help="The LoRA's rank.")] = None,
    base: Annotated[str | None, typer.Option(metavar="FOLDER", help="The base model, which a LoRA needs.")] = None,
    fold: Annotated[bool, typer.Option("--fold", help="Write an adapter that PEFT's own HiRA can load.")] = False,
    overwrite: Overwrite = False,
    any_base: AnyBase = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """Write an adapter in another form: from the paper's repository, as a LoRA, or for PEFT's own HiRA.

    A LoRA cannot hold all of HiRA's update; the command prints how much each layer loses.
    """
    with errors_as_messages():
        from hira.files.convert.convert_adapter import contradiction, convert_adapter

        if (problem := contradiction(source, to, rank, base, fold)) is not None:
            raise typer.BadParameter(problem)
        result = convert_adapter(
            adapter,
            out,
            source=source,
            to=to,
            rank=rank,
            base=base,
            fold=fold,
            overwrite=overwrite,
            any_base=any_base,
            allow_pickle=allow_pickle,
        )
        for note in result.notes:
            print_line(f"note: {note}")
        if result.lora is not None:
            errors = {layer.name: layer.relative_error for layer in result.lora.layers}
            Console().print(_error_table(result.lora.rank, errors, result.lora.relative_error))
            print_line(result.lora.statement)
        method = "LoRA" if result.lora else "HiRA"
        print_line(f"{result.path}: {method} of rank {result.rank}, modules: {result.modules}")


def inspect(
    adapter: Adapter,
    base: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="The base model that the adapter was trained on.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw a map of the layers to this file.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Write a page with all numbers and spectra to this file.")
    ] = None,
    spectra: Annotated[bool, typer.Option(help="Compute the singular values of W0 and of the update.")] = True,
    any_base: AnyBase = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """Show the size, the ranks and the spectra of an adapter's update, layer by layer."""
    if plot is not None and find_spec("matplotlib") is None:
        raise typer.BadParameter("matplotlib is not installed: pip install matplotlib", param_hint="--plot")
    for option, path in (("--plot", plot), ("--html", html)):
        if path is not None and not path.parent.is_dir():
            raise typer.BadParameter(f"{path.parent} is not a folder", param_hint=option)
    with errors_as_messages():
        from hira.files.inspect import inspect_adapter as inspection
        from hira.files.inspect import report_page, report_table

        report = inspection.inspect_adapter(
            adapter, base, spectra=spectra, any_base=any_base, allow_pickle=allow_pickle
        )
        if json:
            print(report_table.to_json(report))
        else:
            console = Console()
            if console.is_terminal:
                for part in report_table.overview(report, console.width):
                    console.print(part, markup=False, highlight=False)
            else:  # a row for each module, of any width
                Console(width=10_000).print(report_table.table(report))
            for line in (*report_table.in_words(report), *(f"note: {note}" for note in report.notes)):
                print_line(line, width=console.width if console.is_terminal else None)
        if plot is not None:
            report_table.plot(report, plot, Path(adapter).name)
        if html is not None:
            report_page.write_page(report, html, Path(adapter).name)


def verify(folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder that hira wrote.")]) -> None:
    """Compare the files of a folder with the hashes in its manifest; status 1 if any differs."""
    with errors_as_messages():
        from hira.files.io import manifest

        problems = manifest.verify(folder)
        for problem in problems:
            print_line(problem, error=True)
        if not problems:
            print_line(f"{folder}: every file matches the manifest")
    raise typer.Exit(1 if problems else 0)


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A progress bar on the terminal, with bytes, their rate and the remaining time."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("merging", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _merge_lines(report: MergeReport) -> Iterator[str]:
    """The report of a merge, in lines."""
    size = f"{report.nbytes / 1e9:.3g} GB in {len(report.shards)} {'file' if len(report.shards) == 1 else 'files'}"
    done = f"{size} would be written, {report.free_bytes / 1e9:.3g} GB are free"
    if not report.dry_run:
        done = f"{size}, {report.seconds:.3g} s, {report.nbytes / 1e9 / report.seconds:.3g} GB/s"
    yield f"{report.out}: {done}"
    counts = {"merged": report.merged, "replaced": report.replaced, "added": report.added}
    yield f"tensors: {', '.join(f'{len(names)} {how}' for how, names in counts.items())}, of {report.tensors}"
    if report.resumed:
        yield f"finished before: {', '.join(report.resumed)}"
    if report.dry_run:
        yield from (f"{how}: {name}" for how, names in counts.items() for name in names)
    yield from (f"left out: {name}, {why}" for name, why in report.skipped.items())
    yield from (f"note: {note}" for note in report.notes)


def _error_table(rank: int, errors: dict[str, float], overall: float) -> Table:
    """A table of the relative errors of a LoRA."""
    from hira.files.io.printable import printable

    table = Table(box=box.SIMPLE, title=f"LoRA of rank {rank}", title_justify="left", show_footer=True)
    table.add_column("module", "all", overflow="fold")
    table.add_column("relative error", f"{overall:.4f}", justify="right")
    for name, error in errors.items():
        table.add_row(Text(printable(name)), f"{error:.4f}")
    return table
