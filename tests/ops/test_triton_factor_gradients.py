"""The kernel for dA and dB: as exact as autograd, in any layout, and with a block of G at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from interpreted import DEVICE, DTYPES, far_apart, poisoned, randn
from oracle import assert_as_exact, assert_same_bits, exact_results, results

from hira.errors import HiraError
from hira.ops import heuristics, reference
from hira.ops.triton import factor_gradients, tiles


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
def few_rows(monkeypatch):
    """Blocks of 128 rows of a weight with 512 columns, and more of a narrower one."""
    for name in ("CPU_BLOCK_ENTRIES", "DEVICE_BLOCK_ENTRIES"):
        monkeypatch.setattr(heuristics, name, 128 * 512)


# ---- values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"r": 1},
        {"T": 1},
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


@pytest.mark.parametrize("shape", [(1, 1), (70, 75)])
def test_exact_where_every_sum_is(shape):
    """With small integers nothing rounds, whatever the order."""
    T, (out, into), r = 40, shape, 5
    dy, x, W0, A, B = (
        torch.randint(-1, 2, shape).to(DEVICE, torch.bfloat16)
        for shape in ((T, out), (T, into), (out, into), (r, into), (out, r))
    )
    G = dy.double().t() @ x.double() * W0.double()
    dA, dB = factor_gradients(dy, x, W0, A.float(), B.float())
    assert torch.equal(dA.double(), B.double().t() @ G)
    assert torch.equal(dB.double(), G @ A.double().t())


@pytest.mark.parametrize("programs", [1, 4, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_strips_of_columns(programs, dtype, monkeypatch):
    monkeypatch.setattr(tiles, "FACTOR_GRADIENTS_PROGRAMS", programs)
    every = tensors(out=70, into=330, r=70, dtype=dtype)  # two blocks of ranks
    assert_as_exact(factor_gradients(*every), gradients(results, *every), gradients(exact_results, *every))


# ---- memory


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_in_turns(dtype, transposed, few_rows):
    every = tensors(out=300, into=512, dtype=dtype)  # three turns, the last with fewer rows
    every = [t.t().contiguous().t() for t in every] if transposed else every
    assert_as_exact(factor_gradients(*every), gradients(results, *every), gradients(exact_results, *every))


def test_temporaries_are_a_block_and_parts_of_its_size(few_rows, monkeypatch):
    monkeypatch.setattr(tiles, "EXACT_FACTOR_GRADIENTS", tiles.Tile(64, 64, 4, 1))
    monkeypatch.setattr(tiles, "FACTOR_GRADIENTS_PROGRAMS", 16)
    r = 2
    every = tensors(out=512, into=512, r=r)
    with poisoned() as allocations:
        factor_gradients(*every)
    block = 128 * 512
    assert {n for n in allocations.entries if n > 1} == {block, block * r // 64, 8 * 128 * r, 512 * r}


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
