"""Writes the tables of docs/base_layers.md and docs/sharding.md from the tests' cases: python tests/base_layers.py"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from offloading import AFTERWARDS, WAYS
from sharding import MODES
from storages import CASES

ROOT = Path(__file__).parent.parent
PAGE, SHARDING, VERSIONS = ROOT / "docs/base_layers.md", ROOT / "docs/sharding.md", ROOT / "constraints.txt"
BEGIN, END = "<!-- tests/base_layers.py writes {} from here -->\n", "<!-- to here -->\n"


def versions() -> dict[str, str]:
    """The versions that the tests run with, by package."""
    return dict(line.split("==") for line in VERSIONS.read_text().splitlines() if "==" in line)


def storages() -> list[str]:
    """The table of storages in Markdown."""
    pinned = versions()
    dtypes: dict[tuple[str, ...], dict[str, None]] = {}
    for case in CASES:
        forward = "one product with W'" if case.whole else "the layer's own product, and one of the update"
        merges = "yes" if case.write is not None else "no"
        row = (case.name, f"{case.package} {pinned[case.package]}", forward, merges)
        dtypes.setdefault(row, {})["any" if case.dtype is None else str(case.dtype).removeprefix("torch.")] = None
    rows = [(name, ", ".join(found), *rest) for (name, *rest), found in dtypes.items()]
    return table(("storage", "dtypes", "tested", "forward", "merges"), rows)


def offloading() -> list[str]:
    """The table of ways to keep weights elsewhere."""
    tested = f"accelerate {versions()['accelerate']}"
    rows = [
        (way.name, "yes" if way.trains else "forward without gradients", "yes", "yes", tested)
        for way in (*WAYS, *AFTERWARDS)
    ]
    return table(("way", "forward and backward", "merge", "save and load", "tested"), rows)


def sharding() -> list[str]:
    """The table of ways to spread a model over processes."""
    pinned = versions()
    rows = [
        (
            mode.name,
            "yes",
            mode.save,
            "yes" if mode.merges else "refused",
            ", ".join(sorted({kind for kind, _ in mode.models})),
            f"{mode.package} {pinned[mode.package]}",
        )
        for mode in MODES
    ]
    return table(("mode", "forward and backward", "save and reload", "merge", "models", "tested"), rows)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]


TABLES = {"storages": storages, "offloading": offloading, "sharding": sharding}


def with_tables(page: str) -> str:
    """The page with each table between its two marks."""
    for name, rows in TABLES.items():
        before, begin, rest = page.partition(BEGIN.format(name))
        if not begin:  # it stands on the other page
            continue
        page = before + begin + "\n".join(rows()) + "\n" + END + rest.partition(END)[2]
    return page


if __name__ == "__main__":
    for page in (PAGE, SHARDING):
        page.write_text(with_tables(page.read_text()))
