"""Attention, adapted and plain, and the inputs and options that tests of it go through."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from hira import HiraConfig
from hira.ops import reference

# Sums of at most a few hundred float64 products in another order.
EXACT = {"rtol": 1e-12, "atol": 1e-12}
BATCH, LENGTH, WIDTH, HEADS = 2, 5, 8, 2


class Attending(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, **options)
        for parameter in self.parameters():  # biases too, which start as zeros
            nn.init.normal_(parameter, std=0.5)

    def forward(self, *args, **kwargs):
        return self.attn(*args, **kwargs)


def config(*targets: str, r: int = 3, **options) -> HiraConfig:
    return HiraConfig(r=r, target_modules=list(targets or ["attn"]), **{"init_weights": False, **options})


def adapted(dtype: torch.dtype = torch.float64, targets: tuple[str, ...] = (), **options) -> tuple[Any, Any, Any]:
    """An adapted model, its attention, and the attention as it was."""
    base = Attending(**options).to(dtype)
    plain = copy.deepcopy(base.attn).requires_grad_(False)
    model = get_peft_model(base, config(*targets))
    return model, model.base_model.model.attn, plain


def modulated(layer: Any, names: tuple[str, ...]) -> Tensor:
    deltas = [reference.delta(layer.hira_A[name], layer.hira_B[name]) for name in names]
    return layer.storage.stored * (1 + sum(deltas))


def expected(layer: Any, plain: nn.Module, args: Any, kwargs: Any, names: tuple[str, ...] = ("default",)) -> Any:
    """What attention gives with W' for both weights."""
    weights = {"in_proj_weight": modulated(layer, names), "out_proj.weight": modulated(layer.out_proj, names)}
    return torch.func.functional_call(plain, weights, args, kwargs)


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def self_attention(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    query = x(*shape)
    return query, query, query


def memory(queries: tuple[int, ...], keys: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    key = x(*keys)
    return x(*queries), key, key


def padding() -> Tensor:
    return torch.arange(LENGTH).expand(BATCH, -1) >= torch.tensor([[LENGTH], [3]])


def causal() -> Tensor:
    return torch.ones(LENGTH, LENGTH).triu(1).bool()


FIRST = (BATCH, LENGTH, WIDTH)
OWN = {"batch_first": True}
# options of the attention, its inputs, and the other arguments
CASES: dict[str, tuple[dict[str, Any], Callable[[], tuple[Tensor, ...]], Callable[[], dict[str, Any]]]] = {
    "batch first": (OWN, lambda: self_attention(*FIRST), dict),
    "sequence first": ({}, lambda: self_attention(LENGTH, BATCH, WIDTH), dict),
    "unbatched": ({}, lambda: self_attention(LENGTH, WIDTH), dict),
    "memory": ({}, lambda: memory((4, BATCH, WIDTH), (LENGTH, BATCH, WIDTH)), dict),
    "three inputs": (OWN, lambda: (x(BATCH, 4, WIDTH), x(*FIRST), x(*FIRST)), dict),
    "padding": (OWN, lambda: self_attention(*FIRST), lambda: {"key_padding_mask": padding()}),
    "boolean mask": (OWN, lambda: self_attention(*FIRST), lambda: {"attn_mask": causal()}),
    "float mask": (OWN, lambda: self_attention(*FIRST), lambda: {"attn_mask": torch.randn(LENGTH, LENGTH).double()}),
    "a mask for each head": (
        OWN,
        lambda: self_attention(*FIRST),
        lambda: {"attn_mask": causal().repeat(BATCH * HEADS, 1, 1), "need_weights": False},
    ),
    "causal": (
        OWN,
        lambda: self_attention(*FIRST),
        lambda: {"attn_mask": causal(), "is_causal": True, "need_weights": False},
    ),
    "no weights": (OWN, lambda: self_attention(*FIRST), lambda: {"need_weights": False}),
    "weights of each head": (OWN, lambda: self_attention(*FIRST), lambda: {"average_attn_weights": False}),
    "bias for keys and values": ({"add_bias_kv": True}, lambda: self_attention(LENGTH, BATCH, WIDTH), dict),
    "zero attention": ({"add_zero_attn": True}, lambda: self_attention(LENGTH, BATCH, WIDTH), dict),
    "no bias": ({"bias": False}, lambda: self_attention(LENGTH, BATCH, WIDTH), dict),
    "dropout of attention": ({"dropout": 0.5}, lambda: self_attention(LENGTH, BATCH, WIDTH), dict),
}
every_case = pytest.mark.parametrize("case", CASES)


def gradients(outputs: tuple[Tensor, Tensor | None], tensors: list[Tensor]) -> tuple[Tensor, ...]:
    loss = sum((y * torch.linspace(-1, 1, y.numel()).double().view_as(y).cos()).sum() for y in outputs if y is not None)
    return torch.autograd.grad(loss, tensors)


def assert_same(found: tuple[Any, ...], wanted: tuple[Any, ...]) -> None:
    assert len(found) == len(wanted)
    for mine, other in zip(found, wanted, strict=True):
        assert (mine is None) == (other is None)
        if other is not None:
            torch.testing.assert_close(mine, other, **EXACT)
