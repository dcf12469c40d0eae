"""What docs/evidence.md says about expressiveness is so in the committed results."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import pytest
from experiments.expressiveness import FULL, LAYERS, TABLE_RANK, over_seeds
from experiments.plans import FULL as FULL_SIZE
from experiments.runs import load

FITS = load(Path(__file__).parents[1] / "experiments" / "results" / "expressiveness.json")


@pytest.mark.parametrize("task", LAYERS)
def test_what_the_documentation_says_of_the_results(task):
    def error(target: str, method: str) -> float:
        found = over_seeds(FITS, FULL_SIZE.seeds, task, target, TABLE_RANK, method)
        return mean(each["error"] for each in found)

    # of an update without structure both fit as much
    assert error("Gaussian", "HiRA") == pytest.approx(error("Gaussian", "LoRA"), rel=0.01)
    # each has updates of its own
    assert error("low rank", "LoRA") < 1e-3 < 0.7 < error("low rank", "HiRA")
    for target in ("W0 ⊙ low rank", "rows and columns rescaled"):
        assert error(target, "HiRA") < 1e-3 < 0.6 < error(target, "LoRA")
    # and what full fine-tuning does is nearer to LoRA's; HiRA fits it hardly better than noise
    assert error(FULL, "LoRA") < error(FULL, "HiLoRA") < error(FULL, "HiRA")
    assert error(FULL, "HiRA") > 0.97 * error("Gaussian", "HiRA")
