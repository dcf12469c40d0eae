"""The page of `inspect`: what it holds, and that names stay text."""

from __future__ import annotations

import dataclasses
import re
from datetime import date
from html.parser import HTMLParser

import pytest
from files.test_report_table import EVIL, example

from hira.files.inspect.report_page import page
from hira.files.inspect.report_table import measures, written
from hira.files.io.printable import printable


class Elements(HTMLParser):
    """Every start tag with its attributes, and the text by the element it is in."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[tuple[str, str]] = []
        self.feed(content)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append((self.tags[-1][0] if self.tags else "", data))

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_the_page_loads_and_runs_nothing_and_names_stay_text():
    content = page(example(), title=EVIL)
    elements = Elements(content)
    assert elements.of("script") == []
    assert not re.search(r"\b(src|href|url|@import)\b\s*[=(]", content)
    assert not any(name.startswith("on") for _, attributes in elements.tags for name in attributes)
    assert "\x1b" not in content
    assert any(EVIL.split("\x1b")[0] in text for _, text in elements.text)
    [policy] = [meta["content"] for meta in elements.of("meta") if "http-equiv" in meta]
    assert policy.startswith("default-src 'none'") and "script-src" not in policy


@pytest.mark.parametrize("with_base", [True, False])
def test_every_number_is_there_and_shaded_by_its_size(with_base):
    report = example(with_base)
    elements = Elements(page(report))
    texts = [text for _, text in elements.text]
    cells = [float(cell["style"].removeprefix("--share:")) for cell in elements.of("td") if "style" in cell]
    assert len(cells) == len(report.layers) * len(measures(report))
    first = measures(report)[0]
    values = [first.of(layer) for layer in report.layers]
    shares = sorted((value - min(values)) / (max(values) - min(values)) for value in values)
    assert sorted(cells[:: len(measures(report))]) == pytest.approx(shares, abs=1e-3)
    for layer in report.layers:
        assert printable(layer.name) in texts
        assert all(written(measure, layer) in texts for measure in measures(report))


@pytest.mark.parametrize(("with_base", "lines"), [(True, 3), (False, 1)])
def test_spectra_are_drawn_as_far_as_they_are_known(with_base, lines):
    report = example(with_base)
    elements = Elements(page(report))
    assert len(elements.of("svg")) == len(report.layers)
    drawn = elements.of("polyline")
    assert len(drawn) == lines * len(report.layers)
    names = ["W0", "BA", "U"] if with_base else ["BA"]
    assert [line["class"] for line in drawn[:lines]] == names
    for line in drawn:
        points = [[float(number) for number in point.split(",")] for point in line["points"].split()]
        assert points[0] == [0, 0] and points == sorted(points)  # the first is the largest


def test_layers_are_in_the_order_of_their_numbers():
    texts = [text for _, text in Elements(page(example())).text]
    rows = [text for text in texts if text.startswith("model.layers.") and text.endswith("q_proj")]
    assert rows[:12] == [f"model.layers.{i}.q_proj" for i in range(11)]


def test_the_page_says_what_it_is_about():
    report = dataclasses.replace(
        example(), notes=("not checked whether",), config={"base_model_name_or_path": "org/m<b>"}
    )
    texts = [text for _, text in Elements(page(report, "mine")).text]
    for text in ("mine", "org/m<b>", date.today().isoformat(), "not checked whether"):
        assert text in texts
    for measure in measures(report):
        assert measure.title in texts and measure.meaning in texts
    assert any("Merging into bfloat16 loses" in text for text in texts)


def luminance(colour: list[float]) -> float:
    """That of a colour in sRGB from 0 to 1, as WCAG has it."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(("ground", "ink"), [(1.0, 0.0), (0.07, 1.0)], ids=["light", "dark"])
def test_text_can_be_read_on_every_shade(ground, ink):
    """WCAG's contrast of 4.5, in the colours that browsers have for light and dark pages."""
    shade, most = re.search(r"in srgb, #(\w{6}) calc\(var\(--share, 0\) \* (\d+)%\)", page(example())).groups()
    colour = [int(shade[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    for share in (0, 0.25, 0.5, 0.75, 1):
        part = share * int(most) / 100
        mixed = luminance([part * c + (1 - part) * ground for c in colour])
        light, dark = sorted((mixed, luminance([ink] * 3)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5
