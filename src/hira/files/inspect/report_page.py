"""The report of `inspect` as a page of HTML without scripts: the numbers of every module, shaded, and its spectra."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from datetime import date
from html import escape
from pathlib import Path

from hira.files.inspect.inspect_adapter import LayerReport, Report
from hira.files.inspect.report_table import Measure, in_order, in_words, measures, written
from hira.files.io.printable import printable
from hira.files.io.system import explained

_STYLE = """
:root { color-scheme: light dark; font: 14px/1.5 system-ui, sans-serif; }
body { margin: 2rem; } p, dd, pre { max-width: 60rem; overflow-wrap: anywhere; white-space: pre-wrap; }
dt { font-weight: 600; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; } th, td { padding: .1rem .5rem; white-space: nowrap; text-align: right; }
th:first-child { text-align: left; position: sticky; left: 0; background: canvas; }
td { background: color-mix(in srgb, #0d9488 calc(var(--share, 0) * 60%), canvas); }
svg { width: 9rem; height: 2.5rem; } polyline { fill: none; stroke-width: 1.5; vector-effect: non-scaling-stroke; }
.W0 { stroke: #64748b; } .BA { stroke: #d97706; } .U { stroke: #0d9488; }
"""
_DECADES = 4  # of singular values that a picture shows


def page(report: Report, title: str = "adapter") -> str:
    """Return the page.

    Args:
        report: the report.
        title: the adapter's name.

    Returns:
        HTML. The page loads nothing and runs nothing, whatever the names in the adapter are.
    """
    chosen = measures(report)
    base = report.config.get("base_model_name_or_path")
    facts = {"Base model": str(base) if base else "not named by the adapter", "Date": date.today().isoformat()}
    if report.notes:
        facts["Note"] = "; ".join(report.notes)
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in ("module", *(m.title for m in chosen), "spectra"))
    shares = {measure.title: _shares(measure, report.layers) for measure in chosen}
    rows = []
    for layer in in_order(report.layers):
        cells = (
            f'<td style="--share:{shares[measure.title](layer):.3f}">{written(measure, layer)}</td>'
            for measure in chosen
        )
        rows.append(f'<tr><th scope="row">{_text(layer.name)}</th>{"".join(cells)}<td>{_spectra(layer)}</td></tr>')
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'">
<title>{_text(title)}, inspected</title><style>{_STYLE}</style></head><body>
<h1>{_text(title)}</h1>
<p>W′ = W₀ ⊙ (1 + BA), and the update is U = W₀⊙BA.</p>
{_list(facts.items())}
<p>{escape(" ".join(in_words(report)))}</p>
<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>
<h2>The columns</h2>
{_list((measure.title, measure.meaning) for measure in chosen)}
<p>The spectra are the largest singular values, each divided by the first, over {_DECADES} powers of ten: those of W₀
in grey, of BA in orange, and of U in green.</p>
<h2>The adapter's configuration</h2>
<pre>{escape(json.dumps(report.config, indent=1))}</pre>
</body></html>
"""


def write_page(report: Report, path: Path, title: str = "adapter") -> None:
    """Write the page to a file; a HiraError if it cannot be written."""
    with explained(path):
        path.write_text(page(report, title), encoding="utf-8")


def _text(text: str) -> str:
    return escape(printable(text))


def _list(texts: Iterable[tuple[str, str]]) -> str:
    return f"<dl>{''.join(f'<dt>{_text(name)}</dt><dd>{_text(text)}</dd>' for name, text in texts)}</dl>"


def _shares(measure: Measure, layers: Iterable[LayerReport]) -> Callable[[LayerReport], float]:
    """A function that gives where a layer's value lies between the smallest, 0, and the largest, 1."""
    known = [value for layer in layers if (value := measure.of(layer)) is not None]
    low, span = min(known), max(known) - min(known)

    def share(layer: LayerReport) -> float:
        value = measure.of(layer)
        return 0.0 if value is None or not span else (value - low) / span

    return share


def _spectra(layer: LayerReport) -> str:
    """A picture of the singular values of W0, BA and U, as far as they are known."""
    lines = []
    for name, spectrum in (("W0", layer.weight), ("BA", layer.delta), ("U", layer.update)):
        if spectrum is None or not any(spectrum.values):
            continue
        first, last = spectrum.values[0], max(len(spectrum.values) - 1, 1)
        heights = [min(math.log10(first / value), _DECADES) if value else _DECADES for value in spectrum.values]
        points = " ".join(f"{100 * i / last:.3g},{10 * height:.3g}" for i, height in enumerate(heights))
        lines.append(f'<polyline class="{name}" points="{points}"/>')
    return f'<svg viewBox="0 0 100 {10 * _DECADES}" preserveAspectRatio="none">{"".join(lines)}</svg>'
