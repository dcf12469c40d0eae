"""`hira bench`: what hira's GPU kernels do on the machine at hand."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated

import typer

from hira.cli.messages import errors_as_messages
from hira.errors import HiraError


def bench(
    kernels: Annotated[bool, typer.Option("--kernels", help="Measure the Triton kernels on the CUDA device.")] = False,
    size: Annotated[int, typer.Option(min=16, metavar="N", help="The weight is N x N.")] = 4096,
    rank: Annotated[int, typer.Option(min=1, metavar="R", help="The adapter's rank.")] = 32,
    tokens: Annotated[int, typer.Option(min=16, metavar="T", help="The input's tokens.")] = 4096,
) -> None:
    """Check every GPU kernel against float64, time it against PyTorch, and print a table to paste into an issue.

    What is found replaces the verdicts in the cache folder, so that later processes act by it.
    """
    if not kernels:
        raise typer.BadParameter("pass --kernels; whole steps are timed by `python -m benchmarks.comparison`")
    import torch

    with errors_as_messages():
        if not torch.cuda.is_available():
            raise HiraError("PyTorch sees no CUDA device here, and the kernels serve CUDA alone")
        if find_spec("triton") is None:
            raise HiraError("triton is not installed, so that there are no kernels to measure")
        from hira.ops import kernel_bench

        report = kernel_bench.measure(torch.device("cuda", torch.cuda.current_device()), size, rank, tokens)
    print(report)
    raise typer.Exit(1 if report.wrong else 0)
