"""Is it W0? HiRA with another matrix in the place of W0 in its update, W' = W0 + M ⊙ BA, each at its own best rate.

Every M has the norm of W0, so that nothing differs but what the entries of BA are multiplied by. The layers are plain
PyTorch here: hira's have no other M.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from statistics import mean, stdev

import torch
from experiments.methods import Method
from experiments.plans import Place, Setting, Size, best_point, search, tuned
from experiments.runs import Records, Run
from experiments.statistics import paired
from torch import Tensor, nn
from torch.nn.utils import parametrize

COMPARED_ON = ("English", "French", "digits", "tumours")


def of_the_norm_of(W0: Tensor, matrix: Tensor) -> Tensor:
    """A matrix scaled to the Frobenius norm of W0."""
    return matrix * (W0.norm() / matrix.norm())


def noise(W0: Tensor) -> Tensor:
    """Gaussian noise."""
    return of_the_norm_of(W0, torch.randn_like(W0))


def permuted(W0: Tensor) -> Tensor:
    """The entries of W0 in a random order."""
    return W0.flatten()[torch.randperm(W0.numel())].view_as(W0)


def leading(W0: Tensor) -> Tensor:
    """W0's leading quarter of singular values with their vectors; a convolution's weight is (out, in · kernel)."""
    left, values, right = torch.linalg.svd(W0.flatten(1), full_matrices=False)
    k = math.ceil(len(values) / 4)
    return of_the_norm_of(W0, (left[:, :k] * values[:k]) @ right[:k]).view_as(W0)


def ones(W0: Tensor) -> Tensor:
    """The same number everywhere: LoRA, up to its scale."""
    return of_the_norm_of(W0, torch.ones_like(W0))


class Update(nn.Module):
    """W' = W0 + M ⊙ BA, with A and B started as HiRA's are."""

    M: Tensor

    def __init__(self, M: Tensor, r: int) -> None:
        super().__init__()
        self.register_buffer("M", M)
        self.A = nn.Parameter(nn.init.kaiming_uniform_(M.new_empty(r, M[0].numel()), a=math.sqrt(5)))
        self.B = nn.Parameter(M.new_zeros(len(M), r))

    def forward(self, W0: Tensor) -> Tensor:
        """W0 (out, ...) -> W' of the same shape."""
        return W0 + self.M * (self.B @ self.A).view_as(W0)


class Adapted(nn.Module):
    """A model with an Update on some of its layers."""

    def __init__(self, model: nn.Module, targets: list[str], r: int, make: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.layers = [module for name, module in model.named_modules() if name.split(".")[-1] in targets]
        for layer in self.layers:
            parametrize.register_parametrization(layer, "weight", Update(make(layer.weight.detach()), r))

    def forward(self, x: Tensor) -> Tensor:
        """What the model makes of x."""
        output: Tensor = self.model(x)
        return output

    def merge_and_unload(self) -> nn.Module:
        """The model with W' for its weights."""
        for layer in self.layers:
            parametrize.remove_parametrizations(layer, "weight")
        return self.model


def adapt(model: nn.Module, targets: list[str], r: int, make: Callable[[Tensor], Tensor]) -> nn.Module:
    """A model with updates M ⊙ BA, where M is made of W0."""
    return Adapted(model, targets, r, make)


def method(make: Callable[[Tensor], Tensor]) -> Method:
    """HiRA with M made of W0."""
    return Method(partial(adapt, make=make))


METHODS = {
    "W0": method(torch.clone),
    "W0 permuted": method(permuted),
    "Gaussian noise": method(noise),
    "W0's leading quarter": method(leading),
    "ones": method(ones),
}


def plan(known: Records, place: Place) -> Iterator[Run]:
    """Every matrix on some tasks."""
    for task, name in product(COMPARED_ON, METHODS):
        yield from tuned(known, Setting(task, name), place.size)


def compared(known: Records, size: Size, task: str, name: str) -> tuple[float, list[float], float]:
    """A matrix's best rate, the test loss of each seed at it, and the mean effective rank of the updates."""
    setting = Setting(task, name)
    _, rate = search(known, setting, size)
    assert rate is not None
    found = [known[run.key] for run in setting.at(rate, size)]
    return rate, [each["test"][best_point(each)] for each in found], mean(each["effective_rank"] for each in found)


def table(known: Records, size: Size) -> Iterator[str]:
    """The lines of a table: each matrix's test loss, and how it compares with that of W0."""
    yield "| task | M | best rate | test loss | more than with W0 | p | detectable | effective rank |"
    yield "|---|---|---|---|---|---|---|---|"
    for task, name in product(COMPARED_ON, METHODS):
        rate, losses, rank = compared(known, size, task, name)
        than_w0 = " | | "
        if name != "W0":
            difference, p, detectable = paired(compared(known, size, task, "W0")[1], losses)
            than_w0 = f"{difference:+.4f} | {p:.2g} | {detectable:.4f}"
        yield f"| {task} | {name} | {rate:g} | {mean(losses):.4f} ± {stdev(losses):.4f} | {than_w0} | {rank:.1f} |"
