"""The report of `inspect` as tables, as sentences, as JSON and as a picture."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hira.files.inspect.inspect_adapter import LayerReport, Report
from hira.files.io.printable import printable
from hira.files.io.system import explained


class Measure(NamedTuple):
    """A number of each layer.

    Args:
        title: its name.
        meaning: what it tells.
        of: returns it.
        form: how it is formatted.
        together: what stands for several layers.
    """

    title: str
    meaning: str
    of: Callable[[LayerReport], float | None]
    form: str
    together: Callable[[list[float]], float] = fmean


MEASURES = (
    Measure("‖U‖/‖W₀‖", "size of the update U = W₀⊙BA relative to W₀", lambda x: x.relative_norm, ".2e"),
    Measure("‖BA‖", "norm of BA", lambda x: x.delta_norm, ".2e"),
    Measure("max |BA|", "largest relative change of an entry", lambda x: x.largest_delta, ".2e", max),
    Measure(
        "erank U",
        "effective rank of the update: in how many directions the weight moves",
        lambda x: x.update.effective_rank if x.update else None,
        ".1f",
    ),
    Measure(
        "srank U",
        "stable rank of the update: near 1 where one direction outweighs all others",
        lambda x: x.update.stable_rank if x.update else None,
        ".2f",
    ),
    Measure(
        "erank BA",
        "effective rank of BA: how much of the rank r the training uses",
        lambda x: x.delta.effective_rank,
        ".1f",
    ),
    Measure("srank BA", "stable rank of BA", lambda x: x.delta.stable_rank, ".2f"),
    Measure("BA ≈ −1", "share of entries of W₀ that 1 + BA switches off", lambda x: x.near_minus_one_share, ".1e"),
    Measure("lost", "share of the update that merging into bfloat16 loses", lambda x: x.bfloat16_lost, ".3f"),
    Measure(
        "lost near",
        "share of the update that rounding to the nearest bfloat16 loses",
        lambda x: x.bfloat16_lost_to_nearest,
        ".3f",
    ),
)


def measures(report: Report) -> list[Measure]:
    """Return the measures of which the report has a value for some layer."""
    return [m for m in MEASURES if any(m.of(layer) is not None for layer in report.layers)]


def written(measure: Measure, *layers: LayerReport) -> str:
    """Return the number of a layer, or what stands for several, as text; the text is empty where there is none."""
    values = [value for layer in layers if (value := measure.of(layer)) is not None]
    if not values:
        return ""
    value = measure.together(values)
    text = format(value, measure.form)
    return "0" if value == 0 else text.removeprefix("-") if float(text) == 0 else text


def place(name: str) -> tuple[str, str]:
    """Return a module's row and column in a map: its name up to the first number, and what follows the number.

    ``model.layers.3.self_attn.q_proj`` is in the row ``model.layers.3``, ``lm_head`` in a row without a name.
    """
    found = re.fullmatch(r"((?:.*?\.)?\d+)\.(.+)", name, re.DOTALL)
    return (found[1], found[2]) if found else ("", name)


def in_order(layers: Iterable[LayerReport]) -> list[LayerReport]:
    """Return layers in the order of the numbers in their names; modules without a number come last."""
    return sorted(layers, key=lambda layer: _natural(place(layer.name)[0]))


def table(report: Report) -> Table:
    """Return a table with a row for each layer and a column for each measure."""
    result = Table(box=box.SIMPLE)
    result.add_column("module", no_wrap=True)
    for title in ("shape", "r", *(measure.title for measure in measures(report))):
        result.add_column(title, justify="right", no_wrap=True)
    for layer in report.layers:
        numbers = [written(measure, layer) for measure in measures(report)]
        result.add_row(Text(printable(layer.name)), _shape(layer), _ranks(layer), *numbers)
    return result


def overview(report: Report, width: int) -> Iterator[Table | str]:
    """Yield tables for a terminal: each kind of module over all layers, then the first measure of each layer and kind.

    Columns that do not fit into the width go to a table below.
    """
    chosen = measures(report)
    cells: dict[tuple[str, str], list[LayerReport]] = {}
    for layer in in_order(report.layers):
        row, column = place(layer.name)
        cells.setdefault((row, re.sub(r"\.\d+(?=\.|$)", ".*", column)), []).append(layer)
    kinds: dict[str, list[LayerReport]] = {}
    for (_, kind), layers in cells.items():
        kinds.setdefault(kind, []).extend(layers)
    columns = [
        ["n", *(str(len(layers)) for layers in kinds.values())],
        ["shape", *(_one_of({_shape(layer) for layer in layers}) for layers in kinds.values())],
        ["r", *(_one_of({_ranks(layer) for layer in layers}) for layers in kinds.values())],
        *([measure.title, *(written(measure, *layers) for layers in kinds.values())] for measure in chosen),
    ]
    yield "Each kind of module: means over its layers, of max |BA| the largest"
    yield from _tables(["module", *kinds], columns, width)
    rows = list(dict.fromkeys(row for row, _ in cells if row))
    if len(rows) > 1:
        repeated = [kind for kind in kinds if any((row, kind) in cells for row in rows)]
        heads = {row.rpartition(".")[0] for row in rows}
        head = f"{heads.pop()}." if len(heads) == 1 else ""
        columns = [
            [ending, *(written(chosen[0], *cells.get((row, kind), [])) for row in rows)]
            for kind, ending in zip(repeated, _endings(repeated), strict=True)
        ]
        yield f"\n{chosen[0].title} of each layer {printable(head)}*"
        yield from _tables(["layer", *(row.removeprefix(head) for row in rows)], columns, width)
    if report.layers[0].update_norm is not None:
        sum_of = "W₀⊙BA + L₂L₁" if any(layer.lora_rank for layer in report.layers) else "W₀⊙BA"
        yield f"\nU = {sum_of}; erank, srank: effective and stable rank; lost: share of U that"
        yield "bfloat16 loses as hira merge rounds; lost near: rounded to nearest\n"


def _ranks(layer: LayerReport) -> str:
    """The rank of HiRA, and that of the LoRA beside it."""
    return f"{layer.rank}+{layer.lora_rank}" if layer.lora_rank else str(layer.rank)


def in_words(report: Report) -> Iterator[str]:
    """Yield sentences on the whole adapter: what it is, where its update is largest, and what bfloat16 loses of it."""
    ranks = _one_of({str(layer.rank) for layer in report.layers})
    if any(layer.lora_rank for layer in report.layers):
        ranks += f" with LoRA of rank {_one_of({str(layer.lora_rank) for layer in report.layers})}"
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
        yield "Only the sizes and ranks of BA are known without the base model: pass --base."
    off = sum(layer.near_minus_one for layer in report.layers)
    if off:
        yield f"1 + BA all but switches off {off:,} entries of W₀."
    lost, to_nearest = report.bfloat16_lost, report.bfloat16_lost_to_nearest
    if lost is not None and to_nearest is not None:
        how = "" if lost == to_nearest else f" as hira merge rounds, and {_percent(to_nearest)} rounded to nearest"
        yield f"Merging into bfloat16 loses {_percent(lost)} of the update{how}."


def to_json(report: Report) -> str:
    """Return the report as JSON."""
    text = json.dumps(report.to_dict(), indent=1, allow_nan=False)
    return text.replace("\x7f", "\\u007f") + "\n"  # the one control character that JSON need not escape


def plot(report: Report, path: Path, title: str = "adapter") -> None:
    """Draw a map of layers and modules as a PNG, coloured by the first measure of the report.

    Raises:
        HiraError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    measure = measures(report)[0]
    cells = {place(layer.name): measure.of(layer) for layer in in_order(report.layers)}
    rows, columns = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    values = [[cells.get((row, column)) for column in columns] for row in rows]
    size = (min(40.0, 3 + 0.8 * len(columns)), min(80.0, 2.5 + 0.3 * len(rows)))
    figure, axes = plt.subplots(figsize=size)
    axes.set_title(f"{_short(title)}: {measure.meaning}", parse_math=False)
    axes.set_xlabel("module")
    axes.set_ylabel("layer")
    numbers = [[float("nan") if value is None else value for value in line] for line in values]
    image = axes.imshow(numbers, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(columns)), [_short(label) for label in columns], fontsize=8, rotation=45, ha="right")
    axes.set_yticks(range(len(rows)), [_short(label) for label in rows], fontsize=8)
    for text in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        text.set_parse_math(False)  # a name may hold a $
    figure.colorbar(image, label=measure.title)
    with explained(path):
        figure.savefig(path, dpi=150, bbox_inches="tight", pad_inches=0.2, format="png")
    plt.close(figure)


def _tables(labels: Sequence[str], columns: list[list[str]], width: int) -> Iterator[Table]:
    """Tables with the labels on the left, and as many of the columns as fit into a width."""

    def made(some: list[list[str]]) -> Table:
        result = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
        result.add_column(labels[0], overflow="fold")
        for heading, *_ in some:
            result.add_column(Text(printable(heading)), justify="right", no_wrap=True)
        for label, *cells in zip(labels[1:], *(column[1:] for column in some), strict=True):
            result.add_row(Text(printable(label)), *cells)
        return result

    begin = 0
    while begin < len(columns):
        end = begin + 1
        while end < len(columns) and _width(made(columns[begin : end + 1])) <= width:
            end += 1
        yield made(columns[begin:end])
        begin = end


def _endings(names: list[str]) -> list[str]:
    """The shortest endings of dotted names that tell them apart."""

    def ending(name: str, count: int) -> str:
        return ".".join(name.split(".")[-count:])

    counts = range(1, max(name.count(".") for name in names) + 2)
    return [
        next(ending(name, n) for n in counts if [ending(other, n) for other in names].count(ending(name, n)) == 1)
        for name in names
    ]


def _width(made: Table) -> int:
    return Console(width=10_000).measure(made).maximum


def _percent(share: float) -> str:
    text = f"{share:.2%}".replace("%", " %")
    return text.removeprefix("-") if abs(share) < 5e-5 else text


def _shape(layer: LayerReport) -> str:
    return "×".join(map(str, layer.shape))


def _one_of(values: set[str]) -> str:
    """The value that several layers have, or the number of their values."""
    return next(iter(values)) if len(values) == 1 else f"{len(values)} sizes"


def _short(label: str) -> str:
    label = printable(label) or "(model)"
    return label if len(label) <= 40 else f"…{label[-39:]}"


def _natural(row: str) -> list[tuple[int, int, str]]:
    """A key that sorts numbers by their value, and the row without a name last."""
    parts = [part for part in re.split(r"(\d+)", row) if part]
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts] or [(2, 0, "")]
