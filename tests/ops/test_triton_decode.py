"""The kernel for few tokens: one adapter for all, one for each, none; W0 read once whatever its layout."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from interpreted import DEVICE, DTYPES, far_apart, poisoned, randn
from oracle import assert_as_exact

from hira.errors import HiraError
from hira.ops import reference
from hira.ops.heuristics import DECODED_TOKENS as MOST_TOKENS
from hira.ops.triton import decode

MODULE = sys.modules[decode.__module__]


def tensors(T=3, out=37, into=63, r=3, k=1, dtype=torch.float32, stored=None, adapter=torch.float32):
    """x, W0, and the factors of k adapters."""
    A, B = randn(k, r, into, dtype=adapter) / r, randn(k, out, r, dtype=adapter) / 10
    return randn(T, into, dtype=dtype), randn(out, into, dtype=stored or dtype), A, B


def owners(T, k, dtype=torch.int64):
    """An adapter for each token: -1, 0, ..., k - 1, and again."""
    return (torch.arange(T) % (k + 1) - 1).to(DEVICE, dtype)


def token_by_token(linear, x, W0, A, B, adapter=None, bias=None):
    """What decode promises, from a linear map with one adapter."""
    rows = []
    for t in range(len(x)):
        a = 0 if adapter is None else int(adapter[t])
        rows.append(F.linear(x[t], W0, bias) if a < 0 else linear(x[t], W0, A[a], B[a], bias))
    return torch.stack(rows) if rows else x.new_zeros(0, len(W0))


def plain(x, W0, A, B, bias):
    """The plain expression, with W' rounded to x's dtype as under autocast."""
    return F.linear(x, (W0 * (1 + (B @ A).to(W0.dtype))).to(x.dtype), bias)


def check(x, W0, A, B, adapter=None, bias=None):
    got = decode(x, W0, A, B, adapter, bias)
    low = None if bias is None else bias.to(x.dtype)
    simple = token_by_token(plain, x, W0.to(x.dtype), A, B, adapter, low)
    double = None if bias is None else bias.double()
    exact = token_by_token(reference.linear, *(t.double() for t in (x, W0, A, B)), adapter, double)
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
    check(*every, None, randn(len(every[1]), dtype=dtype) if bias else None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [{"T": 1, "k": 1}, {"T": 7, "k": 3, "r": 17}, {"T": 4, "k": 2, "r": 70, "into": 130}], ids=str
)
@pytest.mark.parametrize("index", [torch.int64, torch.int32])
def test_an_adapter_for_each_token(shape, index, dtype):
    every = tensors(**shape, dtype=dtype)
    for first in range(2):  # the single token without an adapter, and with one
        adapter = owners(shape["T"] + 1, shape["k"], index)[first:][: shape["T"]]
        check(*every, adapter, randn(37))


def test_sixteen_tokens_of_sixteen_adapters():
    every = tensors(16, 20, 20, 2, 16)
    check(*every, torch.arange(15, -1, -1, device=DEVICE))


@pytest.mark.parametrize("programs", [1, 2, 264])
@pytest.mark.parametrize("mixed", [False, True])
def test_strips_of_columns(programs, mixed, monkeypatch):
    monkeypatch.setattr(MODULE, "PROGRAMS", programs)
    every = tensors(into=330, k=2)
    check(*every, owners(3, 2) if mixed else None)


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("adapter", [torch.float64, torch.bfloat16])
def test_weights_and_adapters_of_other_dtypes_than_x(stored, adapter):
    check(*tensors(dtype=torch.bfloat16, stored=stored, adapter=adapter), None, randn(37, dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_rounding(dtype):
    """Small integers, so that nothing rounds before the end."""
    x, W0, A, B = (torch.randint(-3, 4, s).to(DEVICE, dtype) for s in ((4, 70), (40, 70), (1, 5, 70), (1, 40, 5)))
    exact = reference.linear(x.double(), W0.double(), A[0].double(), B[0].double())
    assert torch.equal(decode(x, W0, A, B), exact.to(dtype))


# ---- tokens are apart from each other


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_broken_adapter_harms_its_own_tokens_only(bad):
    x, W0, A, B = tensors(3, k=2)
    adapter = torch.tensor([0, 1, -1], device=DEVICE)
    expected = decode(x, W0, A, B, adapter)
    A[1, 0, 5] = bad
    got = decode(x, W0, A, B, adapter)
    assert torch.equal(got[::2], expected[::2])
    assert not got[1].isfinite().any()


@pytest.mark.parametrize("number", [-2, 2, 1 << 40])
def test_an_adapter_that_does_not_exist_gives_nan(number):
    x, W0, A, B = tensors(3, k=2)
    got = decode(x, W0, A, B, torch.tensor([0, number, 1], device=DEVICE))
    assert torch.equal(got[::2], decode(x[::2], W0, A, B, torch.tensor([0, 1], device=DEVICE)))
    assert got[1].isnan().all()


def test_no_adapters_at_all():
    x, W0, A, B = tensors(3, k=0)
    torch.testing.assert_close(
        decode(x, W0, A, B, torch.full((3,), -1, device=DEVICE)), F.linear(x, W0), rtol=1e-5, atol=1e-5
    )


# ---- memory


@pytest.mark.parametrize("mixed", [False, True])
def test_layouts(mixed):
    x, W0, A, B = tensors(5, 70, 130, k=3)
    adapter, bias = owners(5, 3) if mixed else None, randn(70)
    expected = decode(x, W0, A, B, adapter, bias)
    turned = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in (x, W0, A, B)]
    spread = [torch.stack([t, t], -1).flatten(-2)[..., ::2] for t in (x, W0, A, B)]
    wide = [None if t is None else torch.stack([t, t], -1)[:, 0] for t in (adapter, bias)]
    assert torch.equal(decode(*turned, adapter, bias), expected)
    assert torch.equal(decode(*spread, *wide), expected)


def test_rows_beyond_the_reach_of_32_bits():
    x, W0, A, B = tensors(out=40, dtype=torch.bfloat16)
    assert torch.equal(decode(x, far_apart(W0), A, B), decode(x, W0, A, B))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mixed", [False, True])
def test_uninitialised_memory_is_never_read(mixed, dtype):
    every = tensors(5, 70, 130, 33, 2, dtype)
    adapter = owners(5, 2) if mixed else None
    expected = decode(*every, adapter)
    with poisoned():
        assert torch.equal(decode(*every, adapter), expected)


@pytest.mark.parametrize("shape", [{"T": 0}, {"out": 0}, {"into": 0}], ids=str)
@pytest.mark.parametrize("mixed", [False, True])
def test_empty(shape, mixed):
    every = tensors(**shape)
    T, out = len(every[0]), len(every[1])
    bias = randn(out)
    got = decode(*every, owners(T, 1) if mixed else None, bias)
    assert got.shape == (T, out)
    if shape == {"into": 0}:
        assert torch.equal(got, bias.expand(T, out))


# ---- as an operator


@pytest.mark.parametrize("T", [0, 3])
def test_operator_keeps_its_contract(T):
    every = tensors(T, k=2, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.hira.triton_decode, (*every, None, None))
    torch.library.opcheck(torch.ops.hira.triton_decode, (*every, owners(T, 2), randn(37)))


def test_compiled():
    every = (*tensors(k=2), owners(3, 2), randn(37))
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: decode(*t) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*every), decode(*every) * 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A": torch.ones(3, 63)}, r"A.* \(3, 63\)"),
        ({"A": torch.ones(2, 3, 63)}, r"A.* \(2, 3, 63\)"),
        ({"x": torch.ones(17, 63)}, r"hira\.ops\.linear"),
        ({"x": torch.ones(3, 62)}, r"\(T, 63\)"),
        ({"x": torch.ones(3, 63).double()}, "x.* torch.float64"),
        ({"bias": torch.ones(36)}, r"bias.* \(36,\)"),
        ({"adapter": torch.zeros(2).long()}, r"adapter.* \(2,\)"),
        ({"adapter": torch.zeros(3)}, "int32"),
        ({"A": torch.ones(0, 3, 63), "B": torch.ones(0, 37, 3)}, "adapter = -1"),
    ],
)
def test_bad_input(change, message):
    arguments = dict(zip(("x", "W0", "A", "B"), tensors(), strict=True)) | change
    with pytest.raises(HiraError, match=message):
        decode(**arguments)
