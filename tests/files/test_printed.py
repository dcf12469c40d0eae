"""What the commands print of files from elsewhere, and what they write, does nothing to a terminal."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hira.cli import app
from hira.files.io.printable import printable

# of C0 and C1, DEL, marks of direction, a joiner, a line end of Unicode
EVIL = "\x1b[31m\x07\x9b2J\x7f\u202egnp\u2066\u200b\u2028\r"
CONTROLS = {c for c in map(chr, range(0x110000)) if unicodedata.category(c) in {"Cc", "Cf", "Cs", "Zl", "Zp"}}


def test_every_character():
    shown = {c: printable(c) for c in map(chr, range(0x110000))}
    assert all(shown[c].isascii() and shown[c].isprintable() and len(shown[c]) > 1 for c in CONTROLS)
    assert all(shown[c] == c for c in "a ~é日‖⊙−😀")
    assert (shown["\x1b"], shown["\x9b"], shown["\u202e"], shown["\U000e0041"], shown["\n"]) == (
        *("\\x1b", "\\x9b", "\\u202e", "\\U000e0041", "\\n"),
    )
    assert printable("plain") == "plain" and printable("a\x1bé") == "a\\x1bé"


def assert_clean(text: str) -> None:
    assert {c for c in text if c != "\n" and c in CONTROLS} == set(), ascii(text)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """A model and an adapter whose names of files, tensors and values mean harm."""
    for name in ("base", "adapter"):
        (tmp_path / name).mkdir()
    name = f"layers.0.q{EVIL}"
    tensors = {f"{name}.weight": torch.randn(4, 4), "other.weight": torch.randn(2)}
    save_file(tensors, tmp_path / "base/model.safetensors")
    (tmp_path / "base" / f"{EVIL.replace('/', '')}.bin").touch()
    factors = {"hira_A": torch.randn(2, 4), "hira_B": torch.randn(4, 2)}
    save_file(
        {f"base_model.model.{name}.{key}": value for key, value in factors.items()},
        tmp_path / "adapter/adapter_model.safetensors",
    )
    config = {"peft_type": "HIRA", "r": 2, "base_model_name_or_path": EVIL, "target_modules": [EVIL]}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    return tmp_path


def printed(capfd, *command: object) -> tuple[int, str]:
    """The status and all that a command printed."""
    status = app.app([str(part) for part in command], standalone_mode=False) or 0
    out, err = capfd.readouterr()
    assert_clean(out + err)
    return status, out + err


def test_merge_convert_and_verify(folders, capfd):
    adapter, base = folders / "adapter", folders / "base"
    status, text = printed(capfd, "merge", base, adapter, "-o", folders / "none", "--dry-run")
    assert status == 0 and "merged: layers.0.q\\x1b[31m\\x07\\x9b2J\\x7f\\u202egnp" in text
    status, text = printed(capfd, "merge", base, adapter, "-o", folders / f"out{EVIL}")
    assert status == 0 and "left out: \\x1b[31m" in text
    (out,) = folders.glob("out*")
    assert_clean((out / "README.md").read_text())
    (out / EVIL).touch()
    status, text = printed(capfd, "verify", out)
    assert status == 1 and "\\x9b2J" in text and "not in the manifest" in text
    options = ["--to", "lora", "--rank", "1", "--base", base]
    status, text = printed(capfd, "convert", adapter, "-o", folders / f"lora{EVIL}", *options)
    assert status == 0 and "\\x9b2J" in text
    (out,) = folders.glob("lora*")
    assert_clean((out / "README.md").read_text())


def test_inspect(folders, capfd):
    adapter, page = folders / "adapter", folders / "page.html"
    for more in ([], ["--json"], ["--html", page]):
        status, text = printed(capfd, "inspect", adapter, "--base", folders / "base", *more)
        assert status == 0 and "x1b[31m" in text.replace("u001b", "x1b")
    assert_clean(page.read_text())


def test_errors(folders, capfd):
    adapter = folders / "adapter"
    content = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(content | {"peft_type": EVIL}))
    assert printed(capfd, "inspect", adapter)[0] == 1
    (adapter / "adapter_config.json").write_text(json.dumps(content))
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({EVIL: torch.zeros(1), **tensors}, adapter / "adapter_model.safetensors")
    assert printed(capfd, "inspect", adapter)[0] == 1
    (adapter / "adapter_config.json").write_text('{"' + EVIL.replace("\r", "") + '": 1}')
    assert printed(capfd, "convert", adapter, "-o", folders / "o", "--fold")[0] == 1
