"""The `hira` command."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from hira.cli import bench_command, file_commands, serving_commands, training_commands
from hira.cli.messages import quiet_imports

app = typer.Typer(
    name="hira",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"hira {version('hira')}")
        raise typer.Exit


@app.callback()
def common(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print hira's version and exit.")
    ] = False,
) -> None:
    """HiRA adapters for PEFT, at LoRA's price."""


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
)
def run(
    context: typer.Context,
    target: Annotated[str, typer.Argument(metavar="SCRIPT|MODULE", help="The script, or with -m the module.")],
    module: Annotated[bool, typer.Option("-m", help="Run a module, as `python -m` does.")] = False,
) -> None:
    """Run an unmodified script or module with HiRA registered, its arguments behind it.

    It is run by `python`, with the same options, arguments, exit status and signals. HiRA is registered when it imports
    PEFT, and in every Python process that it starts in turn.
    """
    if sys.flags.ignore_environment or sys.flags.no_site:
        raise typer.BadParameter("python ignores PYTHONPATH with -E, -I and -S: leave them out, or import hira there")
    folders = [str(Path(__file__).with_name("startup")), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
    options = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    if getattr(sys.stdout, "write_through", False):  # the one option that is no flag
        options.append("-u")
    command = [sys.executable, *options, *(["-m"] if module else []), target, *context.args]
    if os.name == "nt":  # which has no exec that a shell would wait for
        raise typer.Exit(subprocess.call(command))
    os.execv(sys.executable, command)


@app.command()
def env() -> None:
    """Print the versions that matter here, and the paths the operators take on this machine."""
    with quiet_imports():
        import torch

        import hira
        from hira.ops import heuristics, kernel_choice

    table = Table(show_header=False, box=None)
    table.add_row("python", f"{platform.python_version()} on {platform.platform()}")
    for package in ("hira", "torch", "peft", "transformers", "accelerate", "safetensors", "bitsandbytes", "triton"):
        table.add_row(package, _version(package))
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    table.add_row("device", ", ".join(devices) or f"CPU, {torch.get_num_threads()} threads")
    table.add_row("PEFT's type HIRA", "hira" if hira.is_registered() else "PEFT's own")
    for name, path in heuristics.describe(torch.device("cuda" if devices else "cpu")).items():
        table.add_row(name, path)
    for i in range(len(devices)):
        known = kernel_choice.known(torch.device("cuda", i)) if find_spec("triton") else {}
        table.add_row(f"verdicts on device {i}", "" if known else "none yet")
        for entry, verdict in known.items():
            table.add_row(f"  {entry}", str(verdict))
    Console().print(table)


app.command()(bench_command.bench)
app.command()(file_commands.merge)
app.command()(file_commands.convert)
app.command()(file_commands.inspect)
app.command()(file_commands.verify)
app.command()(serving_commands.push)
app.command(context_settings=training_commands.SETTINGS)(training_commands.finetune)


def main() -> None:
    """The entry point."""
    app()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
