"""A HiRA layer of each kind, and what it is to compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import hira
from hira import HiraConfig
from hira.ops import reference

# Sums of at most a few hundred float64 products in another order.
EXACT = {"rtol": 1e-12, "atol": 1e-12}
IDS = torch.tensor([[3, 0, 3, 8], [1, 3, 5, 0]])


def linear_input() -> Tensor:
    return torch.randn(3, 7, dtype=torch.float64)


KINDS: dict[str, tuple[type[hira.HiraLayer], Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (hira.Linear, lambda: nn.Linear(7, 5), linear_input),
    "Conv1D": (hira.Linear, lambda: Conv1D(5, 7), linear_input),
    "embedding": (hira.Embedding, lambda: nn.Embedding(9, 5), lambda: IDS),
    "convolution": (
        hira.Conv2d,
        lambda: nn.Conv2d(3, 4, (2, 3), padding=1, padding_mode="reflect"),
        lambda: torch.randn(2, 3, 5, 6, dtype=torch.float64),
    ),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def config(r: int = 3, **options) -> HiraConfig:
    return HiraConfig(r=r, init_weights=False, **options)


def adapted(kind: str = "linear", base: nn.Module | None = None, **options) -> Any:
    cls, make, _ = KINDS[kind]
    layout = {"fan_in_fan_out": True} if kind == "Conv1D" else {}
    return cls(make() if base is None else base, "default", config(**options), **layout).double()


def delta(layer: Any, *names: str) -> Tensor:
    """The sum of BA over adapters, as the base layer stores its weight."""
    total = 0
    for name in names or layer.active_adapters:
        A, B = (factors[name] for factors in layer._factor_dicts)
        BA = reference.delta(A.double(), B.double()).to(layer.get_base_layer().weight.dtype)
        total = total + (BA.t() if isinstance(layer, hira.Embedding) or getattr(layer, "fan_in_fan_out", False) else BA)
    return total


def with_weight(layer: Any, weight: Tensor, x: Tensor, *, bias: bool = True) -> Tensor:
    """The base layer's output with another weight."""
    base = layer.get_base_layer()
    tensors = {"weight": weight}
    if getattr(base, "bias", None) is not None and not bias:
        tensors["bias"] = torch.zeros_like(base.bias)
    return torch.func.functional_call(base, tensors, (x,))


def expected(layer: Any, x: Tensor, *names: str) -> Tensor:
    return with_weight(layer, layer.get_base_layer().weight * (1 + delta(layer, *names)), x)


def update(layer: Any, x: Tensor, *names: str) -> Tensor:
    return with_weight(layer, layer.get_base_layer().weight * delta(layer, *names), x, bias=False)


def gradients(y: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape).cos()
    return list(torch.autograd.grad(y, tensors, dy, allow_unused=True))


def assert_alike(layer: nn.Module, found: Tensor, wanted: Tensor, x: Tensor | None = None) -> None:
    """Equal outputs, and equal gradients of the parameters that require them, and of x."""
    torch.testing.assert_close(found, wanted, **EXACT)
    tensors = [p for p in layer.parameters() if p.requires_grad]
    tensors += [x] if x is not None and x.requires_grad else []
    for mine, other in zip(gradients(found, tensors), gradients(wanted, tensors), strict=True):
        if other is None:
            assert mine is None
        else:
            torch.testing.assert_close(mine, other, **EXACT)


def random_input(kind: str) -> Tensor:
    x = KINDS[kind][2]()
    return x.requires_grad_() if x.is_floating_point() else x
