"""A layer of each kind with an adapter, and what the reference computes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

import hira
from hira.ops import reference

# Sums of at most a few hundred float64 products in another order: 2^-53 times their number, with room for their size.
EXACT = {"rtol": 1e-12, "atol": 1e-12}
IDS = torch.tensor([[3, 0, 3, 8], [1, 3, 5, 0]])


class Case(NamedTuple):
    layer: type[hira.HiraLayer]
    base: Callable[[], nn.Module]
    x: tuple[int, ...]
    r: int = 3


def linear(into: int, out: int, **options) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(into, out, **options)


def conv(dims: int, into: int, out: int, kernel, **options) -> Callable[[], nn.Module]:
    return lambda: (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](into, out, kernel, **options)


LINEAR = {
    "bias": Case(hira.Linear, linear(7, 5), (2, 3, 7)),
    "no bias": Case(hira.Linear, linear(7, 5, bias=False), (4, 7)),
    "rank 1": Case(hira.Linear, linear(63, 5), (4, 63), 1),
    "one output": Case(hira.Linear, linear(63, 1, bias=False), (4, 63)),
    "one input": Case(hira.Linear, linear(1, 4), (4, 1), 2),
    "rank above both": Case(hira.Linear, linear(5, 3), (4, 5), 9),
    "one vector": Case(hira.Linear, linear(7, 5), (7,)),
    "empty batch": Case(hira.Linear, linear(7, 5), (0, 7)),
    "Conv1D": Case(hira.Linear, lambda: Conv1D(5, 7), (2, 3, 7)),
    "Conv1D rank 1": Case(hira.Linear, lambda: Conv1D(1, 63), (2, 63), 1),
}
MODES = ["zeros", "reflect", "replicate", "circular"]
CONV = {
    "1d": Case(hira.Conv1d, conv(1, 4, 6, 3, padding=1), (2, 4, 9)),
    "1d no bias, strided": Case(hira.Conv1d, conv(1, 4, 6, 3, stride=2, bias=False), (2, 4, 9), 1),
    "1d same, even kernel": Case(hira.Conv1d, conv(1, 3, 5, 4, padding="same", dilation=2), (2, 3, 11)),
    "1d valid": Case(hira.Conv1d, conv(1, 3, 5, 4, padding="valid"), (2, 3, 11)),
    "1d unbatched": Case(hira.Conv1d, conv(1, 3, 5, 3, padding=2), (3, 11)),
    "1d depthwise": Case(hira.Conv1d, conv(1, 6, 6, 4, groups=6, padding=3), (2, 6, 9)),
    "2d": Case(hira.Conv2d, conv(2, 4, 6, (3, 1), stride=(2, 1), padding=(1, 2)), (2, 4, 7, 6)),
    "2d point": Case(hira.Conv2d, conv(2, 5, 3, 1), (2, 5, 4, 3), 1),
    "2d grouped": Case(hira.Conv2d, conv(2, 4, 6, 3, groups=2, dilation=2), (2, 4, 7, 6)),
    "2d depthwise": Case(hira.Conv2d, conv(2, 4, 8, 3, groups=4, padding=1), (2, 4, 5, 6)),
    "3d": Case(hira.Conv3d, conv(3, 2, 3, (3, 2, 1), stride=(1, 2, 1), padding=(1, 0, 2)), (2, 2, 4, 5, 3)),
    "3d kernel (1, 1, k)": Case(hira.Conv3d, conv(3, 2, 3, (1, 1, 3)), (2, 2, 2, 3, 4)),
    "3d grouped": Case(hira.Conv3d, conv(3, 4, 2, 2, groups=2, bias=False), (1, 4, 3, 3, 3)),
    **{f"1d {m}": Case(hira.Conv1d, conv(1, 3, 5, 4, padding=3, padding_mode=m), (2, 3, 9)) for m in MODES},
    **{f"2d {m}": Case(hira.Conv2d, conv(2, 2, 4, 3, padding=(2, 1), padding_mode=m), (2, 2, 5, 6)) for m in MODES},
    **{f"3d {m}": Case(hira.Conv3d, conv(3, 2, 2, 2, padding=1, padding_mode=m), (1, 2, 3, 3, 4)) for m in MODES},
    **{
        f"2d same {m}": Case(hira.Conv2d, conv(2, 2, 3, (2, 3), padding="same", padding_mode=m), (2, 2, 5, 6))
        for m in MODES
    },
    "1d depthwise reflect": Case(hira.Conv1d, conv(1, 4, 4, 3, groups=4, padding=1, padding_mode="reflect"), (2, 4, 6)),
}


def adapted(case: Case, dtype: torch.dtype = torch.float64) -> hira.HiraLayer:
    """A layer whose adapter does something."""
    options = {"fan_in_fan_out": True} if case.base().__class__ is Conv1D else {}
    config = hira.HiraConfig(r=case.r, init_weights=False)
    return case.layer(case.base().to(dtype), "default", config, **options).to(dtype)


def factors(layer: hira.HiraLayer) -> tuple[Tensor, Tensor]:
    A, B = (getattr(layer, name)["default"] for name in layer.factor_names)
    return A, B


def modulated(layer: hira.HiraLayer) -> Tensor:
    """The reference's W', as the base layer stores its weight."""
    W0, (A, B) = layer.get_base_layer().weight, factors(layer)
    if isinstance(layer, hira.Embedding):
        return reference.modulated_weight(W0.t(), A, B).t()
    if isinstance(layer.get_base_layer(), Conv1D):
        return reference.modulated_weight(W0.t(), A, B).t()
    return reference.modulated_weight(W0, A, B)


def of_reference(layer: hira.HiraLayer, x: Tensor) -> Tensor:
    return functional_call(layer.get_base_layer(), {"weight": modulated(layer)}, (x,))


def gradients(y: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape).cos()
    return [g.to_dense() for g in torch.autograd.grad(y, tensors, dy)]


WIDE = {
    "linear": Case(hira.Linear, linear(64, 48), (2, 64)),
    "Conv1D": Case(hira.Linear, lambda: Conv1D(48, 64), (2, 64)),
    "embedding": Case(hira.Embedding, lambda: nn.Embedding(64, 48), ()),
    "1d": Case(hira.Conv1d, conv(1, 24, 16, 5), (1, 24, 6)),
    "2d reflect": Case(hira.Conv2d, conv(2, 16, 12, 3, padding=1, padding_mode="reflect"), (1, 16, 2, 2)),
    "3d grouped": Case(hira.Conv3d, conv(3, 8, 16, 3, groups=2), (1, 8, 4, 4, 3)),
}
