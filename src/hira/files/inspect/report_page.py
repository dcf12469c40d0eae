"""What `inspect` found as one page of HTML that needs nothing else: a map of the layers, and spectra side by side."""

from __future__ import annotations

import base64
import hashlib
import json
from datetime import date
from html import escape
from pathlib import Path
from typing import Any

from hira.files.inspect.inspect_adapter import Report
from hira.files.inspect.report_table import grid, in_words, measures, written
from hira.files.io.printable import printable, printable_lines
from hira.files.io.system import explained

_STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1c2128; --faint: #5c6570; --line: #d5dae0; --empty: #f1f3f5;
  --low: #eef6f3; --high: #0f5c49; --mark: #c2410c;
  --on-low: #000; --on-mid: #000; --on-high: #fff;
  --W0: #475569; --delta: #b45309; --update: #0f766e; }
@media (prefers-color-scheme: dark) { :root { --ground: #14181d; --ink: #e6e9ed; --faint: #9aa4af; --line: #343c45;
  --empty: #1b2026; --low: #1d2a2a; --high: #5ee0bd; --mark: #fb923c;
  --on-low: #fff; --on-mid: #000; --on-high: #000;
  --W0: #a3b1c4; --delta: #fbbf24; --update: #2dd4bf; } }
body { margin: 2rem auto; max-width: 76rem; padding: 0 1rem; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; } h1, h2, p { overflow-wrap: anywhere; }
p { color: var(--faint); margin: .4rem 0; } p.words { color: var(--ink); max-width: 46rem; }
select { font: inherit; padding: .2rem; max-width: 100%; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .3rem 1rem; margin: .6rem 0;
  max-width: 60rem; }
dt { font-weight: 500; } dd { margin: 0; color: var(--faint); overflow-wrap: anywhere; }
@media (max-width: 40rem) { dl.meanings { grid-template-columns: minmax(0, 1fr); }
  dl.meanings dd { margin-bottom: .4rem; } }
.scale { display: flex; align-items: center; gap: .5rem; margin: .5rem 0; font-size: 13px; color: var(--faint); }
.scale i { flex: 0 1 14rem; height: .8rem; border-radius: 3px;
  background: linear-gradient(in oklab to right, var(--low), var(--high)); }
.scroll { overflow-x: auto; } table { border-collapse: separate; border-spacing: 2px; font-size: 13px; }
th { font-weight: 500; text-align: left; color: var(--faint); padding: .15rem .5rem; max-width: 18rem;
  overflow-wrap: break-word; }
tbody th { position: sticky; left: 0; background: var(--ground); }
thead th { vertical-align: bottom; text-align: center; }
td { padding: 0; background: var(--empty); border-radius: 3px; min-width: 4.6rem; text-align: center; }
td button { display: block; width: 100%; border: 0; border-radius: 3px; padding: .3rem .4rem;
  cursor: pointer;
  font: inherit; font-variant-numeric: tabular-nums; color: var(--on-low);
  background: color-mix(in oklab, var(--high) calc(var(--v) * 100%), var(--low)); }
td button.mid { color: var(--on-mid); }
td button.strong { color: var(--on-high); }
thead td { background: none; color: var(--faint); vertical-align: bottom; text-align: left; white-space: nowrap;
  padding: .15rem .5rem; position: sticky; left: 0; background: var(--ground); }
td button:focus-visible { outline: 3px solid var(--mark); outline-offset: 1px; }
td button[aria-pressed=true] { box-shadow: inset 0 0 0 2px var(--mark); }
#charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1rem; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 6px; padding: .6rem; }
figcaption { font-weight: 600; }
figcaption span { display: block; font-weight: 400; color: var(--faint); font-size: 13px; }
svg { width: 100%; height: auto; } svg text { fill: var(--faint); font-size: 11px; } svg line { stroke: var(--line); }
svg polyline { fill: none; stroke-width: 1.5; } details td { padding: .15rem .5rem; text-align: right; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
"""

# text goes into the page by textContent and setAttribute alone
_SCRIPT = """
'use strict';
const data = JSON.parse(document.getElementById('data').textContent);
const cells = [...document.querySelectorAll('td button')], choice = document.getElementById('measure');
function make(tag, attributes, text, svg) {
  const node = svg ? document.createElementNS('http://www.w3.org/2000/svg', tag) : document.createElement(tag);
  for (const name in attributes) node.setAttribute(name, attributes[name]);
  if (text !== undefined) node.textContent = text;
  return node;
}
function colour() {
  const measure = data.measures[choice.value];
  document.getElementById('meaning').textContent = measure.title + ': ' + measure.sentence;
  document.getElementById('low').textContent = measure.low;
  document.getElementById('high').textContent = measure.high;
  for (const cell of cells) {
    const [text, share] = measure.cells[cell.dataset.layer];
    cell.textContent = text || '–';
    cell.style.setProperty('--v', share);
    cell.className = share > .76 ? 'strong' : share > .51 ? 'mid' : '';
    cell.setAttribute('aria-label', data.layers[cell.dataset.layer].name + ': ' + (text || 'unknown'));
  }
}
function chart(title, spectrum, name) {
  const figure = make('figure', {}), caption = make('figcaption', {}, title);
  figure.append(caption);
  const values = spectrum ? spectrum.values.filter(value => value > spectrum.values[0] * 1e-8) : [];
  let facts = 'not known: needs the base model, and a shorter side of at most 8192';
  if (spectrum) facts = 'effective rank ' + spectrum.effective_rank.toPrecision(3)
    + ', stable rank ' + spectrum.stable_rank.toPrecision(3);
  caption.append(make('span', {}, facts));
  if (!values.length) return figure;
  const W = 320, H = 216, L = 58, B = 40, last = values.length - 1, ticks = [];
  for (let power = Math.floor(Math.log10(values[last])); power <= Math.ceil(Math.log10(values[0])); power++)
    for (const digit of [1, 2, 5]) ticks.push([Math.log10(digit) + power, digit + 'e' + power]);
  const low = ticks.findLastIndex(tick => tick[0] <= Math.log10(values[last]) + 1e-9);
  const high = Math.max(low + 1, ticks.findIndex(tick => tick[0] >= Math.log10(values[0]) - 1e-9));
  const bottom = ticks[low][0], top = ticks[high][0];
  const x = i => L + (W - L - 8) * i / Math.max(1, last);
  const y = log => 8 + (H - B - 8) * (top - log) / (top - bottom);
  const label = `${values.length} singular values of ${title}, from ${values[0]} to ${values[last]}`;
  const svg = make('svg', {viewBox: `0 0 ${W} ${H}`, role: 'img', 'aria-label': label}, '', true);
  const put = (tag, attributes, text) => svg.append(make(tag, attributes, text, true));
  for (let k = high; k >= low; k -= Math.ceil((high - low) / 6)) {
    put('line', {x1: L, x2: W - 8, y1: y(ticks[k][0]), y2: y(ticks[k][0])});
    put('text', {x: L - 5, y: y(ticks[k][0]) + 4, 'text-anchor': 'end'}, ticks[k][1]);
  }
  for (const i of new Set([0, Math.floor(last / 2), last]))
    put('text', {x: x(i), y: H - 24, 'text-anchor': i == last && i ? 'end' : i ? 'middle' : 'start'}, i + 1);
  put('text', {x: (L + W) / 2, y: H - 6, 'text-anchor': 'middle'}, 'number, in descending order');
  put('text', {transform: `translate(11 ${(H - B) / 2}) rotate(-90)`, 'text-anchor': 'middle'}, 'singular value');
  const points = values.map((value, i) => [x(i), y(Math.log10(value))]);
  put('polyline', {points: points.join(' '), style: `stroke: var(--${name})`});
  for (const [cx, cy] of points) put('circle', {cx, cy, r: 2, style: `fill: var(--${name})`});
  figure.append(svg);
  return figure;
}
function show(index) {
  const layer = data.layers[index], charts = document.getElementById('charts');
  cells.forEach(cell => cell.setAttribute('aria-pressed', cell.dataset.layer == index));
  document.getElementById('chosen').textContent = layer.name;
  document.getElementById('facts').textContent = layer.facts;
  charts.replaceChildren(chart('W₀', layer.weight, 'W0'), chart('BA', layer.delta, 'delta'),
    chart('W₀ ⊙ BA', layer.update, 'update'));
}
function move(event) {
  const step = {ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0]}[event.key];
  if (!step) return;
  const cell = event.target.closest('td'), row = cell.parentElement.rowIndex + step[0];
  const next = document.querySelector('#map').rows[row]?.cells[cell.cellIndex + step[1]]?.querySelector('button');
  if (next) { next.focus(); event.preventDefault(); }
}
for (const cell of cells) {
  cell.addEventListener('click', () => show(cell.dataset.layer));
  cell.addEventListener('keydown', move);
}
choice.addEventListener('change', colour);
document.getElementById('live').hidden = false;
colour();
show(cells[0].dataset.layer);
"""


def page(report: Report, title: str = "adapter") -> str:
    """Return the page: a heat map of layers and modules, and for a chosen one singular values of all three matrices.

    The map is there without scripts too. No request leaves the page, and its policy lets no script run but its own,
    whatever the names in the adapter are.

    Args:
        report: what `inspect` found.
        title: the adapter's name.

    Returns:
        HTML.
    """
    data = _data(report)
    first = next(iter(data["measures"]))
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    options = "".join(
        f'<option value="{key}">{escape(measure["meaning"])}</option>' for key, measure in data["measures"].items()
    )
    base, revision = report.config.get("base_model_name_or_path"), report.config.get("revision")
    facts = {
        "Base model": (base if isinstance(base, str) and base else "not named by the adapter"),
        **({"Revision": revision} if isinstance(revision, str) and revision else {}),
        "Date": date.today().isoformat(),
        **({"Note": "; ".join(report.notes)} if report.notes else {}),
    }
    shown = data["measures"][first]
    config = escape(printable_lines(json.dumps(report.config, indent=1)))
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">
<title>{escape(printable(title))}, inspected</title><style>{_STYLE}</style></head><body>
<h1>{escape(printable(title))}</h1>
<p>What the adapter did: W′ = W₀ ⊙ (1 + BA), layer by layer.</p>
{_listed(facts)}
<p class="words">{escape(" ".join(in_words(report)))}</p>
<h2>Layers and modules</h2>
<p><label for="measure">Colour by </label><select id="measure">{options}</select></p>
<p id="meaning" aria-live="polite">{escape(f"{shown['title']}: {shown['sentence']}")}</p>
<div class="scale"><span id="low">{shown["low"]}</span><i></i><span id="high">{shown["high"]}</span></div>
<noscript><p>Scripts are off: the map shows {escape(shown["meaning"])} only.</p></noscript>
<div class="scroll">{_map(report, data, first)}</div>
<section id="live" hidden aria-live="polite"><h2 id="chosen"></h2><p id="facts"></p>
<div id="charts"></div><p>Singular values on a logarithmic scale, the largest 64.</p></section>
<h2>What the numbers are</h2>
{_listed({measure.title: measure.sentence for measure in measures(report).values()}, "meanings")}
<details><summary>All numbers</summary><div class="scroll">{_numbers(report)}</div></details>
<details><summary>Configuration</summary><pre>{config}</pre></details>
<script type="application/json" id="data">{_embedded(data)}</script>
<script>{_SCRIPT}</script></body></html>
"""


def write_page(report: Report, path: Path, title: str = "adapter") -> None:
    """Write the page to a file; a HiraError if it cannot be written."""
    with explained(path):
        path.write_text(page(report, title), encoding="utf-8")


def _data(report: Report) -> dict[str, Any]:
    """What the script needs: texts and shares of the colour for each measure, and spectra."""
    found: dict[str, Any] = {"measures": {}, "layers": []}
    for key, measure in measures(report).items():
        values = [measure.of(layer) for layer in report.layers]
        known = [value for value in values if value is not None]
        low, span = min(known), max(known) - min(known)
        found["measures"][key] = {
            **{"title": measure.title, "meaning": measure.meaning, "sentence": measure.sentence},
            **{"low": format(low, measure.form), "high": format(low + span, measure.form)},
            "cells": [
                [written(measure, layer), 0 if value is None or not span else round((value - low) / span, 4)]
                for layer, value in zip(report.layers, values, strict=True)
            ],
        }
    for layer, content in zip(report.layers, report.to_dict()["layers"], strict=True):
        shape = " × ".join(map(str, layer.shape))
        facts = f"{layer.kind}, {shape}, rank {layer.rank}, {layer.near_minus_one:,} entries with BA near −1"
        spectra = {key: _rounded(content[key]) for key in ("weight", "delta", "update")}
        found["layers"].append({"name": printable(layer.name), "facts": facts, **spectra})
    return found


def _rounded(spectrum: dict[str, Any] | None) -> dict[str, Any] | None:
    """Values with the digits that a picture shows."""
    return spectrum and {**spectrum, "values": [float(f"{value:.4g}") for value in spectrum["values"]]}


def _embedded(data: dict[str, Any]) -> str:
    """JSON that ends no element and opens none."""
    text = json.dumps(data, allow_nan=False, ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _listed(texts: dict[str, str], kind: str = "facts") -> str:
    """A list of names and what they tell."""
    rows = (f"<dt>{escape(printable(name))}</dt><dd>{escape(printable(text))}</dd>" for name, text in texts.items())
    return f'<dl class="{kind}">{"".join(rows)}</dl>'


def _map(report: Report, data: dict[str, Any], first: str) -> str:
    rows, columns, cells = grid(report)
    lines = ["".join(f'<th scope="col">{escape(printable(column))}</th>' for column in columns)]
    for row in rows:
        line = f'<th scope="row">{escape(printable(row)) or "model"}</th>'
        for column in columns:
            index = cells.get((row, column))
            line += "<td></td>" if index is None else f"<td>{_cell(data, first, index)}</td>"
        lines.append(line)
    body = "".join(f"<tr>{line}</tr>" for line in lines[1:])
    return f'<table id="map"><thead><tr><td>layer ↓ module →</td>{lines[0]}</tr></thead><tbody>{body}</tbody></table>'


def _cell(data: dict[str, Any], first: str, index: int) -> str:
    text, share = data["measures"][first]["cells"][index]
    style = f'class="{"strong" if share > 0.76 else "mid" if share > 0.51 else ""}" style="--v:{share}"'
    label = escape(f"{data['layers'][index]['name']}: {text or 'unknown'}")
    return f'<button type="button" {style} data-layer="{index}" aria-label="{label}">{text or "–"}</button>'


def _numbers(report: Report) -> str:
    chosen = measures(report)
    head = "".join(f'<th scope="col">{escape(measure.title)}</th>' for measure in chosen.values())
    body = "".join(
        f'<tr><th scope="row">{escape(printable(layer.name))}</th>'
        + "".join(f"<td>{written(measure, layer)}</td>" for measure in chosen.values())
        + "</tr>"
        for layer in report.layers
    )
    return f'<table><thead><tr><th scope="col">module</th>{head}</tr></thead><tbody>{body}</tbody></table>'
