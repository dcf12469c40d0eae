"""The command `python -m benchmarks.comparison`."""

from __future__ import annotations

from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import torch
import typer
from benchmarks import comparison
from rich.console import Console


class Device(str, Enum):
    """Where to run."""

    cpu = "cpu"
    cuda = "cuda"


class Dtype(str, Enum):
    """The dtypes of base models."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def compare(
    quick: Annotated[bool, typer.Option("--quick", help="Smaller cases, in under two minutes.")] = False,
    case: Annotated[
        list[str] | None, typer.Option(help="Only cases whose name contains this; may be repeated.")
    ] = None,
    device: Annotated[Device, typer.Option(help="Where to run.")] = Device.cpu,
    dtype: Annotated[Dtype, typer.Option(help="The dtype of base models; adapters are float32.")] = Dtype.float32,
    rank: Annotated[int, typer.Option(min=1, help="r of every adapter.")] = 32,
    threads: Annotated[int | None, typer.Option(min=1, help="PyTorch's threads; its own choice by default.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Write the raw times here.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw them here.")] = None,
) -> None:
    """Compare LoRA, hira, PEFT's own HiRA, DoRA and full fine-tuning on this machine.

    Every result is checked against a float64 reference first, and a wrong one gets no time. The methods then run
    interleaved, forward and backward where a case trains; medians and their ratios are printed.
    """
    if device is Device.cuda and not torch.cuda.is_available():
        raise typer.BadParameter("PyTorch sees no CUDA device here", param_hint="--device")
    if plot is not None and find_spec("matplotlib") is None:
        raise typer.BadParameter("matplotlib is not installed: pip install matplotlib", param_hint="--plot")
    if threads is not None:
        torch.set_num_threads(threads)
    options = comparison.Options(device.value, getattr(torch, dtype.value), rank, quick, tuple(case or ()))
    cases = comparison.cases(options)
    if not cases:
        raise typer.BadParameter("no case has a name that contains it", param_hint="--case")
    records = comparison.run_all(cases)
    Console().print(comparison.tables(records))
    if out is not None:
        comparison.save(records, options, out)
    if plot is not None:
        comparison.plot(records, plot)


if __name__ == "__main__":
    app()
