"""Is it W0? HiRA with another matrix in the place of W0 in its update, W' = W0 + M ⊙ BA, each at its own best rate.

Every M has the norm of W0, so that nothing differs but what the entries of BA are multiplied by. The layers are plain
PyTorch here: hira's have no other M.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from experiments.methods import Method
from experiments.plans import Place, Setting, tuned
from experiments.runs import Records, Run
from torch import Tensor, nn
from torch.nn.utils import parametrize

COMPARED_ON = ("digits", "tumours", "English", "French", "docstrings")


def noise(W0: Tensor) -> Tensor:
    """Gaussian noise."""
    return torch.randn_like(W0)


def permuted(W0: Tensor) -> Tensor:
    """The entries of W0 in a random order."""
    return W0.flatten()[torch.randperm(W0.numel())].view_as(W0)


def leading(W0: Tensor) -> Tensor:
    """W0's leading quarter of singular values with their vectors; a convolution's weight is (out, in · kernel)."""
    left, values, right = torch.linalg.svd(W0.flatten(1), full_matrices=False)
    k = math.ceil(len(values) / 4)
    return ((left[:, :k] * values[:k]) @ right[:k]).view_as(W0)


class Update(nn.Module):
    """W' = W0 + M ⊙ BA, with M scaled to the norm of W0, and A and B started as HiRA's are."""

    M: Tensor

    def __init__(self, W0: Tensor, M: Tensor, r: int) -> None:
        super().__init__()
        self.register_buffer("M", M * (W0.norm() / M.norm()))
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
            W0 = layer.weight.detach()
            parametrize.register_parametrization(layer, "weight", Update(W0, make(W0), r))

    def forward(self, x: Tensor) -> Tensor:
        """What the model makes of x."""
        output: Tensor = self.model(x)
        return output

    def merge_and_unload(self) -> nn.Module:
        """The model with W' for its weights."""
        for layer in self.layers:
            parametrize.remove_parametrizations(layer, "weight")
        return self.model


METHODS = {
    name: Method(partial(Adapted, make=make))
    for name, make in {
        "W0": torch.clone,
        "W0 permuted": permuted,
        "Gaussian noise": noise,
        "W0's leading quarter": leading,
        "ones": torch.ones_like,
    }.items()
}


def plan(known: Records, place: Place) -> Iterator[Run]:
    """Every matrix on some tasks."""
    for task, name in product(COMPARED_ON, METHODS):
        yield from tuned(known, Setting(task, name), place.size)
