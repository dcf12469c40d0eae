"""The page: what it holds, that names stay text, and what a real browser makes of it."""

from __future__ import annotations

import json
import os
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
