"""Kernels prove themselves: before one serves a dtype on a device, it is checked there and timed against PyTorch.

The check is against `reference` in float64. Of those that are right the faster serves. The verdict holds for a device
and for the dtypes of W0 and of the product, whatever the shape: forward, backward and merge then form W' by the same
operations, a block at a time or whole. It is kept in memory for the process, so that W' keeps its bits, and in the
user's cache folder for other processes with the same GPU, driver and versions. How processes of one job come to one
verdict, and what holds while a CUDA graph is captured or code is compiled, is in docs/architecture.md.
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
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hira.ops import heuristics, reference
from hira.ops.dither import noise_of
from hira.ops.workspace import is_concrete

if sys.platform != "win32":
    import fcntl

Call = Callable[[], object]

logger = logging.getLogger(__name__)

SHAPES = ((1, 1, 1), (63, 65, 3), (200, 130, 33), (256, 512, 32))  # out, in, r
REPEATS = 5
FORMAT = 3  # of the cache file
PATIENCE = 60.0  # seconds that a process waits for the verdict of another


@dataclass(frozen=True)
class Verdict:
    """What was found out about a kernel for a dtype of W0 and one of the product."""

    error: float | None  # the largest relative error over `SHAPES`; None where the kernel did not run
    allowed: float
    kernel_us: float | None  # the median time of a call; None where the kernel is wrong, and was not timed
    pytorch_us: float | None
    size: tuple[int, int]  # (out, in) of the weight that was timed
    failure: str | None = None  # the error that the check or the timing ended with

    @property
    def serves(self) -> bool:
        """Whether the kernel is right, and faster than PyTorch."""
        return self.kernel_us is not None and self.pytorch_us is not None and self.kernel_us < self.pytorch_us

    @property
    def problem(self) -> str | None:
        """What is wrong with the kernel, in words."""
        if self.failure is not None:
            return self.failure
        if self.error is None or self.error <= self.allowed:
            return None
        return f"it is off by {self.error:.1e}, where {self.allowed:.1e} is allowed"

    def __str__(self) -> str:
        if self.problem is not None:
            return f"PyTorch serves: {self.problem}"
        which = "the kernel serves" if self.serves else "PyTorch serves"
        return (
            f"{which}: kernel {self.kernel_us:.0f} us, PyTorch {self.pytorch_us:.0f} us for {self.size[0]} x "
            f"{self.size[1]}; error {self.error:.1e} of {self.allowed:.1e} allowed"
        )


_verdicts: dict[tuple[Any, ...], Verdict] = {}
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
    if not is_concrete(W0):
        return False
    key = (name, W0.device, W0.dtype, dtype)
    verdict = _verdicts.get(key)
    if verdict is None:
        if heuristics.is_capturing(W0.device):
            logger.info("%s: PyTorch serves in a graph that is captured before the kernel was judged", name)
            return False
        with _judging:
            verdict = _verdicts.get(key)  # of a thread that was faster
            if verdict is None:
                verdict = _verdicts[key] = _known_or_judged(name, W0, dtype, kernel, plain)
    return verdict.serves


def _known_or_judged(name: str, W0: Tensor, dtype: torch.dtype, kernel: Call, plain: Call) -> Verdict:
    """The verdict of the cache file, else one that is found and added to it; one process judges at a time."""
    machine, entry = machine_of(W0.device), entry_of(name, W0.dtype, dtype)
    known = _read(machine).get(entry)
    if known is None or known.failure is not None:
        with _one_process(machine):
            known = _read(machine).get(entry)  # of a process that was faster
            if known is None or known.failure is not None:
                known = judge(name, W0, dtype, kernel, plain)
                keep(machine, {entry: known})
    return known


def judge(name: str, W0: Tensor, dtype: torch.dtype, kernel: Call, plain: Call) -> Verdict:
    """Check a kernel and time it against PyTorch, with a warning if it is wrong; arguments as for `serves`."""
    error = ours = theirs = failure = None
    limit = allowed(dtype)
    try:
        error = max(errors(name, W0.dtype, dtype, W0.device))
        if error <= limit:
            ours, theirs = (1e6 * seconds(call, W0.device) for call in (kernel, plain))
    except Exception as raised:  # of the compiler, the driver, the hardware: whatever it is, PyTorch serves
        failure = f"{type(raised).__name__}: {raised}"
    out, into = W0.shape
    verdict = Verdict(error, limit, ours, theirs, (out, into), failure)
    if verdict.problem is None:
        logger.info("%s: %s", entry_of(name, W0.dtype, dtype), verdict)
    else:
        warnings.warn(
            f"hira's kernel {name} failed its check for a weight in {W0.dtype} and a product in {dtype}, so PyTorch "
            f"serves in its place: {verdict.problem}. Please report this, with {machine_of(W0.device)}.",
            stacklevel=2,
        )
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
            if r > 1:  # A and B once more, as those of a HiRA and a LoRA
                A_, B_ = A.double(), B.double()
                exact = reference.modulated_weight(W0.double(), A_[:-1], B_[:, :-1], A_[-1:], B_[:, -1:])
                yield distance(function(W0, A, B, dtype, lora_r=1), exact)
        elif name == "decode":
            for tokens in (1, 5, 16):
                yield distance(function(x[:tokens], W0, A, B), x[:tokens].double() @ exact.t())
        else:
            H = (dy.double().t() @ x.double()) * W0.double()
            dA, dB = function(dy, x, W0, A, B)
            yield distance(dA, B.double().t() @ H)
            yield distance(dB, H @ A.double().t())


def distance(found: Tensor, exact: Tensor) -> float:
    """The norm of the error over that of the exact result, or if it is more, an eighth of the same of a single entry.

    So one entry that is wrong among many is seen, and one of eight times the root mean square may be rounded.
    """
    difference = found.double() - exact
    deviation = exact.square().mean().sqrt()
    error = float(torch.maximum(difference.square().mean().sqrt(), difference.abs().max() / 8) / deviation)
    return error if error == error else float("inf")


def seconds(function: Call, device: torch.device) -> float:
    """The median time of a call until the device is done, after one that compiles and warms up.

    Only the current stream is waited for: another may hold a transfer whose other end waits for this process's verdict.
    """
    times = []
    wait = torch.cuda.current_stream(device).synchronize if device.type == "cuda" else lambda: None
    for _ in range(1 + REPEATS):
        wait()
        start = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


# The cache folder


def known(device: torch.device) -> dict[str, Verdict]:
    """The verdicts in the cache file for a device, by kernel and dtypes."""
    return _read(machine_of(device))


def keep(machine: dict[str, str], found: dict[str, Verdict]) -> None:
    """Add verdicts to those in the file, in one step; without a word where the folder cannot be written."""
    try:
        path = _file(machine)
        path.parent.mkdir(parents=True, exist_ok=True)
        verdicts = {entry: asdict(verdict) for entry, verdict in {**_read(machine), **found}.items()}
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps({"format": FORMAT, "machine": machine, "verdicts": verdicts}, indent=1) + "\n")
        part.replace(path)
    except (OSError, RuntimeError) as error:
        logger.info("verdicts are kept for this process alone: %s", error)


def machine_of(device: torch.device) -> dict[str, str]:
    """What a verdict depends on: the device and its driver, and the versions of what makes the kernels."""
    from hira.ops.triton import triton_version

    name, driver = device.type, ""
    if device.type == "cuda":  # PyTorch's name for ROCm's devices too
        properties = torch.cuda.get_device_properties(device)
        name = properties.name
        if torch.version.hip is not None:  # several of AMD's have one name
            name = f"{name} {properties.gcnArchName}"
        driver = str(getattr(torch._C, "_cuda_getDriverVersion", str)())
    return {
        "device": name,
        "driver": driver,
        "torch": torch.__version__,
        "triton": triton_version,
        "hira": version("hira"),
    }


def entry_of(name: str, stored: torch.dtype, dtype: torch.dtype) -> str:
    """The name of a verdict in the cache file."""
    return ", ".join((name, *(str(each).removeprefix("torch.") for each in (stored, dtype))))


def _file(machine: dict[str, str]) -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hira" / "kernels"
    name = "-".join(value for value in machine.values() if value)
    return folder / ("".join(c if c.isalnum() or c in ".-+" else "_" for c in name) + ".json")


def _read(machine: dict[str, str]) -> dict[str, Verdict]:
    """The verdicts of other processes; none where there is no file, or it is damaged or of another format."""
    try:
        found = json.loads(_file(machine).read_text())
        if found["format"] != FORMAT:
            return {}
        verdicts = {
            entry: Verdict(**{**values, "size": tuple(values["size"])}) for entry, values in found["verdicts"].items()
        }
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError):  # RuntimeError: no home
        return {}
    return {entry: verdict for entry, verdict in verdicts.items() if _is_sound(verdict)}


def _is_sound(verdict: Verdict) -> bool:
    """Whether the fields of a verdict have their types."""
    numbers = (verdict.error, verdict.kernel_us, verdict.pytorch_us)
    return (
        all(number is None or isinstance(number, float) for number in numbers)
        and isinstance(verdict.allowed, float)
        and [type(size) for size in verdict.size] == [int, int]
        and isinstance(verdict.failure, str | None)
    )


@contextmanager
def _one_process(machine: dict[str, str]) -> Iterator[None]:
    """Keep other processes that judge for this machine waiting, a minute at most; the system frees a dead one's lock.

    Where there are no locks, as on Windows or in a folder that cannot be written, each process judges for itself.
    """
    descriptor = None
    if sys.platform != "win32":
        with suppress(OSError, RuntimeError):
            path = _file(machine).with_suffix(".lock")
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            deadline = time.monotonic() + PATIENCE
            while not _locks(descriptor) and time.monotonic() < deadline:
                time.sleep(0.05)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _locks(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
