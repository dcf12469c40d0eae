"""Adapted convolutions in one, two and three dimensions, with groups, strides and dilations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from oracle import Products, assert_as_exact, assert_same_bits, exact_results, poisoned_memory, results
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from hira.ops import conv, effective_weight, heuristics, linear, reference
from hira.ops.conv import form_kernel

PLAIN = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
GEOMETRIES = {
    "1d": dict(kernel=(3,)),
    "1d kernel 1": dict(kernel=(1,)),
    "1d strided": dict(kernel=(3,), stride=2, padding=2, dilation=2),
    "1d groups": dict(kernel=(3,), groups=2, padding=1),
    "1d depthwise": dict(kernel=(4,), groups=4, padding=3),
    "2d": dict(kernel=(3, 2), padding=1),
    "2d pointwise": dict(kernel=(1, 1)),
    "2d uneven": dict(kernel=(3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2)),
    "2d depthwise": dict(kernel=(3, 3), groups=4, padding=1),
    "2d depthwise, two kernels a channel": dict(kernel=(3, 3), groups=4, out=8),
    "3d": dict(kernel=(2, 2, 2)),
    "3d kernel (1, 1, k)": dict(kernel=(1, 1, 3), padding=(0, 0, 1)),
    "3d strided groups": dict(kernel=(2, 1, 3), stride=(1, 2, 1), groups=2),
}
# The smallest value of each.
KNOBS = {"kernel": 1, "stride": 1, "padding": 0, "dilation": 1}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=GEOMETRIES, ids=str)
def geometry(request):
    return {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, **GEOMETRIES[request.param]}


def options(geometry):
    dims = len(geometry["kernel"])
    each = {k: geometry.get(k, 0 if k == "padding" else 1) for k in ("stride", "padding", "dilation")}
    return {k: (v,) * dims if isinstance(v, int) else v for k, v in each.items()} | {
        "groups": geometry.get("groups", 1)
    }


def tensors(geometry, *, r=2, batch=(2,), size=5, channels=4, dtype=torch.float64, adapter=None, bias=True):
    """x, W0, A, B and bias, each requiring a gradient."""
    kernel, groups, out = geometry["kernel"], geometry.get("groups", 1), geometry.get("out", channels)
    adapter = adapter or dtype
    W0 = torch.randn(out, channels // groups, *kernel, dtype=dtype)
    A = torch.randn(r, channels // groups, *kernel, dtype=adapter) / r
    B = torch.randn(out, r, *[1] * len(kernel), dtype=adapter) / 10
    x = torch.randn(*batch, channels, *[size] * len(kernel), dtype=dtype)
    every = [x, W0, A, B, torch.randn(out, dtype=dtype) if bias else None]
    return [t if t is None else t.requires_grad_() for t in every]


def ours(geometry, **more):
    return lambda x, W0, A, B, bias=None: conv(x, W0, A, B, bias, **options(geometry), **more)


def oracle(geometry):
    return lambda x, W0, A, B, bias=None: reference.conv(x, W0, A, B, bias, **options(geometry))


def plain(geometry):
    """The plain expression: the modulation rounded to W0's dtype, then the convolution there."""

    def function(x, W0, A, B, bias=None):
        weight = W0 * (1 + torch.einsum("ok,k...->o...", B.flatten(1), A).to(W0.dtype))
        return PLAIN[W0.dim() - 2](x, weight, bias, **options(geometry))

    return function


# ---- values and gradients


@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(geometry, bias):
    every = tensors(geometry, r=1 if bias else 2, batch=(1,), size=4, bias=bias)
    assert torch.autograd.gradcheck(ours(geometry), every, fast_mode=True)


@pytest.mark.parametrize("name", ["1d strided", "2d depthwise", "3d kernel (1, 1, k)"])
def test_gradcheck_entry_by_entry(name):
    every = tensors(GEOMETRIES[name], batch=(1,), size=3)
    assert torch.autograd.gradcheck(ours(GEOMETRIES[name]), every)


def test_equals_the_reference(geometry):
    every = tensors(geometry)
    dy = torch.randn(oracle(geometry)(*every).shape, dtype=torch.float64)
    for got, exact in zip(results(ours(geometry), every, dy), results(oracle(geometry), every, dy), strict=True):
        # Sums of at most a few hundred products of order one.
        torch.testing.assert_close(got, exact, rtol=0, atol=1e-11)


def test_unbatched(geometry):
    every = tensors(geometry, batch=())
    batched = [every[0].detach().unsqueeze(0).requires_grad_(), *every[1:]]
    y, dx, *gradients = results(ours(geometry), every)
    y1, dx1, *gradients1 = results(ours(geometry), batched)
    assert_same_bits([y, dx, *gradients], [y1.squeeze(0), dx1.squeeze(0), *gradients1])


@pytest.mark.parametrize("name", ["1d", "2d depthwise", "3d"])
def test_update_only_is_the_rest_of_the_whole(name):
    geometry = GEOMETRIES[name]
    x, W0, A, B, bias = tensors(geometry)
    base = PLAIN[W0.dim() - 2](x, W0, **options(geometry))
    rest = ours(geometry, update_only=True)
    torch.testing.assert_close(ours(geometry)(x, W0, A, B, bias), base + rest(x, W0, A, B, bias), rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(rest, [x, W0, A, B, bias], fast_mode=True)


def test_empty_batch(geometry):
    y, dx, *gradients = results(ours(geometry), tensors(geometry, batch=(0,), dtype=torch.float32))
    assert y.shape[0] == dx.shape[0] == 0
    assert all(not g.any() for g in gradients)


@given(
    dims=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 4]),
    r=st.integers(1, 3),
    data=st.data(),
)
def test_any_geometry(dims, groups, r, data):
    each = {k: data.draw(st.tuples(*[st.integers(low, 3)] * dims)) for k, low in KNOBS.items()}
    geometry = {**each, "groups": groups}
    span = [d * (k - 1) + 1 - 2 * p for d, k, p in zip(each["dilation"], each["kernel"], each["padding"], strict=True)]
    assume(max(span) <= 5)
    every = tensors(geometry, r=r)
    for got, exact in zip(results(ours(geometry), every), results(oracle(geometry), every), strict=True):
        torch.testing.assert_close(got, exact, rtol=0, atol=1e-11)


@pytest.mark.parametrize("adapter", ["same", torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_as_exact_as_the_plain_expression(geometry, dtype, adapter):
    # Sixteen channels, so that the smallest gradient has entries enough for a root mean square.
    every = tensors(geometry, size=9, channels=16, dtype=dtype, adapter=dtype if adapter == "same" else adapter)
    dy = torch.randn(oracle(geometry)(*[t.detach().float() for t in every]).shape)
    fast, slow = results(ours(geometry), every, dy), results(plain(geometry), every, dy)
    assert_as_exact(fast, slow, exact_results(oracle(geometry), every, dy))


@pytest.mark.parametrize("name", ["2d", "2d depthwise"])
def test_channels_last(name):
    geometry = GEOMETRIES[name]
    every = tensors(geometry)
    x, W0 = (t.detach().to(memory_format=torch.channels_last).requires_grad_() for t in every[:2])
    for got, expected in zip(results(ours(geometry), [x, W0, *every[2:]]), results(ours(geometry), every), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("wanted", range(5))
def test_gradients_only_for_what_needs_them(wanted):
    every = tensors(GEOMETRIES["2d"])
    (expected,) = torch.autograd.grad(oracle(GEOMETRIES["2d"])(*every).sum(), every[wanted])
    alone = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(every)]
    ours(GEOMETRIES["2d"])(*alone).sum().backward()
    assert [t.grad is not None for t in alone] == [i == wanted for i in range(5)]
    torch.testing.assert_close(alone[wanted].grad, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["1d", "2d depthwise"])
def test_uninitialised_memory_is_never_read(name, monkeypatch):
    monkeypatch.setattr(heuristics, "CPU_BLOCK_ENTRIES", 10)
    every = tensors(GEOMETRIES[name], dtype=torch.float32)
    with poisoned_memory():
        assert all(t.isfinite().all() for t in results(ours(GEOMETRIES[name]), every))


def test_inputs_and_incoming_gradients_are_not_overwritten(geometry):
    every = tensors(geometry, dtype=torch.float32)
    dy = torch.randn(ours(geometry)(*every).shape)
    kept = [t.detach().clone() for t in [*every, dy]]
    first = results(ours(geometry), every, dy)
    assert_same_bits([*every, dy], kept)
    assert_same_bits(results(ours(geometry), every, dy), first)


# ---- the weight of the forward


@pytest.mark.parametrize("entries", [1, 20, 1 << 22])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_formed_kernel_is_the_one_convolved_with(geometry, dtype, entries, monkeypatch):
    """A plain convolution with the formed kernel gives, bit for bit, what the operator gives."""
    monkeypatch.setattr(heuristics, "CPU_BLOCK_ENTRIES", entries)
    monkeypatch.setattr(heuristics, "DITHER", False)
    x, W0, A, B, bias = (t.detach() for t in tensors(geometry, dtype=dtype, adapter=torch.float32))
    kernel = form_kernel(W0, A, B, 0, dtype)
    expected = PLAIN[W0.dim() - 2](x, kernel, bias, **options(geometry))
    assert torch.equal(conv(x, W0, A, B, bias, **options(geometry)), expected)
    exact = effective_weight.form(W0.float().flatten(1), A.flatten(1), B.flatten(1), 0, torch.float32)
    assert torch.equal(kernel, exact.to(dtype).view(W0.shape))


# ---- dtypes of the products


@pytest.mark.parametrize("name", ["1d", "2d depthwise", "3d"])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_dtypes(name, base, autocast):
    every = tensors(GEOMETRIES[name], dtype=base, adapter=torch.float32)
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None), Products() as products:
        y, *gradients = results(ours(GEOMETRIES[name]), every)
    dtype = autocast or base
    assert y.dtype == dtype
    assert [g.dtype for g in gradients] == [t.dtype for t in every]
    convolutions = [(kind, dtypes) for kind, dtypes, _ in products.seen if kind.startswith("convolution")]
    assert convolutions == [("convolution", frozenset({dtype})), ("convolution_backward", frozenset({dtype}))]


def test_float64_is_left_alone_by_autocast():
    every = tensors(GEOMETRIES["2d"])
    without = results(ours(GEOMETRIES["2d"]), every)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(results(ours(GEOMETRIES["2d"]), every), without)


# ---- checkpointing and compile


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    function = ours(GEOMETRIES["2d"])
    every = tensors(GEOMETRIES["2d"], dtype=torch.float32)
    direct = results(function, every)
    y = checkpoint(function, *every, use_reentrant=reentrant)
    y.sum().backward()
    assert_same_bits([y.detach(), *(t.grad for t in every)], direct)


@pytest.mark.parametrize("name", ["1d strided", "2d depthwise", "3d"])
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_once_for_all_lengths(name, autocast):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    geometry = GEOMETRIES[name]
    compiled = torch.compile(ours(geometry), fullgraph=True, dynamic=True, backend=counter)
    for length in (6, 9, 12):
        every = tensors(geometry, size=length, dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            assert_same_bits(results(compiled, every), results(ours(geometry), every))
    assert counter.frame_count == 1


def test_autocast_still_holds_after_a_traced_convolution():
    """In one graph: the products that follow run in the dtype of autocast, as they do in eager code."""
    torch._dynamo.reset()
    geometry = GEOMETRIES["1d groups"]
    x, W0, A, B, bias = tensors(geometry, dtype=torch.float32)

    def function(x, W0, A, B, bias):
        y = ours(geometry)(x, W0, A, B, bias)
        kept = torch.is_autocast_enabled("cpu")
        return y, kept, linear(y.transpose(1, 2).float(), W0.flatten(1)[:, :4], A[:, :, 0].repeat(1, 2), B[:, :, 0])

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, kept, z = compiled(x, W0, A, B, bias)
        expected = function(x, W0, A, B, bias)
    assert kept
    assert y.dtype == z.dtype == torch.bfloat16
    assert_same_bits([y, z], expected[::2])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opaque_operator_keeps_its_contract(dtype, layout):
    _, W0, A, B, _ = (t.detach() for t in tensors(GEOMETRIES["2d"], dtype=torch.float32))
    for base in (W0.to(memory_format=layout), W0.transpose(0, 1).contiguous().transpose(0, 1)):
        for update_only in (False, True):
            torch.library.opcheck(torch.ops.hira.form_kernel, (base, A, B, 0, dtype, update_only))


def test_compiled_by_inductor():
    geometry = GEOMETRIES["1d groups"]
    torch._dynamo.reset()
    compiled = torch.compile(ours(geometry), fullgraph=True, dynamic=True)
    every = tensors(geometry, size=9, dtype=torch.float32)
    # Sums of at most 24 terms of order one, in another order.
    torch.testing.assert_close(results(compiled, every), results(ours(geometry), every), rtol=1e-5, atol=1e-5)
    # Without gradients: Inductor fixes the length of any convolution, the plain one too, that it differentiates.
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for length in (6, 9, 12):
            every = tensors(geometry, size=length, dtype=torch.float32)
            torch.testing.assert_close(compiled(*every), ours(geometry)(*every), rtol=1e-5, atol=1e-5)
