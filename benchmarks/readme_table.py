"""Writes the README's table of times, and its picture, from the committed results: python -m benchmarks.readme_table"""

from __future__ import annotations

from pathlib import Path

from benchmarks import comparison
from benchmarks.comparison.report import by_case, find, ratio

ROOT = Path(__file__).parent.parent
README, PICTURE = ROOT / "README.md", ROOT / "benchmarks/results/cpu.png"
RESULTS = {
    "bfloat16": [ROOT / "benchmarks/results/cpu_bfloat16.json"],
    "float32": [ROOT / "benchmarks/results/cpu.json"],
}
BEGIN, END = "<!-- benchmarks/readme_table.py writes from here -->\n", "<!-- to here -->\n"
COLUMNS = ("hira", "hira, int8 gradient", "hira, weight kept", "PEFT's HiRA", "DoRA", "full fine-tuning")


def tables() -> list[str]:
    """A table for each dtype of base models, in Markdown."""
    lines = []
    for dtype, paths in RESULTS.items():
        records = [record for path in paths for record in comparison.load(path)[0]]
        lines += [f"**{dtype}** base models, float32 adapters:", "", *rows(records), ""]
    return lines[:-1]


def rows(records: list[comparison.Record]) -> list[str]:
    """LoRA's times and peaks of memory, the others' as multiples of these."""
    lines = [f"| | LoRA | {' | '.join(f'{name} / LoRA' for name in COLUMNS)} |", "|---|---|" + "---|" * len(COLUMNS)]
    for case, group in by_case(records).items():
        lora = find(group, "LoRA")
        times = [_cell(find(group, name), lora) for name in COLUMNS]
        milliseconds = f"{lora.median_ms:,.0f}" if lora.median_ms >= 100 else f"{lora.median_ms:.3g}"
        lines.append(f"| {case} | {milliseconds} ms | {' | '.join(times)} |")
        if lora.peak_bytes:
            peaks = [ratio(find(group, name).peak_bytes, lora.peak_bytes) for name in COLUMNS]
            lines.append(f"| peak memory above the model | {lora.peak_bytes / 1e9:.2f} GB | {' | '.join(peaks)} |")
    return lines


def _cell(record: comparison.Record, lora: comparison.Record) -> str:
    return "wrong" if record.wrong else ratio(record.median_ms, lora.median_ms)


def with_table(readme: str) -> str:
    """The README with the tables between its two marks."""
    return with_lines(readme, BEGIN, tables())


def with_lines(page: str, begin: str, lines: list[str]) -> str:
    """A page with other lines between a mark and END."""
    before, _, rest = page.partition(begin)
    after = rest.partition(END)[2]
    return before + begin + "\n".join(lines) + "\n" + END + after


if __name__ == "__main__":
    README.write_text(with_table(README.read_text()))
    comparison.plot(comparison.load(RESULTS["float32"][0])[0], PICTURE)
