"""The studies in experiments/: they run, and the documentation shows what their results say."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "learning_rate" / "results.json"


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("study", ROOT / "experiments" / "learning_rate" / "study.py")
    module = sys.modules["study"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_documentation_shows_the_results(study):
    table = list(study.table(RESULTS))
    assert len(table) > 20
    assert "\n".join(table) in (ROOT / "docs" / "learning_rate.md").read_text()


def test_lora_s_best_rate_serves_hira_with_alpha(study):
    """What the documentation says: at that rate the loss is within 2 % of LoRA's at worst."""
    for line in list(study.table(RESULTS))[2:]:
        _, _, method, _, _, at_loras = (cell.strip() for cell in line.strip("|").split("|"))
        loss = float(at_loras.split()[0])
        if method == "LoRA":
            loras = loss
        elif method == "HiRA, hira_alpha":
            assert loss <= 1.02 * loras, line


@pytest.mark.parametrize("method", ["LoRA", "HiRA", "HiRA, hira_alpha", "HiRA, A's start"])
def test_a_run(study, method, tmp_path):
    study.pretrain("convolutional net", tmp_path, steps=1)
    loss, accuracy = study.adapt(study.Run("convolutional net", 4, method, 1e-3, 0), tmp_path, steps=2)
    assert 0 < loss < math.inf and 0 <= accuracy <= 1
