"""The `hira` command."""

from __future__ import annotations

import os
import platform
import runpy
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    name="hira",
    help="HiRA adapters for PEFT, at LoRA's price.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
)
def run(
    context: typer.Context,
    target: Annotated[str, typer.Argument(metavar="SCRIPT|MODULE", help="The script, or with -m the module.")],
    module: Annotated[bool, typer.Option("-m", help="Run a module, as `python -m` does.")] = False,
) -> None:
    """Run an unmodified script or module with HiRA registered, its arguments behind it.

    The program sees itself as __main__, its own arguments in sys.argv, and sys.path as python would set it. Its exit
    status is that of the command; a script or module that does not exist is a usage error, status 2.
    """
    sys.argv = [target, *context.args]
    if module:
        _lead_path(os.getcwd())
        if not _module_exists(target):
            raise typer.BadParameter(f"there is no module {target!r}", param_hint="MODULE")
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    else:
        if not Path(target).exists():
            raise typer.BadParameter(f"there is no file {target!r}", param_hint="SCRIPT")
        _lead_path(str(Path(target).resolve().parent))
        runpy.run_path(target, run_name="__main__")


@app.command()
def env() -> None:
    """Print the versions that matter here, and the paths the operators take on this machine."""
    import torch

    import hira
    from hira.ops import paths

    table = Table(show_header=False, box=None)
    table.add_row("python", f"{platform.python_version()} on {platform.platform()}")
    for package in ("hira", "torch", "peft", "transformers", "accelerate", "safetensors", "bitsandbytes", "triton"):
        table.add_row(package, _version(package))
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    table.add_row("device", ", ".join(devices) or f"CPU, {torch.get_num_threads()} threads")
    table.add_row("PEFT's type HIRA", "hira" if hira.is_registered() else "PEFT's own")
    entries = paths.block_entries(torch.device("cuda" if devices else "cpu"))
    table.add_row("linear", f"one product with W', formed in blocks of {entries:,} entries; PyTorch operators")
    table.add_row("embedding", "the rows that are looked up; PyTorch operators")
    table.add_row("convolution", "one convolution with W', formed whole; PyTorch operators")
    table.add_row("torch.compile", "opaque operators for linear products and kernels, the rest is traced")
    Console().print(table)


def main() -> None:
    """The entry point."""
    app()


def _lead_path(folder: str) -> None:
    """Put a program's folder first on sys.path, unless python was told not to (-P)."""
    if not getattr(sys.flags, "safe_path", False):  # from Python 3.11 on
        sys.path[0] = folder


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _module_exists(name: str) -> bool:
    from importlib.util import find_spec

    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False
