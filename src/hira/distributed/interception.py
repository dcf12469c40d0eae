"""The base layer's own call with another product in it, where that call is what brings the weight in.

Hooks on a base layer may gather its weight, lay x out for a part of it, sum what the processes computed, and free the
weight again. They work for the product of the layer's own forward. So that call is left to run, and the one function in
it that takes the weight is exchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Product(NamedTuple):
    """A product that the base layer is about to compute."""

    function: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def x(self) -> Tensor:
        """The layer's input as it arrives here."""
        x: Tensor = self.args[_PLACES[self.function][0]]
        return x

    @property
    def weight(self) -> Tensor:
        """The layer's weight as it arrives here."""
        weight: Tensor = self.args[_PLACES[self.function][1]]
        return weight

    def compute(self) -> Tensor:
        """The base layer's own output."""
        return self.function(*self.args, **self.kwargs)


# the functions in which plain forwards multiply, with the places of x and of the weight among their arguments
_PLACES: dict[Any, tuple[int, int]] = {
    F.linear: (0, 1),
    F.embedding: (0, 1),
    F.conv1d: (0, 1),
    F.conv2d: (0, 1),
    F.conv3d: (0, 1),
    torch.addmm: (1, 2),  # of transformers' `Conv1D`; there x is (T, in)
}


class _Exchange(TorchFunctionMode):
    """Hands the products with one layer's weight to another function."""

    def __init__(self, base: nn.Module, product: Callable[[Product], Tensor]) -> None:
        super().__init__()
        self.base, self.product, self.met = base, product, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        places = _PLACES.get(func)
        if places is None or len(args) <= places[1] or args[places[1]] is not self.base.weight:
            return func(*args, **(kwargs or {}))
        self.met = True
        return self.product(Product(func, args, kwargs or {}))


def exchanged(base: nn.Module, call: Callable[[], Tensor], product: Callable[[Product], Tensor]) -> tuple[Tensor, bool]:
    """Run a call of the base layer in which another function computes the product with its weight.

    Args:
        base: the layer.
        call: calls it, or another tuner's layer around it.
        product: returns what stands in for the product.

    Returns:
        The call's output, and whether there was a product to exchange.
    """
    with _Exchange(base, product) as exchange:
        y = call()
    return y, exchange.met
