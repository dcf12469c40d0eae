"""What was measured, as a table, as JSON and as a picture."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from benchmarks.comparison.cases import Options
from benchmarks.comparison.measure import Record
from benchmarks.comparison.methods import HIRA, LORA, METHODS, PEFT_HIRA
from rich import box
from rich.console import Group
from rich.table import Table

_PACKAGES = ("hira", "torch", "peft", "transformers", "triton")


def tables(records: Sequence[Record]) -> Group:
    """Medians and their ratios, a table for each case."""
    return Group(*(_table(case, group) for case, group in by_case(records).items()))


def _table(case: str, group: Sequence[Record]) -> Table:
    memory = any(record.peak_bytes for record in group)
    result = Table(title=case, title_justify="left", box=box.SIMPLE)
    result.add_column("", min_width=19)
    for column in ("ms", "of LoRA's", "faster than PEFT's HiRA", *(("peak MB", "of LoRA's") if memory else ())):
        result.add_column(column, justify="right")
    lora, stock = (find(group, method.name) for method in (LORA, PEFT_HIRA))
    wrong = []
    for record in group:
        cells = [
            "wrong" if record.wrong else _number(record.median_ms),
            ratio(record.median_ms, lora.median_ms),
            ratio(stock.median_ms, record.median_ms),
            _number(record.peak_bytes and record.peak_bytes / 1e6),
            ratio(record.peak_bytes, lora.peak_bytes),
        ]
        result.add_row(record.method, *cells[: len(result.columns) - 1])
        if record.wrong:
            wrong.append(f"{record.method}: {record.wrong}")
    result.caption = "; ".join(wrong)
    return result


def save(records: Sequence[Record], options: Options, path: Path) -> None:
    """Write the raw times with the machine, the versions and the commit as JSON."""
    settings = {"dtype": str(options.dtype).removeprefix("torch."), "rank": options.rank, "quick": options.quick}
    content = {
        "machine": machine(options.device),
        "settings": settings,
        "records": [{**asdict(record), "median_ms": record.median_ms} for record in records],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def load(path: Path) -> tuple[list[Record], dict[str, Any]]:
    """Read what `save` wrote: the records, and the rest."""
    content = json.loads(path.read_text())
    records = []
    for record in content.pop("records"):
        record.pop("median_ms")
        records.append(Record(**record))
    return records, content


def plot(records: Sequence[Record], path: Path) -> None:
    """Draw the times of all methods, relative to LoRA's, as a PNG.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    groups = by_case(records)
    figure, axes = plt.subplots(figsize=(9, 1 + 0.75 * len(groups)), layout="constrained")
    names = [m.name for m in METHODS if m is not LORA and any(r.method == m.name for r in records)]
    height = 0.8 / len(names)
    for k, name in enumerate(names):
        places, lengths = [], []
        for row, group in enumerate(groups.values()):
            lora, record = find(group, LORA.name), find(group, name)
            if lora.median_ms and record.median_ms:
                places.append(row + (k - (len(names) - 1) / 2) * height)
                lengths.append(record.median_ms / lora.median_ms)
        bars = axes.barh(places, lengths, height, label=name, color="#1f6f5c" if name == HIRA.name else f"C{k + 1}")
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(groups)), groups, fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    ticks = (0.5, 1, 2, 5, 10, 20, 50)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_formatter("")
    axes.set_xlim(0.5, 1.4 * max(patch.get_width() for patch in axes.patches))
    axes.set_xlabel("time, LoRA = 1")
    axes.margins(y=0.01)
    figure.legend(fontsize=8, loc="outside upper right", ncols=len(names))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def machine(device: str = "cpu") -> dict[str, Any]:
    """What a reader needs to judge times by: the hardware, the versions, the commit."""
    hardware = torch.cuda.get_device_name() if device == "cuda" else f"{_cpu()}, {torch.get_num_threads()} threads"
    versions = {package: _version(package) for package in _PACKAGES}
    return {"hardware": hardware, "python": platform.python_version(), "commit": _commit(), **versions}


def _cpu() -> str:
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """That of the checkout hira runs from; None where it is installed otherwise."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git
        return None
    return found.stdout.strip() or None


def by_case(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records by the name of their case, in order."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.case, []).append(record)
    return groups


def find(group: Sequence[Record], method: str) -> Record:
    """The record of a method, an empty one if there is none."""
    return next((record for record in group if record.method == method), Record(group[0].case, method, 0))


def ratio(value: float | None, of: float | None) -> str:
    """``value / of`` with two decimals, nothing where one is missing."""
    return f"{value / of:.2f}" if value and of else ""


def _number(value: float | None) -> str:
    """Three significant digits."""
    if not value:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
