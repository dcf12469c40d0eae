"""Checks the Triton kernels against float64 on a GPU, then times them and hira as a whole, in under nine minutes.

    python benchmarks/gpu.py OUT

A kernel that is wrong stops the run before a step is timed. What was measured goes to OUT/kernels.json, and to
OUT/pytorch.json and OUT/triton.json in the format of `python -m benchmarks.comparison`, without and with the kernels.
The kernels are measured as `hira bench --kernels` does. `gpu.sh` runs this on a machine without a network.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch
from benchmarks import comparison
from benchmarks.comparison.report import machine
from rich.console import Console

from hira.ops import heuristics, kernel_bench

SECONDS = 520  # after which no further case is begun
CASES = ("4096 x 4096", "Llama", "mixed batch")
SIZES = (4096, 8192)


def main(out: Path) -> None:
    start = time.perf_counter()
    if not torch.cuda.is_available():
        raise SystemExit("PyTorch sees no CUDA device here")
    out.mkdir(parents=True, exist_ok=True)
    reports = [measured(torch.device("cuda", 0), size) for size in SIZES]
    found = {"machine": machine("cuda"), "kernels": [report.as_dict() for report in reports]}
    (out / "kernels.json").write_text(json.dumps(found, indent=1) + "\n")
    options = comparison.Options("cuda", torch.bfloat16, only=CASES)
    records: dict[bool, list[comparison.Record]] = {False: [], True: []}
    for case in comparison.cases(options):
        for kernels in records:
            if time.perf_counter() - start > SECONDS:
                print(f"out of time before {case.name}")
                return
            switch(kernels)
            records[kernels] += comparison.run(case)
            comparison.save(records[kernels], options, out / ("triton.json" if kernels else "pytorch.json"))
    for kernels, found_there in records.items():
        print("with the kernels" if kernels else "without them")
        Console().print(comparison.tables(found_there))


def measured(device: torch.device, size: int) -> kernel_bench.Report:
    """Print and return the report on the kernels.

    Raises:
        SystemExit: a kernel is wrong.
    """
    report = kernel_bench.measure(device, size)
    print(report)
    if report.wrong:
        raise SystemExit("a kernel is wrong; nothing else is timed")
    return report


def switch(kernels: bool) -> None:
    """Switch the kernels on or off here, and in the processes that measure memory."""
    heuristics.TRITON = os.environ["HIRA_TRITON"] = "auto" if kernels else "0"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
