"""The 8-bit product for dA and dB: its error, the shapes it takes, what is kept, and what it leaves exact."""

from __future__ import annotations

import gc
from functools import partial

import numpy as np
import pytest
import torch
from oracle import TWICE, assert_same_bits, error, exact_results, results
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from hira.ops import heuristics, int8, linear, reference

rounded = partial(linear, weight_gradient="int8")

# A code is off by a uniform error of standard deviation 1 / sqrt(12), where the largest entry of a column is 127. Of
# normal numbers, up to some thousand, the largest is below 4.5: relative to an entry, 4.5 / 127 / sqrt(12). G sums
# products of two such, and the errors of its entries do not add up in dA and dB.
NOISE = 2**0.5 * 4.5 / 127 / 12**0.5


def tensors(T=(64,), out=33, into=20, r=3, dtype=torch.float32, transposed=False):
    x = torch.randn(*T, into, dtype=dtype).requires_grad_()
    W0 = torch.randn(into, out, dtype=dtype).t() if transposed else torch.randn(out, into, dtype=dtype)
    return [x, W0, torch.randn(r, into).requires_grad_(), torch.randn(out, r).requires_grad_()]


@pytest.fixture(params=[1, 64, 1 << 22])
def block_size(request, monkeypatch):
    monkeypatch.setattr(heuristics, "CPU_BLOCK_ENTRIES", request.param)
    monkeypatch.setattr(heuristics, "CPU_CHUNK_ENTRIES", request.param)


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"r": 1},
        {"out": 5, "into": 2},
        {"into": 63, "T": (3, 50)},
        {"T": (1,)},
        {"T": (500,), "transposed": True},
        {"out": 5, "into": 63, "transposed": True},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float64},
    ],
    ids=str,
)
def test_only_the_factors_gradients_are_rounded(shape, block_size):
    every = tensors(**shape)
    dy = torch.randn(*every[0].shape[:-1], every[1].shape[0])
    y, dx, dA, dB = results(rounded, every, dy)
    assert_same_bits([y, dx], results(linear, every, dy)[:2])
    _, _, exact_dA, exact_dB = exact_results(reference.linear, every, dy)
    limit = TWICE * NOISE + (0.01 if every[0].dtype == torch.bfloat16 else 0)  # dy in bfloat16
    assert 0 < error(dA, exact_dA) < limit
    assert 0 < error(dB, exact_dB) < limit


def test_noise_falls_with_the_size_of_the_sum():
    """dA sums G over the rows of W0, and its error over independent roundings."""
    x, W0, A, B = tensors((200,), out=400, into=30)
    dy = torch.ones(200, 400) + 0.3 * torch.randn(200, 400)
    _, dA, _ = results(lambda x, A, B: rounded(x, W0, A, B), [x.detach(), A, B], dy)
    _, exact, _ = exact_results(lambda x, A, B: reference.linear(x, W0.double(), A, B), [x.detach(), A, B], dy)
    assert error(dA, exact) < NOISE / 2


@pytest.mark.parametrize("transposed", [False, True])
def test_sums_beyond_32_bits_are_split(monkeypatch, transposed):
    monkeypatch.setattr(int8, "TOKENS_AT_ONCE", 50)
    every = tensors((3, 70), transposed=transposed)
    dy = torch.randn(3, 70, 33)
    split = results(rounded, every, dy)
    monkeypatch.undo()
    for some, whole in zip(split, results(rounded, every, dy), strict=True):
        torch.testing.assert_close(some, whole, rtol=1e-5, atol=1e-5)


def test_the_longest_sum_fits_into_32_bits():
    T = int8.TOKENS_AT_ONCE
    codes = torch.full((T, 2), 127, dtype=torch.int8)
    out, integers = torch.empty(2, 2, dtype=torch.float64), torch.empty(2, 2, dtype=torch.int32)
    assert (int8.product(codes, codes, out, integers) == T * 127**2).all()
    longer = torch.full((T + 7, 2), -127, dtype=torch.int8)
    assert (int8.product(longer, -longer, out, integers) == -(T + 7) * 127**2).all()


def test_columns_of_zeros_and_outliers():
    x, W0, A, B = tensors((40,))
    with torch.no_grad():
        x[:, 0] = 0
        x[:, 1] *= 1e6
        x[:, 2] *= 1e-38  # its reciprocal is not finite
    dy = torch.randn(40, 33)
    dy[:, 0] = 0
    _, _, dA, dB = results(rounded, [x, W0, A, B], dy)
    _, _, exact_dA, exact_dB = exact_results(reference.linear, [x, W0, A, B], dy)
    assert not dA[:, 0].any()
    assert not dB[0].any()
    # a scale for each: the outliers take nothing from the others
    assert error(dA[:, 3:], exact_dA[:, 3:]) < TWICE * NOISE
    assert error(dA[:, 1], exact_dA[:, 1]) < TWICE * NOISE
    assert error(dB, exact_dB) < TWICE * NOISE


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("where", ["x", "dy"])
def test_what_is_not_finite_shows_in_the_gradients(where, value):
    """A gradient scaler skips the step then."""
    x, W0, A, B = (t.detach() for t in tensors())
    dy = torch.randn(64, 33)
    (x if where == "x" else dy)[3, 5] = value
    A.requires_grad_(), B.requires_grad_()
    dA, dB = torch.autograd.grad(rounded(x, W0, A, B), [A, B], dy)
    assert not dA.isfinite().all()
    assert not dB.isfinite().all()


@pytest.mark.parametrize("shape", [{"T": (0,)}, {"out": 1}, {"into": 1}], ids=str)
def test_where_there_are_no_integers_the_gradient_is_exact(shape):
    every = tensors(**shape)
    assert_same_bits(results(rounded, every), results(linear, every))


def test_a_base_that_trains_has_exact_gradients():
    every = tensors()
    every[1].requires_grad_()
    assert_same_bits(results(rounded, every), results(linear, every))


def test_the_same_again():
    every = tensors()
    assert_same_bits(results(rounded, every), results(rounded, every))


# ---- what is kept


def kept(function):
    """The tensors that autograd keeps."""
    seen = {}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda t: t):
        y = function()
    return y, list(seen.values())


def test_x_is_kept_in_a_quarter_of_its_memory():
    x, W0, A, B = tensors()
    _, tensors_kept = kept(lambda: rounded(x, W0, A, B))
    others = [t for t in tensors_kept if not any(t.data_ptr() == other.data_ptr() for other in (W0, A, B))]
    sizes = sorted(t.untyped_storage().nbytes() for t in others)
    assert sizes == [4, 20 * 4, x.numel()]  # zeros in x's place for second derivatives, scales, codes


def test_layers_behind_one_input_share_its_codes():
    x, W0, A, B = tensors()
    _, tensors_kept = kept(lambda: [rounded(x, W0, A, B) for _ in range(3)])
    assert sum(t.dtype == torch.int8 for t in tensors_kept) == 1


def test_codes_are_shared_by_value_alone():
    """A buffer that NumPy or `.data` writes into is one object of one version, whatever it holds."""
    array = np.random.default_rng(0).standard_normal((64, 20), dtype=np.float32)
    x = torch.from_numpy(array)
    first = int8.quantize_shared(x)
    assert all(a is b for a, b in zip(int8.quantize_shared(x), first, strict=True))
    assert all(a is b for a, b in zip(int8.quantize_shared(x.clone()), first, strict=True))
    array *= 2
    second = int8.quantize_shared(x)
    torch.testing.assert_close(second.scale, 2 * first.scale)
    x.data[3, 4] = -x.data[3, 4]
    assert_same_bits(int8.quantize_shared(x), int8.quantize(x))
    assert not torch.equal(int8.quantize_shared(x).codes, second.codes)


@pytest.mark.parametrize("write", ["numpy", "data", "in place", "another of the same shape"])
def test_a_staging_buffer_has_the_gradients_of_what_it_holds(write):
    array = np.random.default_rng(0).standard_normal((64, 20), dtype=np.float32)
    x = torch.from_numpy(array)
    _, W0, A, B = tensors()
    for _ in range(3):
        new = torch.randn(64, 20)
        if write == "numpy":
            array[:] = new.numpy()
        elif write == "data":
            x.data.copy_(new)
        elif write == "in place":
            x.copy_(new)
        else:
            x = new
        found, wanted = (torch.autograd.grad(f(x, W0, A, B).square().sum(), [A, B]) for f in (rounded, linear))
        assert all(error(f, w) < TWICE * NOISE for f, w in zip(found, wanted, strict=True))


def test_no_codes_outlive_those_who_keep_them():
    _, W0, A, B = tensors()
    y = rounded(torch.randn(64, 20), W0, A, B)
    assert int8._last.codes[0]() is not None
    del y
    gc.collect()
    assert int8._last.codes[0]() is None


def test_no_codes_are_made_without_gradients():
    x, W0, A, B = tensors()
    int8._last.codes = None
    with torch.no_grad():
        rounded(x, W0, A, B)
    rounded(x, W0, A.detach(), B.detach())
    assert int8._last.codes is None


# ---- around it


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same(reentrant):
    x, W0, A, B = tensors()
    plain = results(rounded, [x, W0, A, B])
    y = checkpoint(rounded, x, W0, A, B, use_reentrant=reentrant)
    y.sum().backward()
    assert_same_bits([y.detach(), x.grad, A.grad, B.grad], plain)


def test_under_autocast():
    every = tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = results(rounded, every, torch.ones(64, 33))
        exact = results(linear, every, torch.ones(64, 33))
    assert_same_bits(found[:2], exact[:2])
    assert all(error(f, e) < NOISE + 0.01 for f, e in zip(found[2:], exact[2:], strict=True))


def test_compiled():
    torch._dynamo.reset()
    compiled = torch.compile(rounded, fullgraph=True, backend="aot_eager")
    every = tensors()
    assert_same_bits(results(compiled, every), results(rounded, every))
