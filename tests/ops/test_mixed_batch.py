"""Tokens with an adapter each, by one product."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import FLOOR, TWICE, error
from torch.utils.flop_counter import FlopCounterMode

from hira.ops import linear_each, reference
from hira.ops.effective_weight import split


def tensors(ranks, dtype=torch.float64, out=9, into=7):
    """Of every other token the last row of A and column of B are those of a LoRA."""
    adapters = [(torch.randn(r, into), torch.randn(out, r) / 10, t % 2) for t, r in enumerate(ranks)]
    x, W0, bias = torch.randn(len(ranks), into), torch.randn(out, into), torch.randn(out)
    return x.to(dtype), W0.to(dtype), adapters, bias.to(dtype)


def one_by_one(x, W0, adapters, bias):
    rows = []
    for t, (A, B, lora_r) in zip(x, adapters, strict=True):
        A, B, lora = split(A.to(W0.dtype), B.to(W0.dtype), lora_r)
        rows.append(F.linear(t, reference.modulated_weight(W0, A, B, *(lora or ())), bias))
    return torch.stack(rows)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ranks", [(3,), (2, 2, 2), (1, 4, 2, 33)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_each_token_has_its_own_adapter(dtype, ranks, bias):
    x, W0, adapters, b = tensors(ranks, dtype)
    b = b if bias else None
    exact = one_by_one(x.double(), W0.double(), adapters, None if b is None else b.double())
    y = linear_each(x, W0, adapters, b)
    assert y.dtype == dtype
    plain = one_by_one(x, W0, adapters, b)
    assert error(y, exact) <= TWICE * max(error(plain, exact), FLOOR[dtype])


def test_autocast():
    x, W0, adapters, bias = tensors((2, 3), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear_each(x, W0, adapters, bias)
    assert y.dtype == torch.bfloat16
    assert error(y, one_by_one(x, W0, adapters, bias)) < 0.02


def test_gradients_are_those_of_the_plain_operations():
    x, W0, adapters, bias = tensors((2, 3))
    adapters = [(A.double().requires_grad_(), B.double().requires_grad_(), lora_r) for A, B, lora_r in adapters]
    x.requires_grad_()
    leaves = [x, *(f for A, B, _ in adapters for f in (A, B))]
    found = torch.autograd.grad(linear_each(x, W0, adapters, bias).sum(), leaves)
    right = torch.autograd.grad(one_by_one(x, W0, adapters, bias).sum(), leaves)
    for f, e in zip(found, right, strict=True):
        torch.testing.assert_close(f, e)


def test_cost_is_that_of_forming_the_weights():
    x, W0, adapters, _ = tensors((2, 4, 3))
    with FlopCounterMode(display=False) as counter:
        linear_each(x, W0, adapters)
    assert counter.get_total_flops() == 2 * 9 * 7 * (3 + 4 + 4)  # LoRA's are products with one vector, not counted
