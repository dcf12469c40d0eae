"""The page: what it holds, that names stay text, and what a real browser makes of it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
from datetime import date
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from files.test_report_table import EVIL, example

from hira.files.inspect.report_page import page, write_page
from hira.files.inspect.report_table import measures

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


def test_the_page_says_what_it_is_about():
    report = dataclasses.replace(
        example(), notes=("not checked whether",), config={"base_model_name_or_path": "org/m<b>"}
    )
    content = page(report, "mine")
    texts = [text for _, text in Elements(content).text]
    for text in ("mine", "org/m<b>", date.today().isoformat(), "not checked whether", "layer ↓ module →"):
        assert text in texts
    for measure in measures(report).values():
        assert measure.title in texts and measure.sentence in texts and measure.sentence.endswith(".")
    assert any("Merging into bfloat16 loses" in text for text in texts)


def luminance(red: float, green: float, blue: float) -> float:
    """That of linear sRGB, as WCAG has it."""
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def linear(colour: str) -> torch.Tensor:
    parts = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    values = torch.tensor([int(parts[i : i + 2], 16) / 255 for i in (0, 2, 4)], dtype=torch.float64)
    return torch.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def contrast(first: torch.Tensor, second: torch.Tensor) -> float:
    light, dark = sorted((luminance(*first.tolist()), luminance(*second.tolist())), reverse=True)
    return (light + 0.05) / (dark + 0.05)


# to LMS and from its cube roots to Oklab, in which the page mixes the colours of its map
LMS = [
    [0.4122214708, 0.5363325363, 0.0514459929],
    [0.2119034982, 0.6806995451, 0.1073969566],
    [0.0883024619, 0.2817188376, 0.6299787005],
]
OKLAB = [
    [0.2104542553, 0.7936177850, -0.0040720468],
    [1.9779984951, -2.4285922050, 0.4505937099],
    [0.0259040371, 0.7827717662, -0.8086757660],
]


@pytest.mark.parametrize("theme", [0, 1])
def test_text_can_be_read_on_every_colour_of_the_map(theme):
    """WCAG's 4.5, for light and for dark themes, and for the text around the map."""
    content = page(example())
    styles = re.findall(r":root \{(.*?)\}", content, re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#\w+);", styles[theme]))
    to_lms, to_lab = (torch.tensor(rows, dtype=torch.float64) for rows in (LMS, OKLAB))
    low, high = (to_lab @ (to_lms @ linear(colours[name])) ** (1 / 3) for name in ("low", "high"))
    thresholds = [float(number) for number in re.findall(r"share > (\.\d+)", content)]
    assert len(thresholds) == 2
    for share in torch.linspace(0, 1, 201).tolist():
        ground = torch.linalg.solve(to_lms, torch.linalg.solve(to_lab, low + share * (high - low)) ** 3)
        name = "on-high" if share > thresholds[0] else "on-mid" if share > thresholds[1] else "on-low"
        assert contrast(linear(colours[name]), ground) >= 4.5, (name, share)
    for name in ("ink", "faint"):
        assert contrast(linear(colours[name]), linear(colours["ground"])) >= 4.5
    for name in ("W0", "delta", "update", "mark"):  # lines need less
        assert contrast(linear(colours[name]), linear(colours["ground"])) >= 3


@needs_browser
@pytest.mark.parametrize("width", [500, 1280])
def test_the_map_scrolls_and_the_page_does_not(tmp_path, width):
    report = example(layers=3)
    more = [dataclasses.replace(report.layers[0], name=f"model.layers.0.mlp.experts.{i}.up_proj") for i in range(40)]
    write_page(dataclasses.replace(report, layers=(*report.layers, *more)), tmp_path / "a.html", "a" * 100)
    browser = Browser(tmp_path / "a.html")
    try:
        browser.send("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        assert browser.run("document.documentElement.scrollWidth") <= width
        assert browser.run("document.querySelector('.scroll').scrollWidth") > width
        browser.run("document.querySelector('.scroll').scrollLeft = 300")
        left = browser.run("document.querySelector('tbody th').getBoundingClientRect().left")
        assert 0 <= left < 100  # the names of the layers stay
    finally:
        browser.close()


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


class Browser:
    """A page in a browser, spoken to over a pair of pipes, which the browser has as descriptors 3 and 4."""

    def __init__(self, path: Path) -> None:
        (their_in, self._out), (self._in, their_out) = os.pipe(), os.pipe()
        command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        shell = f'exec "$@" 3<&{their_in} 4>&{their_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *command, f"--user-data-dir={path.parent / 'profile'}"],
            pass_fds=(their_in, their_out),
            stderr=subprocess.DEVNULL,
        )
        os.close(their_in)
        os.close(their_out)
        self._replies, self._count, self._session = os.fdopen(self._in, "rb"), 0, {}
        target = self.send("Target.createTarget", url=path.as_uri())["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._session = {"sessionId": session}
        while self.run("document.readyState") != "complete" or not self.run("Boolean(document.querySelector('#map'))"):
            pass

    def send(self, method: str, **params):
        """Call a method of the browser and return its result; events are passed over."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params, **self._session}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            reply, byte = b"", b""
            while byte != b"\0":
                reply, byte = reply + byte, self._replies.read(1)
                assert byte, "the browser has gone"
            found = json.loads(reply)
            if found.get("id") == self._count:
                return found["result"]

    def run(self, script: str):
        """The value of an expression in the page, which the page's policy does not hinder."""
        return self.send("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def press(self, key: str, code: int, text: str = "") -> None:
        event = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.send("Input.dispatchKeyEvent", type="keyDown", **event, **({"text": text} if text else {}))
        self.send("Input.dispatchKeyEvent", type="keyUp", **event)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(30)
        self._replies.close()
        os.close(self._out)


@needs_browser
def test_clicks_keys_and_the_choice_of_a_measure(tmp_path):
    report = example()
    write_page(report, tmp_path / "a.html")
    browser = Browser(tmp_path / "a.html")
    try:
        chosen = "document.getElementById('chosen').textContent"
        browser.run("document.querySelector('[data-layer=\"5\"]').click()")
        assert browser.run(chosen) == report.layers[5].name
        browser.run("document.querySelector('#map').rows[1].cells[1].firstChild.focus()")
        browser.press("ArrowDown", 40)
        browser.press("ArrowRight", 39)
        browser.press("Enter", 13, "\r")
        assert browser.run(chosen) == "model.layers.1.mlp.up"
        assert browser.run("document.activeElement.getAttribute('aria-pressed')") == "true"
        browser.run("choice.value = 'largest_delta'; choice.dispatchEvent(new Event('change'))")
        shown = browser.run("document.querySelector('[data-layer=\"5\"]').textContent")
        assert shown == f"{report.layers[5].largest_delta:.2e}"
        assert "max |BA|" in browser.run("document.getElementById('meaning').textContent")
    finally:
        browser.close()
