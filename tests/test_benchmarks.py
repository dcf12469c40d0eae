"""The scripts in benchmarks/: what can be checked of them without their hours and their hardware."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


def test_the_readme_has_the_table_of_the_committed_results():
    import readme_table

    readme = readme_table.README.read_text()
    assert readme_table.with_table(readme) == readme
    assert "| hira |" in readme


def test_the_gpu_script_checks_every_kernel():
    pytest.importorskip("triton", reason="triton is not installed, so its kernels cannot run, not even interpreted")
    import gpu

    errors = dict(gpu.check_kernels(DEVICE))
    assert len(errors) == 12
    assert all(error < 0.01 for error in errors.values())


def test_the_gpu_script_stops_at_a_wrong_kernel(monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed, so its kernels cannot run, not even interpreted")
    import gpu

    form = gpu.cuda.form
    monkeypatch.setattr(gpu.cuda, "form", lambda *a, **k: 1.001 * form(*a, **k))
    with pytest.raises(SystemExit, match=r"form in torch\.float32 is off by 1\.0e-03, allowed .*; nothing is timed"):
        list(gpu.check_kernels(DEVICE))


def test_the_gpu_script_says_how_it_is_used():
    done = subprocess.run([FOLDER / "gpu.sh"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "gpu.sh run OUT" in done.stderr
    done = subprocess.run([sys.executable, FOLDER / "gpu.py"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "gpu.py OUT" in done.stderr
