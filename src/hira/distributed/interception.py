"""Interception of the product in a base layer's own call, for layers whose weight is gathered by that call.

Hooks on a base layer may gather its weight, redistribute x for a part of it, sum what the processes computed, and free
the weight again. They do so for the layer's own forward. So the layer is called, and the one function in its forward
that takes the weight is intercepted.
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
        """The layer's input, as the function gets it."""
        x: Tensor = self.args[_PLACES[self.function][0]]
        return x

    @property
    def weight(self) -> Tensor:
        """The layer's weight, as the function gets it."""
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


class _Interception(TorchFunctionMode):
    """Passes the products with one layer's weight to another function."""

    def __init__(self, base: nn.Module, product: Callable[[Product], Tensor]) -> None:
        super().__init__()
        self.base, self.product, self.intercepted = base, product, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        places = _PLACES.get(func)
        if places is None or len(args) <= places[1] or args[places[1]] is not self.base.weight:
            return func(*args, **(kwargs or {}))
        self.intercepted = True
        return self.product(Product(func, args, kwargs or {}))


def intercept(base: nn.Module, call: Callable[[], Tensor], product: Callable[[Product], Tensor]) -> tuple[Tensor, bool]:
    """Call the base layer, and let another function compute the product with its weight.

    Args:
        base: the base layer.
        call: calls the base layer, or another tuner's layer around it.
        product: computes the product's replacement.

    Returns:
        The call's output, and whether a product was intercepted.
    """
    with _Interception(base, product) as interception:
        y = call()
    return y, interception.intercepted
