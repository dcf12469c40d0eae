"""Writes the tables of times, and their pictures, from the committed results: python -m benchmarks.readme_table

All of them into docs/performance.md, a few rows into the README.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks import comparison
from benchmarks.comparison.report import by_case, find, ratio

ROOT = Path(__file__).parent.parent
README, PAGE = ROOT / "README.md", ROOT / "docs/performance.md"
RESULTS = {
    "bfloat16, two CPU cores": ROOT / "benchmarks/results/cpu_bfloat16.json",
    "float32, two CPU cores": ROOT / "benchmarks/results/cpu.json",
    "bfloat16, one H200": ROOT / "benchmarks/results/h200/triton.json",
}
BEGIN, END = "<!-- benchmarks/readme_table.py writes from here -->\n", "<!-- to here -->\n"
COLUMNS = ("hira", "hira, int8 gradient", "hira, weight kept", "PEFT's HiRA", "DoRA", "full fine-tuning")
# of the README's table
FEW_COLUMNS = ("hira", "PEFT's HiRA", "DoRA", "full fine-tuning")
FEW_CASES = (
    "linear 2048 x 2048, 1024 tokens",
    "linear 2048 x 2048, 4096 tokens",
    "linear 4096 x 4096, 4096 tokens",
    "Llama, 8 layers, width 1024, 2 x 512 tokens",
)


def tables() -> list[str]:
    """A table for each dtype of base models and machine, in Markdown."""
    lines = []
    for name, path in RESULTS.items():
        head = ("", "LoRA", *(f"{name} / LoRA" for name in COLUMNS))
        rows = [row for case, group in _cases(path).items() for row in _rows(case, group, COLUMNS)]
        lines += [f"**{name}**", "", *_table(head, rows), ""]
    return lines[:-1]


def few_rows() -> list[str]:
    """The README's table: its cases, of those that a file has."""
    rows = []
    for name, path in RESULTS.items():
        cases = _cases(path)
        for case in filter(cases.__contains__, FEW_CASES):
            rows += [(name, *row) for row in _rows(case, cases[case], FEW_COLUMNS)]
    return _table(("base model, machine", "a step", "LoRA", *(f"{name} / LoRA" for name in FEW_COLUMNS)), rows)


def _cases(path: Path) -> dict[str, list[comparison.Record]]:
    return by_case(comparison.load(path)[0])


def _rows(case: str, group: list[comparison.Record], columns: Sequence[str]) -> list[tuple[str, ...]]:
    """LoRA's time and peak of memory, the others' as multiples of these."""
    lora = find(group, "LoRA")
    milliseconds = f"{lora.median_ms:,.0f}" if lora.median_ms >= 100 else f"{lora.median_ms:.3g}"
    rows = [(case, f"{milliseconds}\N{NO-BREAK SPACE}ms", *(_cell(find(group, name), lora) for name in columns))]
    if lora.peak_bytes:
        peaks = [ratio(find(group, name).peak_bytes, lora.peak_bytes) for name in columns]
        rows.append(("peak memory above the model", f"{lora.peak_bytes / 1e9:.2f}\N{NO-BREAK SPACE}GB", *peaks))
    return rows


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]


def _cell(record: comparison.Record, lora: comparison.Record) -> str:
    return "wrong" if record.wrong else ratio(record.median_ms, lora.median_ms)


def with_lines(page: str, begin: str, lines: list[str]) -> str:
    """A page with other lines between a mark and END."""
    before, _, rest = page.partition(begin)
    after = rest.partition(END)[2]
    return before + begin + "\n".join(lines) + "\n" + END + after


if __name__ == "__main__":
    for page, lines in {PAGE: tables(), README: few_rows()}.items():
        page.write_text(with_lines(page.read_text(), BEGIN, lines))
    for path in RESULTS.values():
        if path.parent.name == "results":  # the H200's run has one case
            comparison.plot(comparison.load(path)[0], path.with_suffix(".png"))
