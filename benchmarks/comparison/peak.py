"""The peak of memory of one training step, in a process of its own, `python -m benchmarks.comparison.peak`.

On a CPU it is the resident memory, which has what PyTorch's own count leaves out: the work space of its libraries, and
what the allocator holds in between.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from benchmarks.comparison.cases import Case, Options, adapted, cases, step
from benchmarks.comparison.methods import METHODS, Method

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak(case: Case, method: Method) -> int | None:
    """Bytes that one step of a case took at its height, above what was there before; None where it cannot be known.

    Args:
        case: the case.
        method: the method that adapts its model.

    Raises:
        subprocess.CalledProcessError: the process failed.
    """
    options = case.options
    if options.device == "cpu" and not _RESET.exists():
        return None
    arguments = {**asdict(options), "dtype": str(options.dtype).removeprefix("torch."), "only": [case.name]}
    command = [
        sys.executable,
        "-m",
        "benchmarks.comparison.peak",
        json.dumps(arguments),
        method.name,
        str(torch.get_num_threads()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def main(arguments: str, method: str, threads: str) -> None:
    """Run the step of the case that the arguments name, and print the bytes."""
    torch.set_num_threads(int(threads))
    given = json.loads(arguments)
    options = Options(**{**given, "dtype": getattr(torch, given["dtype"]), "only": tuple(given["only"])})
    (case,) = cases(options)
    model = adapted(case, next(m for m in METHODS if m.name == method))
    inputs = case.inputs
    gc.collect()
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(case, model, inputs)
        print(torch.cuda.max_memory_allocated() - before)
        return
    before = _resident("VmRSS")
    _RESET.write_text("5")  # sets the high-water mark to what is resident now
    step(case, model, inputs)
    print(_resident("VmHWM") - before)


def _resident(key: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main(*sys.argv[1:])
