"""Layers and models to merge, and views of their state."""

from __future__ import annotations

import math

import peft
import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import hira
from hira.ops.workspace import formation_dtype

# Sums of a few float64 products in another order.
EXACT = {"rtol": 1e-12, "atol": 1e-12}
NAMES = ("a", "b", "c")
KINDS = {
    "linear": (hira.Linear, lambda: nn.Linear(7, 5, bias=False)),
    "Conv1D": (hira.Linear, lambda: Conv1D(5, 7)),
    "conv 1d": (hira.Conv1d, lambda: nn.Conv1d(4, 6, 3, bias=False)),
    "conv 2d": (hira.Conv2d, lambda: nn.Conv2d(3, 6, (3, 2), bias=False)),
    "depthwise": (hira.Conv1d, lambda: nn.Conv1d(6, 6, 3, groups=6, bias=False)),
    "embedding": (hira.Embedding, lambda: nn.Embedding(9, 5)),
}


def adapted(kind: str, dtype: torch.dtype = torch.float32, r: int = 3) -> hira.HiraLayer:
    """A layer whose adapter does something; its factors are in float32 unless dtype is float64, as in training."""
    cls, base = KINDS[kind]
    options = {"fan_in_fan_out": True} if kind == "Conv1D" else {}
    layer = cls(base().to(dtype), "default", hira.HiraConfig(r=r, init_weights=False), **options)
    for factors in layer._factor_dicts:
        factors.to(formation_dtype(dtype))
    return layer.eval()


def several(ranks: tuple[int, ...] = (1, 3, 2)) -> hira.Linear:
    layer = hira.Linear(nn.Linear(7, 5), "a", hira.HiraConfig(r=ranks[0], init_weights=False))
    for name, r in zip(NAMES[1:], ranks[1:], strict=True):
        layer.update_layer(name, r, hira.HiraConfig(r=r, init_weights=False))
    layer.set_adapter(list(NAMES))
    return layer.double()


def weight_of_forward(layer: hira.HiraLayer) -> Tensor:
    """W' as the forward applies it, in the base weight's shape: the output for an identity, one term for each entry."""
    base = layer.get_base_layer()
    weight, dtype = base.weight, base.weight.dtype
    if isinstance(base, nn.Embedding):
        return layer(torch.arange(len(weight)))
    if isinstance(layer, hira.Linear):
        rows = layer(torch.eye(layer.in_features, dtype=dtype))
        return rows if isinstance(base, Conv1D) else rows.t()
    channels, *kernel = weight.shape[1:]
    inputs = torch.eye(channels * math.prod(kernel), dtype=dtype).view(-1, channels, *kernel)
    inputs = torch.cat([inputs] * base.groups, dim=1)
    return layer(inputs).flatten(1).t().reshape(weight.shape)


class Body(nn.Sequential):
    """A model of three adapted layers; `last` is the one that is merged last."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("first", nn.Linear(6, 6))
        self.add_module("middle", Conv1D(6, 6))
        self.add_module("last", nn.Linear(6, 4))


def model(adapter_names: tuple[str, ...] = ("default",)) -> peft.PeftModel:
    config = peft.HiraConfig(r=2, target_modules=["first", "middle", "last"], init_weights=False, fan_in_fan_out=True)
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        adapted = get_peft_model(Body(), config, adapter_name=adapter_names[0])
    for name in adapter_names[1:]:
        adapted.add_adapter(name, config)
    return adapted.eval()


def state(module: nn.Module) -> dict[str, tuple[int, Tensor]]:
    return {name: (id(value), value.detach().clone()) for name, value in module.named_parameters()}


def assert_same_state(module: nn.Module, before: dict[str, tuple[int, Tensor]]) -> None:
    after = state(module)
    assert after.keys() == before.keys()
    for name, (identity, value) in before.items():
        assert after[name][0] == identity, name
        assert after[name][1].dtype == value.dtype, name
        assert torch.equal(after[name][1].nan_to_num(), value.nan_to_num()), name


def layers(model: nn.Module) -> list[hira.HiraLayer]:
    return [module for module in model.modules() if isinstance(module, hira.HiraLayer)]
