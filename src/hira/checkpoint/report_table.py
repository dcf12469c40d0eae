"""What `inspect` found as a table for a terminal, as JSON and as a picture."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from hira.checkpoint.inspection import LayerReport, Report
from hira.checkpoint.printed import printable
from hira.errors import HiraError


class Measure(NamedTuple):
    """A number of each layer, its name, what it means, and how it is written."""

    title: str
    meaning: str
    of: Callable[[LayerReport], float | None]
    form: str


MEASURES = {
    "relative_norm": Measure("‖W₀⊙BA‖ / ‖W₀‖", "size of the update relative to W₀", lambda x: x.relative_norm, ".2e"),
    "update_effective_rank": Measure(
        "eff. rank W₀⊙BA",
        "effective rank of the update",
        lambda x: x.update.effective_rank if x.update else None,
        ".1f",
    ),
    "update_stable_rank": Measure(
        "stable rank W₀⊙BA", "stable rank of the update", lambda x: x.update.stable_rank if x.update else None, ".2f"
    ),
    "delta_effective_rank": Measure("eff. rank BA", "effective rank of BA", lambda x: x.delta.effective_rank, ".1f"),
    "delta_stable_rank": Measure("stable rank BA", "stable rank of BA", lambda x: x.delta.stable_rank, ".2f"),
    "delta_norm": Measure("‖BA‖", "norm of BA", lambda x: x.delta_norm, ".2e"),
    "largest_delta": Measure("max |BA|", "largest entry of BA", lambda x: x.largest_delta, ".2e"),
    "near_minus_one_share": Measure(
        "BA ≈ −1", "share of entries with BA near −1", lambda x: x.near_minus_one_share, ".1e"
    ),
    "bfloat16_lost": Measure(
        "lost in bf16", "share of the update that bfloat16 rounds away", lambda x: x.bfloat16_lost, ".3f"
    ),
}


def measures(report: Report) -> dict[str, Measure]:
    """Those of which the report has a value for some layer."""
    return {
        key: measure
        for key, measure in MEASURES.items()
        if any(measure.of(layer) is not None for layer in report.layers)
    }


def written(measure: Measure, layer: LayerReport) -> str:
    """A layer's number as text, nothing where there is none."""
    value = measure.of(layer)
    if value is None:
        return ""
    text = format(value, measure.form)
    return "0" if value == 0 else text.removeprefix("-") if float(text) == 0 else text


def place(name: str) -> tuple[str, str]:
    """A module's row and column in a map of layers and modules: what is before its first number, and what is behind.

    ``model.layers.3.self_attn.q_proj`` is in the row ``model.layers.3``, ``lm_head`` in a row without a name.
    """
    found = re.fullmatch(r"((?:.*?\.)?\d+)\.(.+)", name, re.DOTALL)
    return (found[1], found[2]) if found else ("", name)


def grid(report: Report) -> tuple[list[str], list[str], dict[tuple[str, str], int]]:
    """The rows and the columns of the map in the order of the layers, and the index of the layer in each cell."""
    cells = {place(layer.name): index for index, layer in enumerate(report.layers)}
    rows = list(dict.fromkeys(row for row, _ in cells))
    columns = list(dict.fromkeys(column for _, column in cells))
    return sorted(rows, key=_natural), columns, cells


def table(report: Report) -> Table:
    """A row for each layer and a column for each measure, for a terminal."""
    chosen = measures(report)
    result = Table(box=box.SIMPLE, title=_summary(report), title_justify="left", caption_justify="left")
    result.add_column("module", overflow="fold")
    result.add_column("shape", justify="right")
    result.add_column("r", justify="right")
    for measure in chosen.values():
        result.add_column(measure.title, justify="right")
    for layer in report.layers:
        shape = "×".join(map(str, layer.shape))
        numbers = [written(measure, layer) for measure in chosen.values()]
        result.add_row(Text(printable(layer.name)), shape, str(layer.rank), *numbers)
    if not any(layer.weight_norm is not None for layer in report.layers):
        result.caption = "Without the base model there is only what BA tells: pass --base."
    return result


def to_json(report: Report) -> str:
    """The report as JSON."""
    text = json.dumps(report.to_dict(), indent=1, allow_nan=False)
    return text.replace("\x7f", "\\u007f") + "\n"  # the one control character that JSON need not escape


def plot(report: Report, path: Path) -> None:
    """Draw the map of layers and modules, coloured by the size of the update or without a base by that of BA, as a PNG.

    Raises:
        HiraError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise HiraError("--plot needs matplotlib, which is not installed: pip install 'hira[plot]'.") from error

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    measure = next(iter(measures(report).values()))
    rows, columns, cells = grid(report)
    values = [[float("nan")] * len(columns) for _ in rows]
    for (row, column), index in cells.items():
        value = measure.of(report.layers[index])
        values[rows.index(row)][columns.index(column)] = float("nan") if value is None else value
    size = (min(40.0, 3 + 0.8 * len(columns)), min(80.0, 2.5 + 0.3 * len(rows)))
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    image = axes.imshow(values, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(columns)), [_short(label) for label in columns], fontsize=8, rotation=45, ha="right")
    axes.set_yticks(range(len(rows)), [_short(label) for label in rows], fontsize=8)
    for text in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        text.set_parse_math(False)  # a name may hold a $
    figure.colorbar(image, label=f"{measure.meaning}, {measure.title}")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _short(label: str) -> str:
    label = printable(label) or "(model)"
    return label if len(label) <= 40 else f"…{label[-39:]}"


def _natural(row: str) -> list[tuple[int, int, str]]:
    """Numbers by their value, and the row without a name last."""
    parts = [part for part in re.split(r"(\d+)", row) if part]
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts] or [(2, 0, "")]


def _summary(report: Report) -> Text:
    text = f"{len(report.layers)} modules, {report.parameters:,} parameters"
    if report.relative_norm is not None:
        text += f", update {report.relative_norm:.2e} of W₀ overall"
    return Text(text)
