"""W' is formed in one place: one rounding, blocks that cover it, W0's layout, and the weight of `linear`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from oracle import assert_same_bits, poisoned_memory, results
from torch._subclasses.fake_tensor import FakeTensorMode

from hira.ops import effective_weight, heuristics, linear, modulated_weight, reference, workspace

LOW = [torch.bfloat16, torch.float16]
# The largest relative error of one rounding to nearest.
ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def weights(out=37, into=29, r=3, dtype=torch.float32):
    return torch.randn(out, into).to(dtype), torch.randn(r, into), torch.randn(out, r)


@pytest.fixture(params=[1, 64, 300, 1 << 22])
def block_size(request, monkeypatch):
    """From a row at a time to the whole weight at once."""
    monkeypatch.setattr(heuristics, "CPU_BLOCK_ENTRIES", request.param)
    return request.param


# ---- rounding


@pytest.mark.parametrize("update_only", [False, True])
@pytest.mark.parametrize("stored", [torch.float32, *LOW])
@pytest.mark.parametrize("product", LOW)
def test_low_precision_is_the_float32_result_rounded_once(product, stored, update_only, block_size, monkeypatch):
    monkeypatch.setattr(heuristics, "DITHER", False)
    W0, A, B = weights(dtype=stored)
    exact = effective_weight.form(W0.float(), A, B, 0, torch.float32, update_only=update_only)
    assert torch.equal(effective_weight.form(W0, A, B, 0, product, update_only=update_only), exact.to(product))


@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_error_is_that_of_one_rounding(dtype, block_size):
    r = 3
    W0, A, B = weights(r=r, dtype=dtype)
    exact = reference.modulated_weight(W0.double(), A.double(), B.double())
    # In float32: r products, as many sums, and the product with W0; each term of size |b a| or 1.
    size = W0.double().abs() * (1 + B.double().abs() @ A.double().abs())
    formation = 2 * (r + 2) * 2.0**-24 * size
    # a dither may take the farther neighbour, which is less than a unit away
    rounding = (2 if dtype in LOW else 1) * ROUNDOFF[dtype] * (exact.abs() + formation)
    assert ((modulated_weight(W0, A, B).double() - exact).abs() <= formation + rounding).all()


@pytest.mark.parametrize("dtype", LOW)
def test_updates_below_the_spacing_of_one_are_not_lost(dtype):
    """1 + BA rounds to 1 in the low dtype, yet W' moves where W0's significand is near two."""
    u = ROUNDOFF[dtype]
    W0 = torch.tensor([[1.0 + 6 / 8]], dtype=dtype)
    A, B = torch.tensor([[0.75 * u]]), torch.ones(1, 1)
    assert (1 + B @ A).to(dtype).item() == 1.0
    # 1.75 * 0.75 u = 1.3 u, more than half of the spacing 2 u of numbers between one and two
    assert modulated_weight(W0, A, B).item() == 1.75 + 2 * u


def test_factors_in_low_precision_are_multiplied_in_float32():
    W0, A, B = weights(dtype=torch.bfloat16)
    A, B = A.bfloat16(), B.bfloat16()
    assert torch.equal(modulated_weight(W0, A, B), modulated_weight(W0, A.float(), B.float()))


def test_float64_is_formed_in_float64(block_size):
    W0, A, B = (t.double() for t in weights())
    exact = reference.modulated_weight(W0, A, B)
    # Five roundings of at most 2**-53 on sums of a few terms of order one.
    torch.testing.assert_close(modulated_weight(W0, A, B), exact, rtol=0, atol=1e-13)


def test_autocast_does_not_reach_the_formation():
    W0, A, B = weights()
    plain = modulated_weight(W0, A, B)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(modulated_weight(W0, A, B), plain)


# ---- blocks


@given(
    rows=st.integers(0, 40),
    columns=st.integers(0, 40),
    entries=st.integers(1, 400),
    transposed=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
@example(rows=1, columns=40, entries=3, transposed=True, dtype=torch.float32)
@example(rows=40, columns=1, entries=3, transposed=True, dtype=torch.bfloat16)
@example(rows=7, columns=0, entries=3, transposed=False, dtype=torch.float32)
def test_blocks_cover_the_weight_and_fit_the_workspace(rows, columns, entries, transposed, dtype):
    W0 = torch.randn(columns, rows, dtype=dtype).t() if transposed else torch.randn(rows, columns, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heuristics, "CPU_BLOCK_ENTRIES", entries)
        by_rows, by_columns = list(effective_weight.row_blocks(W0)), list(effective_weight.column_blocks(W0))
        assert [i for s in by_rows for i in range(s.start, s.stop)] == list(range(rows))
        assert [i for s in by_columns for i in range(s.start, s.stop)] == list(range(columns))
        assert all(W0[s].numel() <= max(entries, columns) for s in by_rows)
        assert all(W0[:, s].numel() <= max(entries, rows) for s in by_columns)
        memory = workspace.Workspace(W0, torch.bfloat16)
        for part in [*(W0[s] for s in by_rows), *(W0[:, s] for s in by_columns)]:
            assert memory.exact(part).shape == memory.rounded(part).shape == part.shape


@given(rows=st.integers(0, 12), columns=st.integers(0, 12), r=st.integers(1, 4), entries=st.integers(1, 60))
def test_whole_weight_for_any_shape_and_block(rows, columns, r, entries):
    W0, A, B = (t.double() for t in weights(rows, columns, r))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heuristics, "CPU_BLOCK_ENTRIES", entries)
        formed = modulated_weight(W0, A, B)
    torch.testing.assert_close(formed, reference.modulated_weight(W0, A, B), rtol=0, atol=1e-12)


def test_a_thread_keeps_one_block_for_each_dtype_and_no_more(monkeypatch):
    monkeypatch.setattr(workspace, "scratch", workspace._Scratch())
    monkeypatch.setattr(heuristics, "CPU_BLOCK_ENTRIES", 100)
    for rows in (3, 30, 20):
        W0, A, B = weights(rows, 10, dtype=torch.bfloat16)
        linear(torch.ones(4, 10, dtype=torch.bfloat16), W0, A, B)
    wide, A, B = weights(2, 300)  # a row is more than a block
    modulated_weight(wide, A, B)
    sizes = {dtype: buffer.numel() for dtype, buffer in workspace.scratch.buffers.items()}
    assert sizes == {torch.float32: 100, torch.bfloat16: 100}


def test_memory_first_taken_in_inference_mode_serves_training(monkeypatch):
    monkeypatch.setattr(workspace, "scratch", workspace._Scratch())
    W0, A, B = weights()
    with torch.inference_mode():
        modulated_weight(W0, A, B)
    modulated_weight(W0, A.requires_grad_(), B).sum().backward()
    assert A.grad is not None


def test_threads_do_not_share_memory():
    W0, A, B = weights(300, 200)
    expected = modulated_weight(W0, A, B)
    with ThreadPoolExecutor(4) as threads:
        formed = list(threads.map(lambda k: modulated_weight(W0 * k, A, B), [1, 2, 4, 8] * 8))
    for k, W in zip([1, 2, 4, 8] * 8, formed, strict=True):
        assert torch.equal(W, expected * k)


def test_traced_and_fake_tensors_leave_nothing_behind(monkeypatch):
    monkeypatch.setattr(workspace, "scratch", workspace._Scratch())
    with FakeTensorMode():
        W0, A, B = weights()
        assert modulated_weight(W0, A, B).shape == W0.shape
    assert not workspace.scratch.buffers


def test_split_depends_on_shape_alone():
    W0 = torch.randn(64, 8)
    assert list(effective_weight.row_blocks(W0)) == list(effective_weight.row_blocks(W0.bfloat16()))
    assert list(effective_weight.row_blocks(W0)) == list(effective_weight.row_blocks(torch.randn(8, 64).t()))


def test_blocks_lie_in_memory_as_the_weight_does():
    """So that the product with W0 walks both in order."""
    W0, _, _ = weights()
    memory = workspace.Workspace(W0, torch.bfloat16)
    for tensor in (memory.exact, memory.rounded):
        assert tensor(W0[:5]).stride() == (29, 1)
        assert tensor(W0.t()[:5]).stride() == (1, 5)


@pytest.mark.parametrize("shape", [(37, 29), (1, 29), (37, 1)])
def test_layout_in_memory_is_kept(shape, block_size):
    W0, A, B = weights(*shape)
    transposed = W0.t().contiguous().t()
    assert modulated_weight(W0, A, B).stride() == W0.stride()
    formed = modulated_weight(transposed, A, B)
    assert formed.stride() == transposed.stride()
    # The products lie otherwise in memory, so a sum of r terms may round otherwise.
    torch.testing.assert_close(formed, modulated_weight(W0, A, B), rtol=1e-5, atol=1e-5)


def test_a_strided_weight_is_read_right(block_size):
    storage = torch.randn(74, 58)
    _, A, B = weights()
    W0 = storage[::2, ::2]
    exact = reference.modulated_weight(W0.double(), A.double(), B.double())
    torch.testing.assert_close(modulated_weight(W0, A, B).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_uninitialised_memory_is_never_read(dtype, block_size):
    W0, A, B = (t.requires_grad_() for t in weights(dtype=dtype))
    with poisoned_memory():
        formed = modulated_weight(W0, A, B)
        formed.sum().backward()
    assert all(t.isfinite().all() for t in (formed, W0.grad, A.grad, B.grad))


# ---- the weight of the forward


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("update_only", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *LOW])
def test_form_is_the_weight_that_linear_multiplies_with(dtype, update_only, transposed, block_size):
    W0, A, B = weights(dtype=dtype)
    if transposed:
        W0 = W0.t().contiguous().t()
    formed = effective_weight.form(W0, A, B, 0, dtype, update_only=update_only)
    assert torch.equal(formed, effective_weight.form(W0, A, B, 0, dtype, update_only=update_only))
    # Each row of the identity selects a column of W'; every other term of the sums is zero.
    y = linear(torch.eye(W0.shape[1], dtype=dtype), W0, A, B, update_only=update_only)
    assert torch.equal(y.t(), formed)


def test_form_is_the_weight_of_linear_under_autocast(block_size):
    W0, A, B = weights()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear(torch.eye(W0.shape[1]), W0, A, B)
    assert torch.equal(y.t(), effective_weight.form(W0, A, B, 0, torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_form_does_not_depend_on_the_number_of_tokens(dtype, block_size):
    W0, A, B = weights(dtype=dtype)
    x = torch.eye(W0.shape[1], dtype=dtype)
    rows = torch.cat([linear(row, W0, A, B) for row in x.split(1)])
    assert torch.equal(rows, linear(x, W0, A, B))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_form_is_the_weight_of_linear_at_the_real_block_size(dtype):
    into = 1 << 11
    W0, A, B = weights(heuristics.CPU_BLOCK_ENTRIES // into + 60, into, dtype=dtype)
    assert len(list(effective_weight.row_blocks(W0))) == 2
    columns = [0, 1, 1000, 2047]
    y = linear(torch.eye(into, dtype=dtype)[columns], W0, A, B)
    assert torch.equal(y.t(), effective_weight.form(W0, A, B, 0, dtype)[:, columns])


# ---- gradients


@pytest.mark.parametrize("frozen", [(), (0,), (1,), (2,), (1, 2)])
def test_gradcheck_of_the_whole_weight(frozen, block_size):
    tensors = [t.double().requires_grad_(i not in frozen) for i, t in enumerate(weights(5, 7, 2))]
    assert torch.autograd.gradcheck(modulated_weight, tensors)


def test_gradients_keep_the_dtypes_of_their_tensors():
    W0, A, B = (t.requires_grad_() for t in weights(dtype=torch.bfloat16))
    modulated_weight(W0, A, B).sum().backward()
    assert [t.grad.dtype for t in (W0, A, B)] == [torch.bfloat16, torch.float32, torch.float32]


def test_the_gradient_handed_in_is_not_overwritten():
    W0, A, B = (t.requires_grad_() for t in weights())
    G = torch.randn(W0.shape)
    kept = G.clone()
    modulated_weight(W0, A, B).backward(G)
    assert torch.equal(G, kept)


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_gives_the_same_bits(autocast):
    torch._dynamo.reset()
    compiled = torch.compile(modulated_weight, fullgraph=True, backend="aot_eager")
    every = [t.requires_grad_() for t in weights()]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        got, expected = results(compiled, every), results(modulated_weight, every)
    assert_same_bits(got, expected)


# ---- devices


@pytest.mark.parametrize("function", [linear, lambda x, *weights: modulated_weight(*weights)], ids=["linear", "weight"])
def test_the_meta_device(function):
    x, W0, A, B = (t.to("meta") for t in (torch.randn(5, 29), *weights()))
    assert function(x, W0, A, B).device.type == "meta"


def test_memory_is_on_the_cpu_whatever_the_default_device(monkeypatch):
    monkeypatch.setattr(workspace, "scratch", workspace._Scratch())
    W0, A, B = weights()
    expected = modulated_weight(W0, A, B)
    monkeypatch.setattr(workspace, "scratch", workspace._Scratch())
    with torch.device("meta"):
        memory = workspace.Workspace(W0, torch.bfloat16)
    assert memory.exact(W0).device.type == memory.rounded(W0).device.type == "cpu"
    assert torch.equal(modulated_weight(W0, A, B), expected)
