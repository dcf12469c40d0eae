"""Measures every Triton kernel on a device, against float64 and against PyTorch: `hira bench --kernels`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hira.ops import effective_weight, heuristics, kernel_choice
from hira.ops.dither import noise_of
from hira.ops.kernel_choice import Verdict
from hira.ops.linear import linear_factor_gradients, linear_forward

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_COLUMNS = ("kernel, W0, product", "error", "allowed", "kernel, us", "PyTorch, us", "what serves")


@dataclass(frozen=True)
class Report:
    """The verdicts on all kernels, and the times of what they are to be compared with, in microseconds."""

    machine: dict[str, str]
    size: int
    rank: int
    tokens: int
    verdicts: dict[str, Verdict]
    plain_us: dict[str, float]

    @property
    def wrong(self) -> list[str]:
        """The kernels that failed their check, with what was wrong."""
        return [f"{entry}: {verdict.problem}" for entry, verdict in self.verdicts.items() if verdict.problem]

    def as_dict(self) -> dict[str, Any]:
        """All of it for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """A table in Markdown, with the versions above it."""
        versions = [f"{name} {value}".strip() for name, value in self.machine.items() if name != "device" and value]
        rows = [
            (entry, _scientific(verdict.error), _scientific(verdict.allowed), *map(_whole, _times(verdict)), what)
            for entry, verdict in self.verdicts.items()
            for what in ("kernel" if verdict.serves else "PyTorch" if verdict.problem is None else "PyTorch: wrong",)
        ]
        rows += [(name, "", "", "", _whole(us), "") for name, us in self.plain_us.items()]
        lines = [
            f"{self.machine['device']}; {'; '.join(versions)}",
            f"W0 {self.size} x {self.size}, r = {self.rank}, {self.tokens} tokens, 1 to decode",
            "",
            *(f"| {' | '.join(row)} |" for row in (_COLUMNS, ("---",) * len(_COLUMNS), *rows)),
        ]
        return "\n".join([*lines, *(["", *self.wrong] if self.wrong else [])])


def measure(device: torch.device, size: int = 4096, rank: int = 32, tokens: int = 4096) -> Report:
    """Judge every kernel in float32, bfloat16 and float16, and keep the verdicts in the user's cache folder.

    Args:
        device: a CUDA device, or with Triton's interpreter a CPU.
        size: of W0 (size, size).
        rank: of the adapter.
        tokens: of the input.
    """
    verdicts, plain_us = {}, {}
    for dtype in DTYPES:
        short = str(dtype).removeprefix("torch.")
        W0, x, dy = (torch.randn(rows, size, device=device).to(dtype) for rows in (size, tokens, tokens))
        A, B = torch.randn(rank, size, device=device), torch.randn(size, rank, device=device) / 100
        for name, kernel, plain in _calls(W0, A, B, x, dy):
            with _without_kernels():
                verdict = kernel_choice.judge(name, W0, dtype, kernel, plain)
            verdicts[kernel_choice.entry_of(name, dtype, dtype)] = verdict
        copy = torch.empty_like(W0)
        for name, call in {
            "a copy of W0": partial(copy.copy_, W0),
            "the product dy^T x": partial(torch.mm, dy.t(), x),
            "the product x W0^T of 1 token": partial(torch.mm, x[:1], W0.t()),
        }.items():
            plain_us[f"{name}, {short}"] = 1e6 * kernel_choice.seconds(call, device)
    machine = kernel_choice.machine_of(device)
    kernel_choice.keep(machine, verdicts)
    return Report(machine, size, rank, tokens, verdicts, plain_us)


def _calls(
    W0: Tensor, A: Tensor, B: Tensor, x: Tensor, dy: Tensor
) -> Iterator[tuple[str, Callable[[], object], Callable[[], object]]]:
    """Each kernel's name, with a call of it and the same by PyTorch's operations."""
    from hira.ops import triton

    dtype = x.dtype
    noise = noise_of(W0) if heuristics.dithers(W0.dtype, dtype) else None
    yield (
        "form",
        partial(triton.form, W0, A, B, dtype, noise=noise),
        partial(effective_weight.form, W0, A, B, 0, dtype),
    )
    yield (
        "factor_gradients",
        partial(triton.factor_gradients, dy, x, W0, A, B),
        partial(linear_factor_gradients, dy, x, W0, A, B, 0, None),
    )
    yield (
        "decode",
        partial(triton.decode, x[:1], W0, A, B),
        partial(linear_forward, x[:1], W0, A, B, None, 0, False, False),
    )


@contextmanager
def _without_kernels() -> Iterator[None]:
    """Have the operators take PyTorch's operations; kernels that are called by name run."""
    before, heuristics.TRITON = heuristics.TRITON, "0"
    try:
        yield
    finally:
        heuristics.TRITON = before


def _times(verdict: Verdict) -> tuple[float | None, float | None]:
    return verdict.kernel_us, verdict.pytorch_us


def _scientific(number: float | None) -> str:
    return "" if number is None else f"{number:.1e}"


def _whole(number: float | None) -> str:
    return "" if number is None else f"{number:,.0f}"
