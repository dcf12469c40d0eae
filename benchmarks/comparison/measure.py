"""Checks every result against the reference, then times the methods interleaved, and measures peaks of memory."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from benchmarks.comparison.cases import Case, adapted, adapter_name, step
from benchmarks.comparison.methods import Method, effective_weights
from benchmarks.comparison.peak import peak
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.func import functional_call

# An error against the float64 reference may be this many times that of the plain expression with the effective weight
# in the same dtype, which rounds the same quantities in another order; and never has to be below the second number.
TIMES_PLAIN = 4.0
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}


@dataclass
class Record:
    """What one method took in one case.

    Args:
        case, method: their names.
        error: the largest relative error against the reference, over output and gradients.
        wrong: what was wrong, if anything; then there are no times.
        times_ms: of each repetition, in milliseconds.
        peak_bytes: the most memory above the model, gradients included; None where it was not measured.
    """

    case: str
    method: str
    error: float
    wrong: str | None = None
    times_ms: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    @property
    def median_ms(self) -> float | None:
        return statistics.median(self.times_ms) if self.times_ms else None


def run(case: Case, advance: Callable[[str], None] = lambda what: None) -> list[Record]:
    """Measure one case: check each method, then time those that are right, one after the other in each round.

    Args:
        case: the case.
        advance: called before each part of the work, with its description.

    Returns:
        A record for each method.
    """
    records, models = [], {}
    for method in case.methods:
        advance(f"{case.name}: checking {method.name}")
        model = adapted(case, method)
        error, wrong = check(case, method, model)
        records.append(Record(case.name, method.name, error, wrong))
        if wrong is None:
            models[method.name] = model
    rights = [record for record in records if record.wrong is None]
    for repeat in range(case.repeats + 1):  # the first one warms up
        advance(f"{case.name}: timing")
        for record in rights:
            elapsed = timed(case, models[record.method])
            if repeat:
                record.times_ms.append(elapsed / case.per)
    if case.memory:
        for record in rights:
            advance(f"{case.name}: memory of {record.method}")
            record.peak_bytes = peak(case, next(m for m in case.methods if m.name == record.method))
    return records


def run_all(cases: Sequence[Case]) -> list[Record]:
    """Measure cases one after the other, with a progress bar where there is a terminal."""
    records = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=sum(parts(case) for case in cases))
        for case in cases:
            records += run(case, lambda what: progress.update(task, advance=1, description=what))
    return records


def parts(case: Case) -> int:
    """How often `run` calls `advance`."""
    return len(case.methods) * (2 if case.memory else 1) + case.repeats + 1


def timed(case: Case, model: nn.Module) -> float:
    """Milliseconds of one run of the case."""
    inputs = _fresh(case, case.inputs)
    model.zero_grad()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0)  # as an optimizer's step, after which no weight that was kept will do
    _synchronize(case)
    begin = time.perf_counter()
    step(case, model, inputs)
    _synchronize(case)
    return 1e3 * (time.perf_counter() - begin)


def check(case: Case, method: Method, model: nn.Module) -> tuple[float, str | None]:
    """Compare output and gradients with a bare model in float64 that has the effective weight.

    Returns:
        The largest relative error, and what was wrong, if anything.
    """
    inputs = case.inputs if case.check_inputs is None else case.check_inputs
    found = _results(case, model, inputs)
    exact = _reference(case, method, model, inputs, torch.float64)
    plain = _reference(case, method, model, inputs, case.options.dtype)
    worst, wrong = 0.0, None
    for name in exact:
        error = _error(found[name], exact[name])
        bound = max(TIMES_PLAIN * _error(plain[name], exact[name]), FLOOR[case.options.dtype])
        if name.startswith("gradients"):
            bound += method.gradient_error
        worst = max(worst, error)
        if not error <= bound:
            wrong = wrong or f"{name} off by {error:.1e}, allowed {bound:.1e}"
    return worst, wrong


def _results(case: Case, model: nn.Module, inputs: Tensor) -> dict[str, list[Tensor]]:
    if case.mode == "infer":
        with torch.no_grad():
            return {"output": [case.call(model, inputs)]}
    x = _fresh(case, inputs)
    trained = [p for p in model.parameters() if p.requires_grad]
    y = case.call(model, x)
    return _gradients(y, x, trained)


def _reference(
    case: Case, method: Method, model: nn.Module, inputs: Tensor, dtype: torch.dtype
) -> dict[str, list[Tensor]]:
    """The same from the bare model, in a dtype, each weight replaced by the effective one, formed in float64."""
    bare = (case.reference_base or case.base)().to(dtype).requires_grad_(False)
    bare.train(case.mode == "train")
    parameters = list(model.parameters())
    leaves: dict[Tensor, Tensor] = {p: p.detach().double().requires_grad_(p.requires_grad) for p in parameters}

    def call(x: Tensor, adapter: int = 0) -> Tensor:
        weights = effective_weights(model, method, adapter_name(adapter), leaves)
        y: Tensor = functional_call(_Bare(case, bare), {f"model.{n}": w.to(dtype) for n, w in weights.items()}, (x,))
        return y

    x = _fresh(case, inputs.to(dtype) if inputs.is_floating_point() else inputs)
    with torch.set_grad_enabled(case.mode == "train"):
        y = torch.cat([call(x[i : i + 1], i) for i in range(case.mixed)]) if case.mixed else call(x)
    if case.mode == "infer":
        return {"output": [y]}
    return _gradients(y, x, [leaves[p] for p in parameters if p.requires_grad])


class _Bare(nn.Module):
    """A bare model, called as the case calls an adapted one."""

    def __init__(self, case: Case, model: nn.Module) -> None:
        super().__init__()
        self.model, self.case = model, case

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model(x) if self.case.mixed else self.case.call(self.model, x)
        return y


def _gradients(y: Tensor, x: Tensor, trained: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    wanted = [*([x] if x.requires_grad else []), *trained]
    gradients = list(torch.autograd.grad(y, wanted, torch.ones_like(y)))
    parts = {"output": [y.detach()]}
    if x.requires_grad:
        parts["gradient of x"] = [gradients.pop(0)]
    parts["gradients of parameters"] = gradients
    return parts


def _fresh(case: Case, inputs: Tensor) -> Tensor:
    """Inputs that need a gradient, as inside a network."""
    return inputs.detach().requires_grad_(case.mode == "train" and inputs.is_floating_point())


def _error(found: list[Tensor], exact: list[Tensor]) -> float:
    """The relative error of some tensors taken as one vector."""
    difference = sum(float((f.double() - e.double()).square().sum()) for f, e in zip(found, exact, strict=True))
    size = sum(float(e.double().square().sum()) for e in exact)
    return math.sqrt(difference / max(size, 1e-300))


def _synchronize(case: Case) -> None:
    if case.options.device == "cuda":
        torch.cuda.synchronize()
