"""Kernels prove themselves: before one serves a dtype on a device, it is checked there and timed against PyTorch.

The check is against `reference` in float64. Of those that are right the faster serves. The verdict holds for a device
and for the dtypes of W0 and of the product, whatever the shape: forward, backward and merge then form W' by the same
operations, a block at a time or whole. It is kept in memory for the process, so that W' keeps its bits, and in the
user's cache folder for later processes with the same GPU, driver and versions.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hira.ops import heuristics, reference
from hira.ops.dither import noise_of
from hira.ops.workspace import is_concrete

Call = Callable[[], object]

logger = logging.getLogger(__name__)

SHAPES = ((1, 1, 1), (63, 65, 3), (200, 130, 33), (256, 512, 32))  # out, in, r
REPEATS = 5

_verdicts: dict[tuple[Any, ...], bool] = {}
_judging = threading.RLock()


def serves(name: str, W0: Tensor, dtype: torch.dtype, kernel: Call, plain: Call) -> bool:
    """Whether a kernel serves for a weight like W0.

    Args:
        name: of the kernel in `hira.ops.triton`: form, factor_gradients or decode.
        W0: (out, in).
        dtype: that of the product.
        kernel: the call at hand by the kernel, for its time.
        plain: the same by PyTorch.
    """
    if heuristics.TRITON == "1" or torch.compiler.is_compiling():  # a trace can time nothing
        return heuristics.TRITON == "1"
    key = (name, W0.device, W0.dtype, dtype)
    verdict = _verdicts.get(key)
    if verdict is None:
        with _judging:
            verdict = _verdicts.get(key)  # of a thread that was faster
            if verdict is None:
                verdict = _verdicts[key] = _judge(name, W0, dtype, kernel, plain)
    return verdict


def _judge(name: str, W0: Tensor, dtype: torch.dtype, kernel: Call, plain: Call) -> bool:
    if not is_concrete(W0) or (W0.is_cuda and torch.cuda.is_current_stream_capturing()):
        logger.info("%s: PyTorch serves, since nothing can be timed in a graph that is being captured", name)
        return False
    machine, entry = _machine(W0.device), f"{name}, {W0.dtype}, {dtype}"
    known = _read(machine).get(entry)
    if isinstance(known, bool):
        return known
    try:
        error = max(errors(name, W0.dtype, dtype, W0.device))
        wrong = None if error <= allowed(dtype) else f"it is off by {error:.1e}, where {allowed(dtype):.1e} is allowed"
        ours, theirs = (seconds(call, W0.device) for call in (kernel, plain)) if wrong is None else (0.0, 0.0)
    except Exception as failure:  # of the compiler, the driver, the hardware: whatever it is, PyTorch serves
        wrong = f"{type(failure).__name__}: {failure}"
    if wrong is None:
        logger.info("%s: the kernel takes %.0f us, PyTorch %.0f us", entry, 1e6 * ours, 1e6 * theirs)
    else:
        warnings.warn(
            f"hira's kernel {name} is wrong for a weight in {W0.dtype} and a product in {dtype}, so PyTorch serves in "
            f"its place: {wrong}. Please report this, with {machine}.",
            stacklevel=2,
        )
    verdict = wrong is None and ours < theirs
    _write(machine, entry, verdict)
    return verdict


# Checks


def allowed(dtype: torch.dtype) -> float:
    """Two units in the last place, as a dither takes the other neighbour, or two roundings follow one another."""
    return 2 * max(torch.finfo(dtype).eps, 2.0**-15)


def errors(name: str, stored: torch.dtype, dtype: torch.dtype, device: torch.device) -> Iterator[float]:
    """The relative errors of a kernel, on random numbers of a few shapes; NaN counts as infinite."""
    from hira.ops import triton

    function = getattr(triton, name)
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    for out, into, r in SHAPES:
        W0, A, B = randn(out, into).to(stored), randn(r, into) / r, randn(out, r) / 10
        x, dy = randn(40, into).to(dtype), randn(40, out).to(dtype)
        exact = reference.modulated_weight(W0.double(), A.double(), B.double())
        if name == "form":
            yield distance(function(W0, A, B, dtype), exact)
            if dtype != torch.float32:
                yield distance(function(W0, A, B, dtype, noise=noise_of(W0)), exact)
        elif name == "decode":
            for tokens in (1, 5, 16):
                yield distance(function(x[:tokens], W0, A, B), x[:tokens].double() @ exact.t())
        else:
            H = (dy.double().t() @ x.double()) * W0.double()
            dA, dB = function(dy, x, W0, A, B)
            yield distance(dA, B.double().t() @ H)
            yield distance(dB, H @ A.double().t())


def distance(found: Tensor, exact: Tensor) -> float:
    """The norm of the error over that of the exact result."""
    error = float((found.double() - exact).norm() / exact.norm())
    return error if error == error else float("inf")


def seconds(function: Call, device: torch.device) -> float:
    """The median time of a call until the device is done, after one that compiles and warms up."""
    times = []
    wait = torch.cuda.synchronize if device.type == "cuda" else bool
    for _ in range(1 + REPEATS):
        wait(device)
        start = time.perf_counter()
        function()
        wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


# The cache folder


def _machine(device: torch.device) -> dict[str, str]:
    """What a verdict depends on."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
        "driver": str(getattr(torch._C, "_cuda_getDriverVersion", int)()) if cuda else "",
        "torch": torch.__version__,
        "triton": sys.modules["triton"].__version__,
        "hira": version("hira"),
    }


def _file(machine: dict[str, str]) -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hira" / "kernels"
    name = "-".join(value for value in machine.values() if value)
    return folder / ("".join(c if c.isalnum() or c in ".-+" else "_" for c in name) + ".json")


def _read(machine: dict[str, str]) -> dict[str, Any]:
    """The verdicts of earlier processes; none where there is no folder, or what is in it is not ours."""
    try:
        found = json.loads(_file(machine).read_text())
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError, RuntimeError):  # RuntimeError of a user without a home
        return {}


def _write(machine: dict[str, str], entry: str, verdict: bool) -> None:
    """Add a verdict to those in the file, in one step; without one where the folder cannot be written."""
    try:
        path = _file(machine)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps({**_read(machine), entry: verdict}, indent=1) + "\n")
        part.replace(path)
    except (OSError, RuntimeError) as error:
        logger.info("the verdict on %s is kept for this process alone: %s", entry, error)
