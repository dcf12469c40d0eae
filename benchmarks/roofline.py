"""Writes the table of docs/performance.md, of what a step should take at least on GPUs: python -m benchmarks.roofline

Every operation takes as long as its arithmetic or its traffic, whichever is longer, at the figures that the vendors
publish; one follows another, and nothing else takes time. What was measured stands beside it, from the committed
results.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks import comparison
from benchmarks.comparison.report import by_case, find
from benchmarks.readme_table import with_lines

ROOT = Path(__file__).parent.parent
PAGE, RESULTS = ROOT / "docs/performance.md", ROOT / "benchmarks/results/h200"
BEGIN = "<!-- benchmarks/roofline.py writes from here -->\n"
GOAL = 1.6  # times LoRA's step
SIZE, TOKENS, RANK = 4096, 4096, 32
WIDTH = 2  # bytes of a bfloat16
MEASURED = "linear 4096 x 4096, 4096 tokens"

# Bytes for each entry of W0, as tests/ops/test_bytes.py counts them: W' formed, and G reduced. The kernel that reduces
# G writes parts of dA for each 128 rows, and reads them again.
KERNELS = (4.0, 4.0 + 2 * 4 * RANK / 128)
OPERATORS = (42.0, 16.0)


class Device(NamedTuple):
    """What a vendor publishes of a GPU: bytes a second of its memory, and dense bfloat16 operations a second."""

    name: str
    bandwidth: float
    arithmetic: float


DEVICES = (
    # NVIDIA A100 Tensor Core GPU data sheet, A100 80GB SXM
    Device("A100 SXM 80 GB", 2.039e12, 312e12),
    # NVIDIA H100 Tensor Core GPU data sheet, H100 SXM: 1,979 Tflop/s with sparsity, half of that without
    Device("H100 SXM", 3.35e12, 989.5e12),
    # NVIDIA H200 Tensor Core GPU data sheet, H200 SXM: 1,979 Tflop/s with sparsity, half of that without
    Device("H200 SXM", 4.8e12, 989.5e12),
    # NVIDIA Ada GPU architecture white paper, appendix A: bfloat16 with float32 accumulation, without sparsity
    Device("RTX 4090", 1.008e12, 165.2e12),
    # AMD Instinct MI300X accelerator data sheet, without sparsity
    Device("MI300X", 5.3e12, 1307.4e12),
)


class Operation(NamedTuple):
    """Operations, an addition and a multiplication counted as two, and bytes to and from memory."""

    flops: float
    nbytes: float


def product(m: int, n: int, k: int) -> Operation:
    """(m, k) times (k, n), each matrix read or written once."""
    return Operation(2 * m * n * k, WIDTH * (m * k + k * n + m * n))


def elementwise(passes: int) -> Operation:
    """An operation that reads or writes an activation so many times."""
    return Operation(0, WIDTH * passes * TOKENS * SIZE)


def lora() -> Iterator[Operation]:
    """PEFT's LoRA, W0 x + s B (A x), with A and B in bfloat16, as under autocast."""
    yield product(TOKENS, SIZE, SIZE)  # y of W0
    yield product(TOKENS, RANK, SIZE)  # A x
    yield product(TOKENS, SIZE, RANK)  # B (A x)
    yield elementwise(2)  # times s
    yield elementwise(3)  # added to y
    yield product(TOKENS, SIZE, SIZE)  # dx of W0
    yield elementwise(2)  # dy times s
    yield product(TOKENS, RANK, SIZE)  # d(A x)
    yield product(SIZE, RANK, TOKENS)  # dB
    yield product(RANK, SIZE, TOKENS)  # dA
    yield product(TOKENS, SIZE, RANK)  # dx of the adapter
    yield elementwise(3)  # added to dx


def hira(forming: float, reducing: float, *, kept: bool = False) -> Iterator[Operation]:
    """HiRA, for the bytes an entry that forming W' and reducing G take; with W' kept it is formed once a step."""
    entries = SIZE * SIZE
    low_rank = 2 * RANK * entries
    for _ in range(1 if kept else 2):
        yield Operation(3 * low_rank, forming * entries)  # B A in three products of bfloat16
    yield product(TOKENS, SIZE, SIZE)  # y
    yield product(TOKENS, SIZE, SIZE)  # dx
    yield product(SIZE, SIZE, TOKENS)  # G
    yield Operation(2 * 2 * low_rank, reducing * entries)  # dA and dB, each in two products of bfloat16


def milliseconds(step: Iterator[Operation], device: Device) -> float:
    """The sum of what each operation takes at least."""
    return 1e3 * sum(max(flops / device.arithmetic, nbytes / device.bandwidth) for flops, nbytes in step)


def measured(name: str) -> tuple[float, float]:
    """LoRA's and hira's milliseconds in a committed run."""
    group = by_case(comparison.load(RESULTS / f"{name}.json")[0])[MEASURED]
    return find(group, "LoRA").median_ms, find(group, "hira").median_ms


def rows() -> list[str]:
    """The table in Markdown."""
    lines = [
        "| | LoRA | HiRA, times LoRA | with `keep_weight` | with PyTorch's operators | times the two products |",
        "|---|---|---|---|---|---|",
    ]
    for device in DEVICES:
        base = milliseconds(lora(), device)
        steps = (hira(*KERNELS), hira(*KERNELS, kept=True), hira(*OPERATORS))
        cells = [_cell(milliseconds(step, device), base) for step in steps]
        dense = milliseconds(iter([product(TOKENS, SIZE, SIZE)] * 2), device)
        cells.append(f"{milliseconds(hira(*KERNELS), device) / dense:.2f}")
        lines.append(f"| {device.name}, computed | {base:.2f} ms | {' | '.join(cells)} |")
    kernels, operators = measured("triton"), measured("pytorch")
    lines.append(
        f"| H200, measured | {kernels[0]:.2f} and {operators[0]:.2f} ms | {_cell(kernels[1], kernels[0])} | "
        f"not measured | {_cell(operators[1], operators[0])} | not measured |"
    )
    return lines


def _cell(time: float, base: float) -> str:
    missed = "" if time / base <= GOAL else ", goal missed"
    return f"{time:.2f} ms, {time / base:.2f}{missed}"


def with_table(page: str) -> str:
    """The page with the table between its two marks."""
    return with_lines(page, BEGIN, rows())


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
