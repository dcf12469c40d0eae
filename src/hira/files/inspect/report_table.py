"""What `inspect` found as a table for a terminal, as JSON and as a picture."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from rich import box
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from hira.errors import HiraError
from hira.files.inspect.inspect_adapter import LayerReport, Report
from hira.files.io.printable import printable
from hira.files.io.system import explained


class Measure(NamedTuple):
    """A number of each layer.

    Args:
        title: how it is written.
        short: the same where there is little room.
        meaning: what it is, in some words.
        sentence: what it tells.
        of: gives it.
        form: how the number is written.
        together: what stands for several layers.
    """

    title: str
    short: str
    meaning: str
    sentence: str
    of: Callable[[LayerReport], float | None]
    form: str
    together: Callable[[list[float]], float] = fmean


MEASURES = {
    "relative_norm": Measure(
        "‖W₀⊙BA‖ / ‖W₀‖",
        "‖U‖/‖W₀‖",
        "size of the update relative to W₀",
        "How far the adapter moves a weight: 0.01 is a change of one per cent of its norm.",
        lambda x: x.relative_norm,
        ".2e",
    ),
    "delta_norm": Measure(
        "‖BA‖", "‖BA‖", "norm of BA", "The size of BA over all entries of the layer.", lambda x: x.delta_norm, ".2e"
    ),
    "largest_delta": Measure(
        "max |BA|",
        "max |BA|",
        "largest entry of BA",
        "The largest relative change of an entry: 1 doubles it, or sets it to zero.",
        lambda x: x.largest_delta,
        ".2e",
        max,
    ),
    "update_effective_rank": Measure(
        "eff. rank W₀⊙BA",
        "erank U",
        "effective rank of the update",
        "In how many directions the weight moves, by the entropy of the update's singular values; the higher rank is "
        "what HiRA is for.",
        lambda x: x.update.effective_rank if x.update else None,
        ".1f",
    ),
    "update_stable_rank": Measure(
        "stable rank W₀⊙BA",
        "srank U",
        "stable rank of the update",
        "The same by squares: near 1 where a single direction outweighs all others.",
        lambda x: x.update.stable_rank if x.update else None,
        ".2f",
    ),
    "delta_effective_rank": Measure(
        "eff. rank BA",
        "erank BA",
        "effective rank of BA",
        "How much of the rank r the training uses; far below r, a smaller r would do.",
        lambda x: x.delta.effective_rank,
        ".1f",
    ),
    "delta_stable_rank": Measure(
        "stable rank BA",
        "srank BA",
        "stable rank of BA",
        "The same by squares: near 1 where one of the r directions outweighs the others.",
        lambda x: x.delta.stable_rank,
        ".2f",
    ),
    "near_minus_one_share": Measure(
        "BA ≈ −1",
        "BA ≈ −1",
        "share of entries with BA near −1",
        "Entries of W₀ that 1 + BA all but switches off.",
        lambda x: x.near_minus_one_share,
        ".1e",
    ),
    "bfloat16_lost": Measure(
        "lost in bf16",
        "lost",
        "share of the update that merging into bfloat16 loses",
        "What is missing of the update in bfloat16 as hira merge rounds, with a dither where W₀ is in half precision; "
        "below zero by a little where rounding happens to add.",
        lambda x: x.bfloat16_lost,
        ".3f",
    ),
    "bfloat16_lost_to_nearest": Measure(
        "lost in bf16, to nearest",
        "lost near",
        "share of the update that rounding to nearest in bfloat16 loses",
        "The same with rounding to nearest, as most other tools round.",
        lambda x: x.bfloat16_lost_to_nearest,
        ".3f",
    ),
}


def measures(report: Report) -> dict[str, Measure]:
    """Those of which the report has a value for some layer."""
    return {
        key: measure
        for key, measure in MEASURES.items()
        if any(measure.of(layer) is not None for layer in report.layers)
    }


def written(measure: Measure, layers: LayerReport | Sequence[LayerReport]) -> str:
    """The number of a layer, or what stands for several, as text; nothing where there is none."""
    several = [layers] if isinstance(layers, LayerReport) else layers
    values = [value for layer in several if (value := measure.of(layer)) is not None]
    if not values:
        return ""
    value = measure.together(values)
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
    """A row for each layer and a column for each measure, as wide as it has to be."""
    chosen = measures(report)
    result = Table(box=box.SIMPLE)
    result.add_column("module", no_wrap=True)
    result.add_column("shape", justify="right", no_wrap=True)
    result.add_column("r", justify="right", no_wrap=True)
    for measure in chosen.values():
        result.add_column(measure.title, justify="right", no_wrap=True)
    for layer in report.layers:
        numbers = [written(measure, layer) for measure in chosen.values()]
        result.add_row(Text(printable(layer.name)), _shape(layer), str(layer.rank), *numbers)
    return result


def overview(report: Report, width: int) -> Iterator[str]:
    """Lines for a terminal: each kind of module over all layers, then the first measure of each layer and kind.

    Args:
        report: what `inspect` found.
        width: that of the terminal, in columns; what does not fit goes below, and no name or number is cut.
    """
    chosen = measures(report)
    cells: dict[tuple[str, str], list[LayerReport]] = {}
    for layer in report.layers:
        row, column = place(layer.name)
        cells.setdefault((row, re.sub(r"\.\d+(?=\.|$)", ".*", column)), []).append(layer)
    kinds: dict[str, list[LayerReport]] = {}
    for (_, kind), layers in cells.items():
        kinds.setdefault(kind, []).extend(layers)
    columns = [
        ["n", *(str(len(layers)) for layers in kinds.values())],
        ["shape", *(_one_of({_shape(layer) for layer in layers}) for layers in kinds.values())],
        ["r", *(_one_of({str(layer.rank) for layer in layers}) for layers in kinds.values())],
    ]
    for measure in chosen.values():
        columns.append([measure.short, *(written(measure, layers) for layers in kinds.values())])
    yield "Each kind of module: means over its layers, of max |BA| the largest"
    yield ""
    yield from _columns(["module", *kinds], columns, width)
    rows = sorted(dict.fromkeys(row for row, _ in cells if row), key=_natural)
    if len(rows) > 1:
        measure = next(iter(chosen.values()))
        repeated = [kind for kind in kinds if any((row, kind) in cells for row in rows)]
        heads = {row.rpartition(".")[0] for row in rows}
        head = heads.pop() if len(heads) == 1 else ""
        columns = [
            [ending, *(written(measure, cells.get((row, kind), [])) for row in rows)]
            for kind, ending in zip(repeated, _endings(repeated), strict=True)
        ]
        yield ""
        yield f"Each layer{printable(f' of {head}' if head else '')}: {measure.short}, {measure.meaning}"
        yield ""
        yield from _columns(["layer", *(row.removeprefix(f"{head}.") for row in rows)], columns, width)
    if any(measure.short.endswith(" U") or "‖U‖" in measure.short for measure in chosen.values()):
        yield ""
        yield "U = W₀⊙BA; erank, srank: effective and stable rank; lost: share of U that"
        yield "bfloat16 loses as hira merge rounds; lost near: rounded to nearest"


def in_words(report: Report) -> Iterator[str]:
    """Sentences on the whole adapter: what it is, where its update is largest, and what bfloat16 loses of it."""
    ranks = _one_of({str(layer.rank) for layer in report.layers})
    base = report.config.get("base_model_name_or_path")
    trained = f", trained on {printable(base)}" if isinstance(base, str) and base else ""
    yield f"HiRA of rank {ranks} on {len(report.layers)} modules, {report.parameters:,} parameters{trained}."
    known = [(layer.relative_norm, layer) for layer in report.layers if layer.relative_norm is not None]
    if known:
        value, layer = max(known, key=lambda pair: pair[0])
        if report.relative_norm is not None:
            yield f"The update has {_percent(report.relative_norm)} of W₀'s norm."
        yield f"The largest is {_percent(value)}, of {printable(layer.name)}."
    else:
        layer = max(report.layers, key=lambda layer: layer.largest_delta)
        yield f"The largest |BA| is {layer.largest_delta:.2e}, of {printable(layer.name)}."
        yield "Without the base model there is only what BA tells: pass --base."
    off = sum(layer.near_minus_one for layer in report.layers)
    if off:
        yield f"1 + BA all but switches off {off:,} entries of W₀."
    lost, to_nearest = report.bfloat16_lost, report.bfloat16_lost_to_nearest
    if lost is not None and to_nearest is not None:
        how = "" if lost == to_nearest else f" as hira merge rounds, and {_percent(to_nearest)} rounded to nearest"
        yield f"Merging into bfloat16 loses {_percent(lost)} of the update{how}."


def _percent(share: float) -> str:
    """A share for a reader, to a hundredth of a per cent."""
    text = f"{share:.2%}".replace("%", " %")
    return text.removeprefix("-") if abs(share) < 5e-5 else text


def _shape(layer: LayerReport) -> str:
    return "×".join(map(str, layer.shape))


def _one_of(values: set[str]) -> str:
    """A value that several have, or the number of their values."""
    return next(iter(values)) if len(values) == 1 else f"{len(values)} sizes"


def _endings(names: list[str]) -> list[str]:
    """The shortest endings of dotted names that tell them apart."""

    def ending(name: str, count: int) -> str:
        return ".".join(name.split(".")[-count:])

    counts = range(1, max(name.count(".") for name in names) + 2)
    return [
        next(ending(name, n) for n in counts if [ending(other, n) for other in names].count(ending(name, n)) == 1)
        for name in names
    ]


def _columns(labels: list[str], columns: list[list[str]], width: int) -> Iterator[str]:
    """Lines of a table: labels on the left, and columns on the right; those that do not fit into the width below."""
    labels = [printable(label) for label in labels]
    left = max(map(cell_len, labels))
    part: list[list[str]] = []
    room = width - left

    def lines() -> Iterator[str]:
        for i, label in enumerate(labels):
            cells = ["  " + " " * (_width(column) - cell_len(column[i])) + column[i] for column in part]
            yield (label + " " * (left - cell_len(label)) + "".join(cells)).rstrip()

    for column in ([printable(cell) for cell in column] for column in columns):
        if part and room < 2 + _width(column):
            yield from lines()
            yield ""
            part, room = [], width - left
        part.append(column)
        room -= 2 + _width(column)
    yield from lines()


def _width(column: list[str]) -> int:
    return max(map(cell_len, column))


def to_json(report: Report) -> str:
    """The report as JSON."""
    text = json.dumps(report.to_dict(), indent=1, allow_nan=False)
    return text.replace("\x7f", "\\u007f") + "\n"  # the one control character that JSON need not escape


def plot(report: Report, path: Path, title: str = "adapter") -> None:
    """Draw the map of layers and modules, coloured by the size of the update or without a base by that of BA, as a PNG.

    Raises:
        HiraError: matplotlib is not installed, or the file cannot be written.
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
    figure, axes = plt.subplots(figsize=size)
    axes.set_title(f"{_short(title)}: {measure.meaning}", parse_math=False)
    axes.set_xlabel("module")
    axes.set_ylabel("layer")
    image = axes.imshow(values, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(columns)), [_short(label) for label in columns], fontsize=8, rotation=45, ha="right")
    axes.set_yticks(range(len(rows)), [_short(label) for label in rows], fontsize=8)
    for text in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        text.set_parse_math(False)  # a name may hold a $
    figure.colorbar(image, label=measure.title)
    with explained(path):
        figure.savefig(path, dpi=150, bbox_inches="tight", pad_inches=0.2, format="png")  # with all that sticks out
    plt.close(figure)


def _short(label: str) -> str:
    label = printable(label) or "(model)"
    return label if len(label) <= 40 else f"…{label[-39:]}"


def _natural(row: str) -> list[tuple[int, int, str]]:
    """Numbers by their value, and the row without a name last."""
    parts = [part for part in re.split(r"(\d+)", row) if part]
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts] or [(2, 0, "")]
