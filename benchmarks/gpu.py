"""Checks the Triton kernels against float64 on a GPU, then times them and hira as a whole, in under nine minutes.

    python benchmarks/gpu.py OUT

A kernel that is wrong stops the run before anything is timed. What was measured goes to OUT/kernels.json, and to
OUT/pytorch.json and OUT/triton.json in the format of `python -m benchmarks.comparison`, without and with the kernels.
`gpu.sh` runs this on a machine without a network.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from benchmarks import comparison
from benchmarks.comparison.report import machine
from rich.console import Console

from hira.ops import effective_weight, heuristics, kernel_choice, linear_each, triton
from hira.ops.dither import noise_of

SECONDS = 520  # after which no further case is begun
CASES = ("4096 x 4096", "Llama", "mixed batch")


def main(out: Path) -> None:
    start = time.perf_counter()
    if not torch.cuda.is_available():
        raise SystemExit("PyTorch sees no CUDA device here")
    errors = dict(check_kernels("cuda"))
    print(json.dumps(errors, indent=1))
    out.mkdir(parents=True, exist_ok=True)
    measured = {"machine": machine("cuda"), "errors": errors, "kernels": time_kernels()}
    (out / "kernels.json").write_text(json.dumps(measured, indent=1) + "\n")
    print(json.dumps(measured["kernels"], indent=1))
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
    for kernels, found in records.items():
        print("with the kernels" if kernels else "without them")
        Console().print(comparison.tables(found))


def switch(kernels: bool) -> None:
    """Switch the kernels on or off here, and in the processes that measure memory."""
    heuristics.TRITON = os.environ["HIRA_TRITON"] = "auto" if kernels else "0"


# Correctness


def check_kernels(device: str) -> Iterator[tuple[str, float]]:
    """The largest relative error of each kernel over shapes and dtypes.

    Raises:
        SystemExit: an error is more than what `kernel_choice` allows.
    """
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for name in triton.__all__:
            allowed = kernel_choice.allowed(dtype)
            error = max(kernel_choice.errors(name, dtype, dtype, torch.device(device)))
            if error > allowed:
                raise SystemExit(f"{name} in {dtype} is off by {error:.1e}, allowed {allowed:.1e}; nothing is timed")
            yield f"{name}, {str(dtype).removeprefix('torch.')}", error


# Times


def time_kernels(size: int = 8192, r: int = 32, tokens: int = 4096) -> dict[str, Any]:
    """Microseconds and bytes per second of each kernel in bfloat16, beside a copy and what PyTorch takes."""
    switch(False)  # for what PyTorch takes; the kernels are called by name
    W0 = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    A, B = torch.randn(r, size, device="cuda"), torch.randn(size, r, device="cuda") / 100
    x, dy = (torch.randn(tokens, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    adapters = [(A.clone(), B.clone(), 0) for _ in range(16)]
    noise, copy = noise_of(W0), torch.empty_like(W0)
    linear = sys.modules["hira.ops.linear"]
    both, once = 2 * W0.nbytes, W0.nbytes
    measured = {
        "copy": speed(lambda: copy.copy_(W0), both),
        "form": speed(lambda: triton.form(W0, A, B, torch.bfloat16), both),
        "form, dithered": speed(lambda: triton.form(W0, A, B, torch.bfloat16, noise=noise), both),
        "form by PyTorch": speed(lambda: effective_weight.form(W0, A, B, 0, torch.bfloat16), both),
        "factor gradients": speed(lambda: triton.factor_gradients(dy, x, W0, A, B)),
        "factor gradients by PyTorch": speed(lambda: linear.linear_factor_gradients(dy, x, W0, A, B, 0, None)),
        "product dy^T x alone, by cuBLAS": speed(lambda: dy.t() @ x),
        "decode, 1 token": speed(lambda: triton.decode(x[:1], W0, A, B), once),
        "decode, 16 tokens": speed(lambda: triton.decode(x[:16], W0, A, B), once),
        "16 tokens of 16 adapters": speed(lambda: linear_each(x[:16], W0, adapters), once),
        "x W0^T alone, 1 token, by cuBLAS": speed(lambda: x[:1] @ W0.t(), once),
    }
    fastest = measured["copy"]["GB/s"]
    for values in measured.values():
        if "GB/s" in values:
            values["of copy's"] = values["GB/s"] / fastest
    return {"size": size, "rank": r, "tokens": tokens, **measured}


def speed(function: Callable[[], Any], nbytes: int | None = None, repeats: int = 30) -> dict[str, float]:
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        function()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end))
    median = statistics.median(times)
    return {"us": median} if nbytes is None else {"us": median, "GB/s": nbytes / median / 1e3}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
