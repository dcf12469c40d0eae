"""HiRA with LoRA, W' = W0 * (1 + BA) + L2 L1: numbers, gradients and cost, on factors that are joined."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_exact, assert_same_bits, exact_results, results
from torch.utils.flop_counter import FlopCounterMode

from hira.ops import conv, effective_weight, embedding, heuristics, linear, modulated_weight, reference

R, LORA_R = 3, 2
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
BLOCKS = [1, 20, 1 << 22]  # entries: rows one by one, a few at a time, all at once


def adapter(rows, columns, dtype):
    """A over L1 and B beside L2."""
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    A, B = torch.randn(R + LORA_R, *columns, dtype=exact), torch.randn(rows, R + LORA_R, dtype=exact) / 4
    return A.requires_grad_(), B.requires_grad_()


def plain_weight(W0, A, B):
    """The reference's W' in float32 at least, rounded once."""
    exact = torch.promote_types(W0.dtype, torch.float32)
    W0_, A, B = W0.to(exact), A.to(exact), B.to(exact)
    return reference.modulated_weight(W0_, A[:R], B[:, :R], A[R:], B[:, R:]).to(W0.dtype)


def assert_right(found, plain, exact):
    """As exact as the plain expression; in float64, where that is the exact one, equal up to the order of sums."""
    if found[0].dtype == torch.float64:
        for a, b in zip(found, exact, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    else:
        assert_as_exact(found, plain, exact)


def plain_linear(x, W0, A, B, bias):
    return F.linear(x, plain_weight(W0, A, B), bias)


@pytest.fixture(params=BLOCKS, autouse=True)
def blocks(request, monkeypatch):
    monkeypatch.setattr(heuristics, "CPU_BLOCK_ENTRIES", request.param)
    monkeypatch.setattr(heuristics, "DITHER", False)


@every_dtype
@pytest.mark.parametrize("trains", [False, True], ids=["frozen W0", "W0 trains"])
def test_linear(dtype, trains):
    x, W0, bias = (torch.randn(shape).to(dtype).requires_grad_() for shape in ((2, 5, 7), (9, 7), (9,)))
    W0.requires_grad_(trains)
    every = [x, W0, *adapter(9, (7,), dtype), bias]
    dy = torch.randn(2, 5, 9)
    assert_right(
        results(partial(linear, lora_r=LORA_R), every, dy),
        results(plain_linear, every, dy),
        exact_results(plain_linear, every, dy),
    )


@every_dtype
def test_update_alone(dtype):
    x, W0 = torch.randn(4, 7).to(dtype), torch.randn(9, 7).to(dtype)
    A, B = adapter(9, (7,), dtype)
    every = [x.requires_grad_(), W0, A, B]

    def update(x, W0, A, B):
        exact = torch.promote_types(W0.dtype, torch.float32)
        delta = W0.to(exact) * (B[:, :R] @ A[:R]).to(exact) + (B[:, R:] @ A[R:]).to(exact)
        return F.linear(x, delta.to(x.dtype))

    found = results(partial(linear, lora_r=LORA_R, update_only=True), every)
    assert_right(found, results(update, every), exact_results(update, every))


@pytest.mark.parametrize("groups", [1, 2])
@every_dtype
def test_conv(dtype, groups):
    x, W0, bias = (torch.randn(shape).to(dtype).requires_grad_() for shape in ((2, 4, 6, 5), (6, 4 // groups, 3, 2), 6))
    W0.requires_grad_(False)
    A, B = adapter(6, (4 // groups, 3, 2), dtype)
    every = [x, W0, A, B.detach().view(6, -1, 1, 1).requires_grad_(), bias]
    geometry = {"stride": (1, 2), "padding": (2, 1), "dilation": (1, 1), "groups": groups}

    def plain(x, W0, A, B, bias):
        weight = plain_weight(W0.flatten(1), A.flatten(1), B.flatten(1)).view(W0.shape)
        return F.conv2d(x, weight, bias, **geometry)

    found = results(partial(conv, lora_r=LORA_R, **geometry), every)
    assert_right(found, results(plain, every), exact_results(plain, every))


@every_dtype
def test_embedding(dtype):
    ids = torch.tensor([[3, 0, 3], [1, 5, 0]])
    table = torch.randn(9, 5).to(dtype).requires_grad_()
    A, B = adapter(5, (9,), dtype)
    dy = torch.randn(2, 3, 5)

    def plain(table, A, B):
        return F.embedding(ids, plain_weight(table.t(), A, B).t())

    found = results(lambda *t: embedding(ids, *t, LORA_R), [table, A, B], dy)
    assert_right(found, results(plain, [table, A, B], dy), exact_results(plain, [table, A, B], dy))


def test_dropout_of_an_embedding_drops_the_whole_update():
    ids, table = torch.tensor([3, 0, 3]), torch.randn(9, 5)
    A, B = (factor.detach() for factor in adapter(5, (9,), torch.float32))
    keep = torch.tensor([0.0, 2.0, 1.0])
    delta = F.embedding(ids, plain_weight(table.t(), A, B).t() - table)
    y = embedding(ids, table, A, B, LORA_R, keep=keep)
    torch.testing.assert_close(y, F.embedding(ids, table) + keep[:, None] * delta)


@every_dtype
def test_the_weight_is_one_however_it_is_asked_for(dtype, monkeypatch):
    """Formed for a product, whole, by plain operations for a tracer, or on transposed memory: the same bits."""
    monkeypatch.setattr(heuristics, "DITHER", True)
    W0 = torch.randn(40, 24).to(dtype)
    A, B = (factor.detach() for factor in adapter(40, (24,), dtype))
    formed = modulated_weight(W0, A, B, LORA_R)
    by_identity = linear(torch.eye(24, dtype=dtype), W0, A, B, lora_r=LORA_R).t()
    assert_same_bits([by_identity], [formed])
    assert_same_bits([effective_weight.plain_weight(W0, A, B, LORA_R, dtype)], [formed])


def test_without_lora_it_is_hira_bit_for_bit():
    x, W0 = torch.randn(4, 24), torch.randn(40, 24)
    A, B = (factor.detach() for factor in adapter(40, (24,), torch.float32))
    assert_same_bits([linear(x, W0, A, B)], [linear(x, W0, A, B, lora_r=0)])
    zeros = linear(x, W0, torch.cat([A, 0 * A[:1]]), torch.cat([B, 0 * B[:, :1]], 1), lora_r=1)
    assert_same_bits([zeros], [linear(x, W0, A, B)])


def test_int8_gradient_is_near():
    x, W0, dy = torch.randn(256, 64), torch.randn(48, 64), torch.randn(256, 48)
    every = [x.requires_grad_(), W0, *adapter(48, (64,), torch.float32)]
    exact = results(partial(linear, lora_r=LORA_R), every, dy)
    rounded = results(partial(linear, lora_r=LORA_R, weight_gradient="int8"), every, dy)
    for a, b in zip(rounded, exact, strict=True):
        assert (a - b).norm() <= 0.03 * b.norm()


def test_transforms_and_compilation_see_the_same_numbers():
    x, W0 = torch.randn(4, 7, dtype=torch.float64), torch.randn(9, 7, dtype=torch.float64)
    A, B = adapter(9, (7,), torch.float64)
    function = partial(linear, lora_r=LORA_R)
    wanted = results(function, [x, W0, A, B])
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same_bits(results(compiled, [x, W0, A, B]), wanted)
    rows = torch.func.vmap(function, in_dims=(0, None, None, None))(x, W0, A.detach(), B.detach())
    torch.testing.assert_close(rows, wanted[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cost(dtype):
    """One dense product in each pass: at most 6 T m n + 10 (r + lora_r + 1) m n operations in a step."""
    T, m, n = 48, 40, 56
    x, W0 = torch.randn(T, n).to(dtype).requires_grad_(), torch.randn(m, n).to(dtype)
    A, B = adapter(m, (n,), dtype)
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        linear(x, W0, A, B, lora_r=LORA_R).sum().backward()
    assert counter.get_total_flops() <= 6 * T * m * n + 10 * (R + LORA_R + 1) * m * n
