"""The words of docs/hira_or_lora.md follow from the numbers, whichever way these fall."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.decision import about, choice, lines, verdicts, with_decision
from experiments.report import Evidence, load_evidence
from experiments.statistics import LEVEL, paired
from experiments.tasks import TASKS

ROOT = Path(__file__).parents[1]
LORA = [1.0, 1.01, 0.99, 1.0, 1.0]
LOWER, HIGHER = [0.9, 0.91, 0.88, 0.9, 0.9], [1.1, 1.11, 1.08, 1.1, 1.1]
STEPS = {"LoRA": {"milliseconds": 1.0, "bytes": 1}, "HiRA": {"milliseconds": 1.5, "bytes": 3}}
LEVEL_LOSSES = [1.02, 0.99, 1.0, 0.98, 1.01]


def test_each_way_that_a_comparison_can_fall():
    lower, higher, level = verdicts({"a": (LORA, LOWER), "b": (LORA, HIGHER), "c": (LORA, LEVEL_LOSSES)})
    assert list(lower) == ["a"] and "by 10 %" in lower["a"]
    assert list(higher) == ["b"] and "by 9.8 %" in higher["b"]
    assert list(level) == ["c"] and "one of 3.1 %" in level["c"]


def test_the_choice_is_that_of_all_verdicts():
    assert choice({"a": (LORA, LOWER), "c": (LORA, LEVEL_LOSSES)}) == "HiRA"
    assert choice({"b": (LORA, HIGHER), "c": (LORA, LEVEL_LOSSES)}) == "LoRA"
    assert choice({"a": (LORA, LOWER), "b": (LORA, HIGHER)}) == "try both"
    assert choice({"c": (LORA, LEVEL_LOSSES)}) == "either"


def test_a_choice_needs_more_than_one_small_p_of_many():
    """A p of 0.02 is one in fifty; of five tasks one has it by chance in one page of ten."""
    weak = [0.9, 0.98, 0.95, 0.99, 0.9]
    p = paired(LORA, weak).p
    assert LEVEL / 5 < p < LEVEL
    level = {task: (LORA, LEVEL_LOSSES) for task in "abcd"}
    assert choice({"e": (LORA, weak)}) == "HiRA"
    assert choice({**level, "e": (LORA, weak)}) == "either"
    assert list(verdicts({**level, "e": (LORA, weak)})[0]) == ["e"]


def test_the_words():
    text = about({"a": (LORA, LOWER), "b": (LORA, HIGHER), "d": (LORA, LOWER), "c": (LORA, LEVEL_LOSSES)}, "Here")
    assert "HiRA's test loss is lower on a (by 10 %, p = 8" in text
    assert "and d (" in text and "and higher on b (by 9.8 %, p = 1e-06)." in text
    assert text.endswith("No difference was seen on c (one of 3.1 % would have been).")
    assert "nowhere" in about({"c": (LORA, LEVEL_LOSSES)}, "Here")


@dataclass(frozen=True)
class Told(Evidence):
    """Evidence in which HiRA's test losses are given, and everything else is LoRA's."""

    hira: Sequence[float] = ()

    def runs(self, task, row, r=8, share=1):
        losses = self.hira if "HiRA" in row else LORA
        return [
            {"validation": [2, loss], "test": [2, loss], "test_metric": [0, 0], "source": [1, loss], "seed": seed}
            for seed, loss in enumerate(losses)
        ]

    def longer(self, task):
        return self.runs(task, "LoRA")


def test_all_five_lines():
    for hira, word in ((LOWER, "HiRA"), (HIGHER, "LoRA"), (LEVEL_LOSSES, "either")):
        found = list(lines(Told({}, dict.fromkeys(TASKS, STEPS), hira=hira)))
        assert [line[:2] for line in found[:5]] == ["1.", "2.", "3.", "4.", "5."]
        assert "LoRA+" in found[-1]
        for line in (found[0], found[1], found[2], found[4]):
            assert f": {word}.**" in line
    assert "1.50 to 1.50" in found[4] and "3.00 to 3.00" in found[4]


def test_the_page_shows_the_lines():
    page = (ROOT / "docs" / "hira_or_lora.md").read_text(encoding="utf-8")
    assert with_decision(page, load_evidence(ROOT / "experiments" / "results")) == page
    assert "\n5. **" in page
    first = next(line for line in page.splitlines() if line.startswith("1. "))
    assert "either" in first and "lower on digits" in first  # the text calls that large but uncertain
