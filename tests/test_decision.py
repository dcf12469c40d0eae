"""The words of docs/hira_or_lora.md follow from the numbers, whichever way these fall."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from experiments.decision import about, choice, lines, verdicts
from experiments.report import Evidence
from experiments.tasks import TASKS

LORA = [1.0, 1.01, 0.99, 1.0, 1.0]
LOWER, HIGHER = [0.9, 0.91, 0.88, 0.9, 0.9], [1.1, 1.11, 1.08, 1.1, 1.1]
STEPS = {"LoRA": {"milliseconds": 1.0, "bytes": 1}, "HiRA": {"milliseconds": 1.5, "bytes": 3}}
LEVEL = [1.02, 0.99, 1.0, 0.98, 1.01]


def test_each_way_that_a_comparison_can_fall():
    lower, higher, level = verdicts({"a": (LORA, LOWER), "b": (LORA, HIGHER), "c": (LORA, LEVEL)})
    assert list(lower) == ["a"] and 0.09 < lower["a"] < 0.11
    assert list(higher) == ["b"] and 0.09 < higher["b"] < 0.11
    assert list(level) == ["c"] and 0 < level["c"] < 0.1


def test_the_choice_is_that_of_all_verdicts():
    assert choice({"a": (LORA, LOWER), "c": (LORA, LEVEL)}) == "HiRA"
    assert choice({"b": (LORA, HIGHER), "c": (LORA, LEVEL)}) == "LoRA"
    assert choice({"a": (LORA, LOWER), "b": (LORA, HIGHER)}) == "try both"
    assert choice({"c": (LORA, LEVEL)}) == "either"


def test_the_words():
    text = about({"a": (LORA, LOWER), "b": (LORA, HIGHER), "d": (LORA, LOWER), "c": (LORA, LEVEL)}, "Here")
    assert text.startswith("Here, HiRA's test loss is lower on a (by 10 %) and d (by 10 %) and higher on b (by 9.8 %).")
    assert "No difference was seen on c" in text
    assert "nowhere" in about({"c": (LORA, LEVEL)}, "Here")


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
    for hira, word in ((LOWER, "HiRA"), (HIGHER, "LoRA"), (LEVEL, "either")):
        found = list(lines(Told({}, dict.fromkeys(TASKS, STEPS), hira=hira)))
        assert [line[:2] for line in found[:5]] == ["1.", "2.", "3.", "4.", "5."]
        assert "LoRA+" in found[-1]
        for line in (found[0], found[1], found[2], found[4]):
            assert f": {word}.**" in line
    assert "1.50 to 1.50" in found[4] and "3.00 to 3.00" in found[4]
