"""The example runs from end to end, in small."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples" / "docstrings"


def test_the_demo(tmp_path):
    command = [sys.executable, EXAMPLE / "demo.py", "--quick", "--output", tmp_path]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stderr == ""
    assert "--quick" in finished.stdout and "mean nothing" in finished.stdout
    assert "Method 1 of 3" in finished.stdout and "Method 3 of 3" in finished.stdout
    assert "{'" not in finished.stdout, "the trainer's log is printed as raw dictionaries"
    assert "trainable params: " in finished.stdout
    assert "merged: largest difference" in finished.stdout
    assert any(line.startswith("│ HiRA") for line in finished.stdout.splitlines())
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
