"""The kernel for few tokens: no update lost, each token by itself, W0 read once whatever its layout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from interpreted import DEVICE, DTYPES, far_apart, poisoned, randn
from oracle import assert_as_exact, error

from hira.errors import HiraError
from hira.ops import reference
from hira.ops.heuristics import DECODED_TOKENS as MOST_TOKENS
from hira.ops.triton import decode, tiles


def tensors(T=3, out=37, into=63, r=3, dtype=torch.float32, stored=None, adapter=torch.float32):
    """x, W0, A and B."""
    A, B = randn(r, into, dtype=adapter) / r, randn(out, r, dtype=adapter) / 10
    return randn(T, into, dtype=dtype), randn(out, into, dtype=stored or dtype), A, B


def plain(x, W0, A, B, bias):
    """The plain expression, with W' rounded to x's dtype as under autocast."""
    return F.linear(x, (W0 * (1 + (B @ A).to(W0.dtype))).to(x.dtype), bias)


def check(x, W0, A, B, bias=None):
    got = decode(x, W0, A, B, bias)
    simple = plain(x, W0.to(x.dtype), A, B, None if bias is None else bias.to(x.dtype))
    exact = reference.linear(*(None if t is None else t.double() for t in (x, W0, A, B, bias)))
    assert_as_exact([got], [simple], [exact])


# ---- values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"T": 1, "r": 1},
        {"T": MOST_TOKENS, "r": 33},
        {"T": 2, "out": 1, "into": 1},
        {"out": 70, "into": 300, "r": 16},  # two blocks of rows, five strips
        {"T": 8, "r": 130},  # a loop over the rank
    ],
    ids=str,
)
def test_one_adapter(shape, bias, dtype):
    every = tensors(**shape, dtype=dtype)
    check(*every, randn(len(every[1]), dtype=dtype) if bias else None)


@pytest.mark.parametrize("programs", [1, 2, 264])
@pytest.mark.parametrize("dtype", DTYPES)
def test_strips_of_columns(programs, dtype, monkeypatch):
    monkeypatch.setattr(tiles, "DECODE_PROGRAMS", programs)
    check(*tensors(into=330, dtype=dtype))


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("adapter", [torch.float64, torch.bfloat16])
def test_weights_and_adapters_of_other_dtypes_than_x(stored, adapter):
    check(*tensors(dtype=torch.bfloat16, stored=stored, adapter=adapter), randn(37, dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_rounding(dtype):
    """Small integers, so that nothing rounds before the end."""
    x, W0, A, B = (torch.randint(-3, 4, s).to(DEVICE, dtype) for s in ((4, 70), (40, 70), (5, 70), (40, 5)))
    exact = reference.linear(x.double(), W0.double(), A.double(), B.double())
    assert torch.equal(decode(x, W0, A, B), exact.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_update_is_lost(dtype):
    """Of updates far below the spacing of W0's numbers, seen where what W0 itself gives cancels out."""
    x, W0, A, B = tensors(dtype=dtype)
    x, W0 = torch.cat([x, -x], 1), torch.cat([W0, W0], 1)
    A, B = torch.cat([A, 0 * A], 1), B / 2**9
    update = x.double() @ (W0.double() * (B.double() @ A.double())).t()
    assert error(decode(x, W0, A, B), update) < 2.0**-8


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_broken_token_harms_itself_only(bad):
    x, W0, A, B = tensors(3)
    expected = decode(x, W0, A, B)
    x[1, 5] = bad
    got = decode(x, W0, A, B)
    assert torch.equal(got[::2], expected[::2])
    assert not got[1].isfinite().any()


# ---- memory


def test_layouts():
    x, W0, A, B = tensors(5, 70, 130)
    bias = randn(70)
    expected = decode(x, W0, A, B, bias)
    turned = [t.t().contiguous().t() for t in (x, W0, A, B)]
    spread = [torch.stack([t, t], -1).flatten(-2)[..., ::2] for t in (x, W0, A, B)]
    assert torch.equal(decode(*turned, bias), expected)
    assert torch.equal(decode(*spread, torch.stack([bias, bias], -1)[:, 0]), expected)


def test_rows_beyond_the_reach_of_32_bits():
    x, W0, A, B = tensors(out=40, dtype=torch.bfloat16)
    assert torch.equal(decode(x, far_apart(W0), A, B), decode(x, W0, A, B))


@pytest.mark.parametrize("dtype", DTYPES)
def test_uninitialised_memory_is_never_read(dtype):
    every = tensors(5, 70, 130, 33, dtype)
    expected = decode(*every)
    with poisoned():
        assert torch.equal(decode(*every), expected)


@pytest.mark.parametrize("shape", [{"T": 0}, {"out": 0}, {"into": 0}], ids=str)
def test_empty(shape):
    every = tensors(**shape)
    T, out = len(every[0]), len(every[1])
    bias = randn(out)
    got = decode(*every, bias)
    assert got.shape == (T, out)
    if shape == {"into": 0}:
        assert torch.equal(got, bias.expand(T, out))


# ---- as an operator


@pytest.mark.parametrize("T", [0, 3])
def test_operator_keeps_its_contract(T):
    every = tensors(T, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.hira.triton_decode, (*every, None))
    torch.library.opcheck(torch.ops.hira.triton_decode, (*every, randn(37)))


def test_compiled():
    every = (*tensors(), randn(37))
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: decode(*t) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*every), decode(*every) * 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A": torch.ones(3, 62)}, r"A.* \(3, 62\)"),
        ({"A": torch.ones(2, 3, 63)}, r"A.* \(2, 3, 63\)"),
        ({"x": torch.ones(17, 63)}, r"hira\.ops\.linear"),
        ({"x": torch.ones(3, 62)}, r"\(T, 63\)"),
        ({"x": torch.ones(3, 63).double()}, "x.* torch.float64"),
        ({"bias": torch.ones(36)}, r"bias.* \(36,\)"),
        ({"A": torch.ones(0, 63), "B": torch.ones(37, 0)}, r"\br\b"),
    ],
)
def test_bad_input(change, message):
    arguments = dict(zip(("x", "W0", "A", "B"), tensors(), strict=True)) | change
    with pytest.raises(HiraError, match=message):
        decode(**arguments)
