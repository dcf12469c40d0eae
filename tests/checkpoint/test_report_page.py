"""The page: what it holds, that names stay text, and what a real browser makes of it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from checkpoint.test_report_table import EVIL, example

from hira.checkpoint.report_page import page, write_page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on the path")


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


def dom(path: Path, *flags: str) -> str:
    """The document after its scripts have run."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={path.parent / 'profile'}"]
    run = subprocess.run([*command, *flags, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_the_page_needs_nothing_else_and_names_stay_text():
    content = page(example(), title=EVIL)
    elements = Elements(content)
    assert [attributes.get("type") for attributes in elements.of("script")] == ["application/json", None]
    assert not re.search(r"\b(src|href|url|@import)\b\s*[=(]", content)
    assert "\x1b" not in content
    assert content.count("</script>") == 2
    assert any(EVIL.split("\x1b")[0] in text for _, text in elements.text)
    [policy] = [meta["content"] for meta in elements.of("meta") if "http-equiv" in meta]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy.split("script-src")[1]


@pytest.mark.parametrize("with_base", [True, False])
def test_the_map_is_there_without_scripts(with_base):
    report = example(with_base)
    elements = Elements(page(report))
    buttons = {int(button["data-layer"]): button for button in elements.of("button")}
    assert len(buttons) == len(report.layers)
    values = [layer.relative_norm if with_base else layer.delta_norm for layer in report.layers]
    if with_base:
        for index, value in enumerate(values):
            share = float(buttons[index]["style"].removeprefix("--v:"))
            assert share == pytest.approx((value - min(values)) / (max(values) - min(values)), abs=1e-4)
            assert buttons[index]["aria-label"].endswith(f"{value:.2e}")


def test_the_data_of_the_script():
    report = example()
    content = page(report)
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', content, re.DOTALL)[1])
    assert len(data["layers"]) == len(report.layers)
    assert data["layers"][0]["update"]["values"] == pytest.approx(report.layers[0].update.values, rel=1e-3)
    assert "relative_norm" in data["measures"]
    bare = page(example(with_base=False))
    assert '"weight": null' in bare
    assert "size of the update" not in bare


@needs_browser
def test_a_browser_draws_the_first_layer_and_runs_no_name(tmp_path):
    write_page(example(), tmp_path / "a.html", title=EVIL)
    content = dom(tmp_path / "a.html")
    live = content[content.index('id="live"') : content.index("<details>")]
    assert not re.match(r'id="live"[^>]*hidden', live)
    assert live.count("<svg") == live.count("<polyline") == 3
    assert live.count("<circle") == 6 + 3 + 6  # the ranks of 6 x 8
    assert "NaN" not in live
    assert content.count('aria-pressed="true"') == 1
    assert "<title>gone</title>" not in content
    assert len(Elements(content).of("script")) == 2


@needs_browser
def test_a_browser_without_the_base(tmp_path):
    write_page(example(with_base=False), tmp_path / "a.html")
    content = dom(tmp_path / "a.html")
    live = content[content.index('id="live"') : content.index("<details>")]
    assert live.count("<svg") == 1
    assert live.count("not known") == 2
