"""The adapted linear map: values and gradients, dtypes, and life under compile, autocast and checkpointing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from oracle import Products, assert_as_exact, assert_same_bits, exact_results, poisoned_memory, results
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from hira.ops import heuristics, int8, linear, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=[64, 1 << 22], ids=["many blocks", "one block"])
def block_size(request, monkeypatch):
    monkeypatch.setattr(heuristics, "CPU_BLOCK_ENTRIES", request.param)
    return request.param


def tensors(out=6, into=7, r=3, T=(5,), dtype=torch.float64, adapter=None, bias=True, transposed=False):
    """x, W0, A, B and bias, each requiring a gradient; the update is small beside 1, as in training."""
    adapter = adapter or dtype
    x = torch.randn(*T, into, dtype=dtype)
    W0 = torch.randn(into, out, dtype=dtype).t() if transposed else torch.randn(out, into, dtype=dtype)
    A, B = torch.randn(r, into, dtype=adapter) / r, torch.randn(out, r, dtype=adapter) / 10
    every = [x, W0, A, B] + ([torch.randn(out, dtype=dtype)] if bias else [None])
    return [t if t is None else t.requires_grad_() for t in every]


def plain(x, W0, A, B, bias=None):
    """The plain expression: the modulation rounded to W0's dtype, then the product there."""
    return F.linear(x, W0 * (1 + (B @ A).to(W0.dtype)), bias)


# ---- values and gradients


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"r": 1},
        {"into": 63},
        {"out": 1},
        {"into": 1},
        {"r": 9},
        {"T": ()},
        {"T": (0,)},
        {"T": (2, 0)},
        {"T": (2, 3)},
        {"transposed": True},
        {"transposed": True, "into": 63, "r": 1},
    ],
    ids=str,
)
def test_gradcheck(shape, bias, block_size):
    if shape.get("into") == 63:
        shape = {**shape, "out": 3, "T": (2,)}
    assert torch.autograd.gradcheck(linear, tensors(**shape, bias=bias))


def test_gradcheck_of_the_update_alone(block_size):
    assert torch.autograd.gradcheck(lambda *t: linear(*t, update_only=True), tensors())


def test_gradcheck_through_strided_inputs(block_size):
    x, W0, A, B, bias = tensors(T=(4, 6), transposed=False)
    assert torch.autograd.gradcheck(
        lambda x, W0, A, B, bias: linear(x.transpose(0, 1)[::2], W0[::2], A[:, :], B[::2], bias[::2]),
        [x, W0, A, B, bias],
    )


def test_gradcheck_with_factors_that_lie_transposed(block_size):
    x, W0, A, B, bias = tensors()
    assert torch.autograd.gradcheck(
        lambda A, B: linear(x, W0, A.t(), B.t(), bias),
        [A.t().detach().clone().requires_grad_(), B.t().detach().clone().requires_grad_()],
    )


def test_gradcheck_through_dequantize(block_size):
    x, W0, A, B, bias = tensors()
    packed = (W0.detach() * 8).round().to(torch.int8)
    assert torch.autograd.gradcheck(
        lambda x, A, B, bias: linear(x, packed, A, B, bias, dequantize=lambda q: q.double() / 8), [x, A, B, bias]
    )


@pytest.mark.parametrize("bias", [True, False])
def test_update_only_is_the_rest_of_the_whole(bias, block_size):
    x, W0, A, B, b = tensors(bias=bias)
    whole = F.linear(x, W0) + linear(x, W0, A, B, b, update_only=True)
    torch.testing.assert_close(linear(x, W0, A, B, b), whole, rtol=0, atol=1e-13)


@pytest.mark.parametrize("adapter", ["same", torch.float32])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [3, 20, 40])  # y is computed as a transpose for 20
def test_as_exact_as_the_plain_expression(T, dtype, transposed, adapter, block_size):
    adapter = dtype if adapter == "same" else adapter
    every = tensors(33, 63, 4, (2, T // 2), dtype, adapter, transposed=transposed)
    dy = torch.randn(2, T // 2, 33)
    assert_as_exact(results(linear, every, dy), results(plain, every, dy), exact_results(reference.linear, every, dy))


def test_several_adapters_are_one_of_the_summed_rank(block_size):
    x, W0, A, B, bias = tensors()
    _, _, A2, B2, _ = tensors(r=2)
    joined = linear(x, W0, torch.cat([A, A2]), torch.cat([B, B2], 1), bias)
    torch.testing.assert_close(joined, F.linear(x, W0 * (1 + B @ A + B2 @ A2), bias), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_uninitialised_memory_is_never_read(dtype, block_size):
    every = tensors(dtype=dtype, adapter=torch.float32)
    with poisoned_memory():
        assert all(t.isfinite().all() for t in results(linear, every))


@pytest.mark.parametrize("T", [(0,), (3, 0)])
def test_empty_batches_give_zero_gradients(T, block_size):
    every = tensors(T=T, dtype=torch.float32)
    y, *gradients = results(linear, every)
    assert y.shape == (*T, 6)
    assert all(not g.any() for g in gradients)


def test_the_same_call_twice_gives_the_same_bits(block_size):
    every = tensors(33, 63, 4, (20,), torch.float32)
    dy = torch.randn(20, 33)
    assert_same_bits(results(linear, every, dy), results(linear, every, dy))


@pytest.mark.parametrize("wanted", range(5))
def test_gradients_only_for_what_needs_them(wanted, block_size):
    every = tensors(dtype=torch.float64)
    expected = torch.autograd.grad(reference.linear(*every).sum(), every[wanted])[0]
    alone = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(every)]
    linear(*alone).sum().backward()
    assert [t.grad is not None for t in alone] == [i == wanted for i in range(5)]
    torch.testing.assert_close(alone[wanted].grad, expected, rtol=0, atol=1e-12)


def test_inputs_and_incoming_gradients_are_not_overwritten(block_size):
    every = tensors(dtype=torch.float32)
    dy = torch.randn(5, 6)
    kept = [t.detach().clone() for t in [*every, dy]]
    results(linear, every, dy)
    assert_same_bits([*every, dy], kept)


# ---- dtypes of the products


def big_products(every):
    """The results, and the dtypes of the products over tokens, forward and backward, in their order."""
    with Products() as products:
        got = results(linear, every)
    # x (200, 24) takes part in y and G, and dy (200, 20) in dx and G; no argument of a formation is that large
    return got, [seen for _, seen, largest in products.seen if largest >= 200 * 20]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_run_in_the_dtype_of_the_base(dtype, bias):
    every = tensors(20, 24, 2, (200,), dtype, torch.float32, bias=bias)
    (y, *gradients), products = big_products(every)
    assert y.dtype == dtype
    assert [g.dtype for g in gradients] == [t.dtype for t in every if t is not None]
    # y, dx, G for the factors, G for W0
    assert products == [frozenset({dtype})] * 4


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_products_run_in_the_dtype_of_autocast(base, low, bias):
    every = tensors(20, 24, 2, (200,), base, torch.float32, bias=bias)
    with torch.autocast("cpu", dtype=low):
        (y, *gradients), products = big_products(every)
        assert y.dtype == F.linear(*every[:2]).dtype == low
    assert [g.dtype for g in gradients] == [t.dtype for t in every if t is not None]
    assert products == [frozenset({low})] * 4


def test_float64_is_left_alone_by_autocast():
    every = tensors()
    without = results(linear, every)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = results(linear, every)
    assert_same_bits(within, without)


def test_autocast_that_ended_before_backward():
    """As in a training loop: autocast around forward and loss, none around backward."""
    every = tensors(20, 24, 2, (30,), torch.float32)
    dy = torch.randn(30, 20).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = results(linear, every, dy)
        y = linear(*every)
    outside = [y.detach(), *torch.autograd.grad(y, every, dy)]
    assert_same_bits(outside, within)


def test_autocast_is_as_exact_as_the_plain_expression(block_size):
    every = tensors(33, 63, 4, (20,), torch.float32)
    dy = torch.randn(20, 33)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast, slow = results(linear, every, dy), results(plain, every, dy)
    assert_as_exact(fast, slow, exact_results(reference.linear, every, dy))


def test_dequantized_products_run_in_the_dtype_of_x():
    x, W0, A, B, _ = tensors(20, 24, 2, (200,), torch.bfloat16, torch.float32)
    packed = (W0.detach().float() * 8).round().to(torch.int8)
    with Products() as products:
        y = linear(x, packed, A, B, dequantize=lambda q: q.to(torch.bfloat16) / 8)
        y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert [s for _, s, n in products.seen if n >= 200 * 20] == [frozenset({torch.bfloat16})] * 3
    assert torch.equal(y, linear(x, packed.to(torch.bfloat16) / 8, A, B))


# ---- checkpointing and compile


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant, autocast, block_size):
    every = tensors(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        direct = results(linear, every)
        again = results_of_backward(lambda *t: checkpoint(linear, *t, use_reentrant=reentrant), every)
    assert_same_bits(again, direct)


def results_of_backward(function, every):
    """`results` by `.backward()`, because reentrant checkpointing does not serve `torch.autograd.grad`."""
    leaves = [t.detach().requires_grad_() for t in every]
    y = function(*leaves)
    y.backward(torch.ones_like(y))
    return [y.detach(), *(t.grad for t in leaves)]


@pytest.mark.parametrize(
    "options", [{}, {"update_only": True}, {"dequantize": lambda w: w * 2}], ids=["plain", "update only", "dequantized"]
)
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_once_for_all_lengths(options, autocast, block_size):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *t: linear(*t, **options), fullgraph=True, dynamic=True, backend=counter)
    for length in (4, 9, 17):
        every = tensors(T=(2, length), dtype=torch.float32, adapter=torch.float32)
        if "dequantize" in options:  # the base is frozen there
            every[1].requires_grad_(False)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            eager = results(lambda *t: linear(*t, **options), every)
            assert_same_bits(results(compiled, every), eager)
    assert counter.frame_count == 1


def test_products_are_opaque_to_the_compiler(monkeypatch):
    """Three operators in the graphs, however many blocks there are."""
    monkeypatch.setattr(heuristics, "CPU_BLOCK_ENTRIES", 14)
    torch._dynamo.reset()
    called = []

    def compiler(graph, _):
        called.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    x, W0, A, B, _ = tensors(dtype=torch.float32)
    W0.requires_grad_(False)
    compiled = torch.compile(linear, fullgraph=True, backend=aot_autograd(fw_compiler=compiler))
    compiled(x, W0, A, B).sum().backward()
    names = ["linear_forward", "linear_input_gradient", "linear_factor_gradients"]
    assert [name for name in called if name.startswith("hira")] == [f"hira.{name}.default" for name in names]
    assert not [name for name in called if "mm" in name]


def test_compiled_by_inductor():
    torch._dynamo.reset()
    compiled = torch.compile(linear, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (4, 9, 17):
            every = tensors(T=(2, length), dtype=torch.float32)
            # Sums of at most 34 terms, in another order.
            torch.testing.assert_close(results(compiled, every), results(linear, every), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["plain", "transposed"])
def test_opaque_operators_keep_their_contracts(dtype, layout, block_size):
    x, W0, A, B, bias = tensors(dtype=dtype, adapter=torch.float32)
    x, W0, A, B, bias = (t.detach() for t in (x, W0, A, B, bias))
    if layout == "transposed":
        W0, A, B, x = (t.t().contiguous().t() for t in (W0, A, B, x))
    dy = torch.randn(5, 6).to(dtype)
    for update_only in (False, True):
        torch.library.opcheck(torch.ops.hira.linear_forward, (x, W0, A, B, bias, 0, update_only, True))
        torch.library.opcheck(torch.ops.hira.linear_forward, (x, W0, A, B, None, 0, update_only, False))
        torch.library.opcheck(torch.ops.hira.linear_input_gradient, (dy, W0, A, B, 0, update_only))
    torch.library.opcheck(torch.ops.hira.linear_factor_gradients, (dy, x, W0, A, B, 0, None))
    codes, scale = int8.quantize(x)
    torch.library.opcheck(torch.ops.hira.linear_factor_gradients, (dy, codes, W0, A, B, 0, scale))
