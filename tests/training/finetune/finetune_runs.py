"""Runs of `hira finetune` in tests: their flags, in processes of their own, and what they leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

HIRA = [sys.executable, "-m", "hira"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
# Losses are means of a float32 product's sums of some hundred terms, through four layers and six steps: some hundred
# units of 2^-24, as the order of the sums differs.
FLOAT32 = 512 * 2**-24


def with_changed(flags: list[str], **changes: object) -> list[str]:
    """The flags with other values; None leaves one out."""
    options = dict(zip(flags[::2], flags[1::2], strict=True))
    options |= {f"--{name}": value for name, value in changes.items()}
    return [str(part) for name, value in options.items() if value is not None for part in (name, value)]


def history(folder: str = "out") -> list[dict[str, Any]]:
    return json.loads(Path(folder, "trainer_state.json").read_text())["log_history"]


def losses(folder: str = "out") -> list[float]:
    return [entry["loss"] for entry in history(folder) if "loss" in entry]


def assert_two_processes_train_as_one(flags: list[str], config: str, folder: str) -> None:
    """Of the same global batch, with what `out` has of one process."""
    two = with_changed(
        flags, output_dir=folder, per_device_train_batch_size=2, num_processes=2, accelerate_config=config
    )
    ended = subprocess.run([*HIRA, "finetune", *two], env=ENVIRONMENT, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("trainable params") == 1 and ended.stdout.count("6 steps, training loss") == 1
    assert len(losses(folder)) == 6
    assert losses(folder) == pytest.approx(losses("out"), rel=FLOAT32)
    assert f"--accelerate_config {config}" in Path(folder, "README.md").read_text()
    one, two = (load_file(f"{name}/adapter_model.safetensors") for name in ("out", folder))
    largest = max(value.abs().max() for value in one.values())
    assert one.keys() == two.keys()
    assert max((value - two[name]).abs().max() for name, value in one.items()) < 1e-3 * largest
