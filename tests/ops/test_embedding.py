"""Adapted embeddings: the rows of W', each option of `F.embedding`, and gradients for the rows that were looked up."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_as_exact, assert_same_bits, exact_results, results
from torch.utils.checkpoint import checkpoint

from hira.ops import effective_weight, embedding, heuristics, reference
from hira.ops.dither import noise_of, round_into

# Row 3 occurs three times, row 7 twice; rows 2 and 9 never.
IDS = torch.tensor([[3, 7, 3], [0, 7, 5], [8, 3, 1]])
# Sums of a few dozen products of order one, in float64.
EXACT = {"rtol": 0.0, "atol": 1e-13}


def tensors(rows=10, dim=6, r=3, dtype=torch.float64, adapter=None):
    """W0, A and B, each requiring a gradient."""
    adapter = adapter or dtype
    W0 = torch.randn(rows, dim, dtype=dtype)
    A, B = torch.randn(r, rows, dtype=adapter) / r, torch.randn(dim, r, dtype=adapter) / 10
    return [t.requires_grad_() for t in (W0, A, B)]


def ours(ids=IDS, **options):
    return lambda W0, A, B: embedding(ids, W0, A, B, **options)


def dense(ids=IDS, **options):
    """`F.embedding` on the whole table W'."""
    return lambda W0, A, B: F.embedding(ids, W0 * (1 + (B @ A).T), **options)


def assert_close(some, others, **tolerance):
    for a, b in zip(some, others, strict=True):
        torch.testing.assert_close(a, b, **(tolerance or EXACT))


# ---- values and gradients


@pytest.mark.parametrize("r", [1, 3])
def test_equals_the_reference(r):
    every = tensors(r=r)
    dy = torch.randn(3, 3, 6, dtype=torch.float64)
    expected = results(lambda *t: reference.embedding(IDS, *t), every, dy)
    assert_close(results(ours(), every, dy), expected)


@pytest.mark.parametrize(
    "options", [{}, {"update_only": True}, {"max_norm": 100.0}, {"keep": torch.ones(3, 3)}], ids=str
)
@pytest.mark.parametrize("r", [1, 3])
def test_gradcheck(options, r):
    assert torch.autograd.gradcheck(ours(**options), tensors(r=r))


@given(
    shape=st.lists(st.integers(0, 4), max_size=3),
    rows=st.integers(1, 12),
    dim=st.integers(1, 5),
    r=st.integers(1, 4),
    data=st.data(),
)
def test_any_shape_of_ids(shape, rows, dim, r, data):
    count = int(torch.Size(shape).numel())
    ids = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), min_size=count, max_size=count)), dtype=torch.long)
    ids = ids.reshape(shape)
    every = tensors(rows, dim, r)
    assert_close(results(ours(ids), every), results(dense(ids), every), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_dtype_and_layout_of_ids(dtype):
    every = tensors()
    assert_same_bits(results(ours(IDS.t().to(dtype)), every), results(ours(IDS.t().contiguous()), every))


@pytest.mark.parametrize("adapter", ["same", torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_exact_as_the_plain_expression(dtype, adapter):
    every = tensors(40, 32, 4, dtype, dtype if adapter == "same" else adapter)
    ids = torch.randint(40, (4, 20))
    dy = torch.randn(4, 20, 32)

    def plain(W0, A, B):
        return F.embedding(ids, W0 * (1 + (B @ A).T.to(W0.dtype)))

    exact = exact_results(lambda *t: reference.embedding(ids, *t), every, dy)
    assert_as_exact(results(ours(ids), every, dy), results(plain, every, dy), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_are_rounded_once(dtype, monkeypatch):
    """To nearest, or with the dither of the whole table."""
    W0, A, B = (t.detach() for t in tensors(dtype=dtype, adapter=torch.float32))
    exact = embedding(IDS, W0.float(), A, B)
    noise, whole = noise_of(W0), effective_weight.form(W0.float(), B.t(), A.t(), 0, torch.float32)
    table = round_into(torch.empty_like(W0), whole, *noise)
    assert torch.equal(embedding(IDS, W0, A, B), table[IDS])
    monkeypatch.setattr(heuristics, "DITHER", False)
    assert torch.equal(embedding(IDS, W0, A, B), exact.to(dtype))


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_changes_nothing(base):
    """As with `F.embedding`, whose output has the dtype of the table."""
    every = tensors(dtype=base, adapter=torch.float32)
    without = results(ours(), every)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ours()(*every)
    assert y.dtype == base
    y.sum().backward()
    assert_same_bits([y.detach(), *(t.grad for t in every)], without)


def test_update_only_is_the_rest_of_the_whole():
    W0, A, B = tensors()
    whole = F.embedding(IDS, W0) + embedding(IDS, W0, A, B, update_only=True)
    torch.testing.assert_close(embedding(IDS, W0, A, B), whole, **EXACT)


def test_only_rows_that_were_looked_up_get_a_gradient():
    W0, A, B = tensors()
    embedding(IDS, W0, A, B).sum().backward()
    seen = torch.zeros(10, dtype=torch.bool).index_fill(0, IDS.flatten(), True)
    assert torch.equal(W0.grad.ne(0).any(1), seen)
    assert torch.equal(A.grad.ne(0).any(0), seen)


@pytest.mark.parametrize("wanted", range(3))
def test_gradients_only_for_what_needs_them(wanted):
    every = tensors()
    (expected,) = torch.autograd.grad(dense()(*every).sum(), every[wanted])
    alone = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(every)]
    ours()(*alone).sum().backward()
    assert [t.grad is not None for t in alone] == [i == wanted for i in range(3)]
    torch.testing.assert_close(alone[wanted].grad, expected, **EXACT)


# ---- the options of F.embedding


@pytest.mark.parametrize("padding_idx", [3, 5, 2])
def test_padding_row_gives_no_gradient(padding_idx):
    every = tensors()
    dy = torch.randn(3, 3, 6, dtype=torch.float64)
    got = results(ours(padding_idx=padding_idx), every, dy)
    assert_close(got, results(dense(padding_idx=padding_idx), every, dy))
    assert not got[1][padding_idx].any()
    assert not got[2][:, padding_idx].any()


def test_padding_row_stops_gradients_that_are_not_finite():
    dy = torch.ones(3, 3, 6, dtype=torch.float64)
    dy[IDS == 3] = float("inf")
    assert all(t.isfinite().all() for t in results(ours(padding_idx=3), tensors(), dy))


@pytest.mark.parametrize("padding_idx", [None, 3])
def test_scale_grad_by_freq(padding_idx):
    """In float64 the factor 1/3 is right to all its digits."""
    every = tensors()
    dy = torch.randn(3, 3, 6, dtype=torch.float64)
    options = {"scale_grad_by_freq": True, "padding_idx": padding_idx}
    assert_close(results(ours(**options), every, dy), results(dense(**options), every, dy))
    unscaled = results(ours(padding_idx=padding_idx), every, dy)
    assert padding_idx == 3 or not torch.allclose(unscaled[1], results(ours(**options), every, dy)[1])


@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
@pytest.mark.parametrize("update_only", [False, True])
def test_max_norm_bounds_the_rows_and_not_the_table(norm_type, update_only):
    W0, A, B = tensors()
    kept = W0.detach().clone()
    y = embedding(IDS, W0, A, B, max_norm=1.5, norm_type=norm_type, update_only=update_only)
    free = embedding(IDS, W0, A, B, update_only=update_only)
    norms = free.norm(norm_type, -1, keepdim=True)
    # The 1e-7 is that of F.embedding.
    torch.testing.assert_close(y, torch.where(norms > 1.5, free * (1.5 / (norms + 1e-7)), free), **EXACT)
    assert torch.equal(W0, kept)
    assert update_only or (norms > 1.5).any()


def test_max_norm_is_that_of_torch_on_the_table():
    """`F.embedding` rescales the rows of W' in place, and its gradient is that of the rescaled row alone."""
    W0, A, B = tensors()
    table = (W0 * (1 + (B @ A).T)).detach().requires_grad_()
    expected = F.embedding(IDS, table.clone().detach(), max_norm=1.5)
    torch.testing.assert_close(embedding(IDS, W0, A, B, max_norm=1.5), expected, **EXACT)


def test_scale_of_max_norm_is_a_constant_in_backward():
    every = tensors()
    free = dense()(*every).detach()
    norms = free.norm(2, -1, keepdim=True)
    scale = torch.where(norms > 1.5, 1.5 / (norms + 1e-7), torch.ones_like(norms))
    assert_close(results(ours(max_norm=1.5), every), results(lambda *t: dense()(*t) * scale, every))


@pytest.mark.parametrize("keep_dtype", [torch.float64, torch.float32])
def test_keep_acts_on_the_update_of_each_id(keep_dtype):
    keep = torch.tensor([[0.0, 2.0, 1.0], [0.5, 0.0, 2.0], [1.0, 0.0, 2.0]], dtype=keep_dtype)
    every = tensors()

    def expected(W0, A, B):
        return F.embedding(IDS, W0) * (1 + keep.double().unsqueeze(-1) * F.embedding(IDS, (B @ A).T))

    assert_close(results(ours(keep=keep), every), results(expected, every))
    base, update = F.embedding(IDS, every[0]), ours(keep=keep, update_only=True)(*every)
    torch.testing.assert_close(base + update, expected(*every), **EXACT)


@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}, {"scale_grad_by_freq": True}, {"max_norm": 1.5}], ids=str)
def test_sparse_gradients_are_the_dense_ones(options):
    _, *expected = results(ours(**options), tensors_of(0))
    _, dW0, dA, dB = results(ours(sparse=True, **options), tensors_of(0))
    assert dW0.is_sparse
    assert dA.is_sparse
    assert dA.shape == (3, 10)
    assert not dB.is_sparse
    assert_close([dW0.to_dense(), dA.to_dense(), dB], expected)


def tensors_of(seed):
    torch.manual_seed(seed)
    return tensors()


# ---- checkpointing and compile


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    every = tensors(dtype=torch.float32)
    direct = results(ours(), every)
    y = checkpoint(ours(), *every, use_reentrant=reentrant)
    y.sum().backward()
    assert_same_bits([y.detach(), *(t.grad for t in every)], direct)


@pytest.mark.parametrize(
    "options", [{}, {"padding_idx": 3, "scale_grad_by_freq": True}, {"max_norm": 1.5}, {"update_only": True}], ids=str
)
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_once_for_all_lengths(options, autocast):
    torch._dynamo.reset()

    def function(ids, W0, A, B):
        return embedding(ids, W0, A, B, **options)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (4, 9, 17):
            ids, every = torch.randint(10, (2, length)), tensors(dtype=torch.float32)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                got = results(lambda *t, ids=ids: compiled(ids, *t), every)
                expected = results(ours(ids, **options), every)
            # AOTAutograd may reorder sums of up to 34 terms.
            assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_compiled_by_inductor():
    torch._dynamo.reset()
    compiled = torch.compile(embedding, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (4, 9, 17):
            ids, every = torch.randint(10, (2, length)), tensors(dtype=torch.float32)
            got = results(lambda *t, ids=ids: compiled(ids, *t, padding_idx=3), every)
            assert_close(got, results(ours(ids, padding_idx=3), every), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}, {"scale_grad_by_freq": True}, {"max_norm": 1.0}], ids=str)
def test_rows_may_be_changed_in_place(options):
    """As models do that put images in the places of tokens."""
    every = tensors()
    once = results(lambda *t: embedding(IDS, *t, **options) * 2, every)
    assert_same_bits(results(lambda *t: embedding(IDS, *t, **options).mul_(2), every), once)
