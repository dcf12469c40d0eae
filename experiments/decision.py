"""HiRA or LoRA? The lines of docs/hira_or_lora.md, in words that the committed results choose."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean

from benchmarks.readme_table import with_lines
from experiments.plans import SHARES, SMALL_TASKS
from experiments.report import BEGIN, LORAS_RATE, Evidence, forgetful, source_at, target_of, tests
from experiments.statistics import LEVEL, paired
from experiments.tasks import TASKS

Pairs = dict[str, tuple[list[float], list[float]]]  # by task: LoRA's losses and HiRA's, seed by seed


def verdicts(pairs: Pairs, corrected: bool = False) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """Where HiRA's loss is lower, where it is higher, and where neither was seen.

    Args:
        pairs: what is compared.
        corrected: whether p is corrected for the number of tasks.

    Returns:
        Each by task: how much lower or higher, as a part of LoRA's loss, and p; of the last the smallest difference
        that the runs would have seen.

    Source:
        Holm, A simple sequentially rejective multiple test procedure (1979).
    """
    found = {task: paired(lora, hira) for task, (lora, hira) in pairs.items()}
    order = sorted(found, key=lambda task: found[task].p)
    passed = [found[task].p * (len(order) - place if corrected else 1) < LEVEL for place, task in enumerate(order)]
    seen = order[: [*passed, False].index(False)]
    lower, higher, level = {}, {}, {}
    for task, (difference, p, detectable) in found.items():
        size, smallest = (percent(abs(each) / mean(pairs[task][0])) for each in (difference, detectable))
        if task in seen:
            (lower if difference < 0 else higher)[task] = f"by {size}, p = {p:.2g}"
        else:
            level[task] = f"one of {smallest} would have been"
    return lower, higher, level


def choice(pairs: Pairs) -> str:
    """The method that the verdicts are for, p corrected for the number of tasks."""
    lower, higher, _ = verdicts(pairs, corrected=True)
    if lower and higher:
        return "try both"
    return "HiRA" if lower else "LoRA" if higher else "either"


def about(pairs: Pairs, when: str, what: str = "test loss") -> str:
    """The verdicts in words."""
    lower, higher, level = (
        enumerated([f"{task} ({words})" for task, words in each.items()]) for each in verdicts(pairs)
    )
    parts = [f"{word} on {tasks}" for word, tasks in (("lower", lower), ("higher", higher)) if tasks]
    text = f"{when}, HiRA's {what} is {enumerated(parts) or 'nowhere seen to differ'}."
    return f"{text} No difference was seen on {level}." if level else text


def enumerated(parts: list[str]) -> str:
    """a, b and c."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else "".join(parts)


def percent(size: float) -> str:
    """A share as a percentage of two digits."""
    return f"{size * 100:.2g} %" if size < 0.995 else f"{size * 100:.0f} %"


def span(ratios: list[float]) -> str:
    """From the lowest to the highest."""
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


def lines(evidence: Evidence) -> Iterator[str]:
    """The five lines of the decision, and a sentence about LoRA+."""

    def of(row: str, tasks: tuple[str, ...] = tuple(TASKS), share: float = 1, lora: str = "LoRA") -> Pairs:
        rows = {task: [tests(evidence.runs(task, each, share=share)) for each in (lora, row)] for task in tasks}
        return {task: (losses, hira) for task, (losses, hira) in rows.items()}

    def sources() -> Pairs:
        found: Pairs = {}
        for task in forgetful():
            target = target_of(evidence, task)
            lora, hira = ([source_at(run, target) for run in evidence.runs(task, row)] for row in ("LoRA", "HiRA"))
            found[task] = lora, hira
        return found

    small = {
        f"{share * 100:g} % of {task}": pair
        for share in SHARES[:-1]
        for task, pair in of("HiRA", SMALL_TASKS, share).items()
    }
    same_time = {task: (tests(evidence.longer(task)), tests(evidence.runs(task, "HiRA"))) for task in TASKS}
    steps = [(evidence.steps[task]["HiRA"], evidence.steps[task]["LoRA"]) for task in TASKS]
    times, peaks = (
        span([hira[key] / lora[key] for hira, lora in steps])  # type: ignore[literal-required]
        for key in ("milliseconds", "bytes")
    )
    yield f"1. **You search for the rate: {choice(of('HiRA'))}.** {about(of('HiRA'), 'Each at its own best rate')}"
    loras = of(LORAS_RATE)
    told = about(loras, "With `hira_alpha`, at LoRA's best rate")
    yield f"2. **You take LoRA's rate: {choice(loras)}.** {told}"
    yield f"3. **You have little data: {choice(small)}.** {about(small, 'Each at its own best rate for it')}"
    yield (
        f"4. **What the model could do before has to stay: {choice(sources())}.** "
        f"{about(sources(), 'At equal test loss', 'loss on the task before')}"
    )
    yield (
        f"5. **Time is short: {choice(same_time)}.** Here a step of HiRA takes {times} times LoRA's, and its memory is "
        f"{peaks} times LoRA's. {about(same_time, 'Against a LoRA that got as much time')}"
    )
    yield ""
    yield about(
        of("HiRA", lora="LoRA+"), "Against LoRA+, the LoRA whose B has a larger rate, each at its own best rate"
    )


def with_decision(page: str, evidence: Evidence) -> str:
    """The page with the lines between their marks."""
    return with_lines(page, BEGIN.format("decision"), list(lines(evidence)))
