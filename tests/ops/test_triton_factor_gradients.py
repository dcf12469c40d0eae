"""The kernel for dA and dB: as exact as autograd, in any layout, and without a tensor of the weight's size."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from interpreted import DEVICE, DTYPES, far_apart, poisoned, randn
from oracle import assert_as_exact, assert_same_bits, exact_results, results

from hira.errors import HiraError
from hira.ops import reference
from hira.ops.triton import factor_gradients

MODULE = sys.modules[factor_gradients.__module__]


def tensors(T=17, out=37, into=63, r=3, dtype=torch.float32, stored=None, adapter=torch.float32):
    """dy, x, W0, A and B."""
    A, B = randn(r, into, dtype=adapter) / r, randn(out, r, dtype=adapter) / 10
    return randn(T, out, dtype=dtype), randn(T, into, dtype=dtype), randn(out, into, dtype=stored or dtype), A, B


def plain(x, W0, A, B):
    """The plain expression, with W' rounded to x's dtype as under autocast."""
    return F.linear(x, (W0 * (1 + (B @ A).to(W0.dtype))).to(x.dtype))


def gradients(function, dy, x, W0, A, B):
    A, B = A.detach().requires_grad_(), B.detach().requires_grad_()
    return function(plain if function is results else reference.linear, [x, W0, A, B], dy)[1:]


@pytest.fixture
def few_parts(monkeypatch):
    """Memory for the parts of one row of tiles at a time."""
    monkeypatch.setattr(MODULE, "BUFFER_ENTRIES", 1)


# ---- values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"r": 1},
        {"T": 1},
        {"out": 1, "into": 1},
        {"T": 70, "r": 33},
        {"out": 130, "into": 150, "r": 16},  # four tiles, or nine
        {"out": 600, "into": 70, "T": 5},  # more rows of tiles than are taken side by side
    ],
    ids=str,
)
def test_as_exact_as_autograd(shape, dtype):
    every = tensors(**shape, dtype=dtype)
    assert_as_exact(factor_gradients(*every), gradients(results, *every), gradients(exact_results, *every))


@pytest.mark.parametrize("adapter", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", DTYPES)
def test_weights_and_adapters_of_other_dtypes_than_x(stored, adapter):
    every = tensors(dtype=torch.bfloat16, stored=stored, adapter=adapter)
    wide = [*every[:3], *(t.float() for t in every[3:])]
    got = factor_gradients(*every)
    assert [g.dtype for g in got] == [adapter] * 2
    exact = gradients(exact_results, *every)
    expected = [g.to(adapter) for g in gradients(results, *wide)]
    assert_as_exact(got, expected, exact)


def test_exact_where_every_sum_is():
    """With small integers nothing rounds, whatever the order."""
    T, out, into, r = 40, 70, 75, 5
    dy, x, W0, A, B = (
        torch.randint(-2, 3, shape).to(DEVICE, torch.bfloat16)
        for shape in ((T, out), (T, into), (out, into), (r, into), (out, r))
    )
    G = dy.double().t() @ x.double() * W0.double()
    dA, dB = factor_gradients(dy, x, W0, A.float(), B.float())
    assert torch.equal(dA.double(), B.double().t() @ G)
    assert torch.equal(dB.double(), G @ A.double().t())


# ---- memory


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_in_turns(dtype, few_parts, monkeypatch):
    every = tensors(out=300, into=70, dtype=dtype)
    turns = factor_gradients(*every)
    assert_as_exact(turns, gradients(results, *every), gradients(exact_results, *every))
    monkeypatch.undo()
    whole = factor_gradients(*every)
    assert torch.equal(turns[1], whole[1])  # dB's sums are the same, over tiles of a row


def test_nothing_has_the_weights_size(few_parts):
    every = tensors(out=512, into=512, r=2)
    with poisoned() as allocations:
        factor_gradients(*every)
    # parts of dA for one row of tiles, of dB for its 64 rows and 8 tiles
    assert max(allocations.entries) == max(2 * 512, 64 * 8 * 2)


def test_the_parts_take_bounded_memory(monkeypatch):
    monkeypatch.setattr(MODULE, "BUFFER_ENTRIES", 6000)
    every = tensors(out=512, into=512, r=2)
    with poisoned() as allocations:
        factor_gradients(*every)
    large = [n for n in allocations.entries if n > 2 * 512]
    assert len(large) == 2  # one for dA's, one for dB's
    assert 3000 < sum(large) <= 6000


def test_layouts():
    every = tensors(65, 65, 130, r=17)
    expected = factor_gradients(*every)
    assert_same_bits(factor_gradients(*(t.t().contiguous().t() for t in every)), expected)
    assert_same_bits(factor_gradients(*(torch.stack([t, t], -1).flatten(1)[:, ::2] for t in every)), expected)


@pytest.mark.parametrize("far", range(3))
def test_rows_beyond_the_reach_of_32_bits(far):
    every = list(tensors(40, 40, 63, dtype=torch.bfloat16))
    expected = factor_gradients(*every)
    every[far] = far_apart(every[far])
    assert_same_bits(factor_gradients(*every), expected)


@pytest.mark.parametrize("shape", [{"T": 0}, {"out": 0}, {"into": 0}], ids=str)
def test_empty(shape):
    every = tensors(**shape)
    with poisoned():
        dA, dB = factor_gradients(*every)
    assert (dA.shape, dB.shape) == (every[3].shape, every[4].shape)
    assert not dA.any() and not dB.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_uninitialised_memory_is_never_read(dtype):
    every = tensors(out=130, into=150, r=33, dtype=dtype)
    expected = factor_gradients(*every)
    with poisoned():
        assert_same_bits(factor_gradients(*every), expected)


# ---- as an operator


@pytest.mark.parametrize("T", [0, 5])
def test_operator_keeps_its_contract(T):
    every = tensors(T, dtype=torch.bfloat16, adapter=torch.float32)
    torch.library.opcheck(torch.ops.hira.triton_factor_gradients, every)
    torch.library.opcheck(torch.ops.hira.triton_factor_gradients, tuple(t.t().contiguous().t() for t in every))


def test_compiled():
    every = tensors()
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: factor_gradients(*t), fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(*every), factor_gradients(*every))


@pytest.mark.parametrize(
    ("position", "tensor", "message"),
    [
        (0, torch.ones(17, 38), r"dy.* \(17, 38\)"),
        (1, torch.ones(16, 63), r"x.* \(16, 63\)"),
        (1, torch.ones(17, 63).bfloat16(), "dtype"),
        (2, torch.ones(37, 63).double(), "W0.* torch.float64"),
        (3, torch.ones(3, 62), r"A.* \(3, 62\)"),
    ],
)
def test_bad_input(position, tensor, message):
    every = list(tensors())
    every[position] = tensor
    with pytest.raises(HiraError, match=message):
        factor_gradients(*every)
