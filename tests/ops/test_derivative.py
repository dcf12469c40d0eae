"""Second and third derivatives, and the transforms of torch.func, against plain expressions of the dense weight."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from hira.ops import conv, embedding, heuristics, linear, linear_each, modulated_weight, reference

IDS = torch.tensor([[1, 2, 4], [2, 0, 2]])
CONV = {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "groups": 2}
PACKED = torch.randint(-9, 9, (3, 4))
KEEP = torch.tensor([[0.0, 2.0, 2.0], [0.0, 2.0, 0.0]])


def embedded(W0, A, B, **options):
    return F.embedding(IDS, W0 * (1 + (B @ A).t()), **options)


def dropped(W0, A, B):
    return F.embedding(IDS, W0) + KEEP[..., None] * F.embedding(IDS, W0 * (B @ A).t())


def each(x, W0, A, B):
    return torch.stack([F.linear(x[0], W0 * (1 + B @ A)), F.linear(x[1], W0 * (1 - B @ A))])


def sizes(*shapes):
    return lambda: [torch.randn(shape, dtype=torch.float64) for shape in shapes]


LINEAR = sizes((2, 5, 4), (3, 4), (2, 4), (3, 2), (3,))
TABLE = sizes((5, 4), (2, 5), (4, 2))
# an operator, the same by the dense weight, and tensors for both
CASES = {
    "linear": (linear, reference.linear, LINEAR),
    "update only": (
        lambda x, W0, A, B: linear(x, W0, A, B, update_only=True),
        lambda x, W0, A, B: F.linear(x, W0 * (B @ A)),
        lambda: LINEAR()[:4],
    ),
    "dequantised": (
        lambda x, A, B: linear(x, PACKED, A, B, dequantize=lambda q: q.double() / 4),
        lambda x, A, B: reference.linear(x, PACKED.double() / 4, A, B),
        sizes((5, 4), (2, 4), (3, 2)),
    ),
    "transposed": (
        lambda x, W0, A, B: linear(x, W0.t(), A, B),
        lambda x, W0, A, B: reference.linear(x, W0.t(), A, B),
        sizes((5, 4), (4, 3), (2, 4), (3, 2)),
    ),
    "each": (
        lambda x, W0, A, B: linear_each(x, W0, [(A, B, 0), (-A, B, 0)]),
        each,
        sizes((2, 4), (3, 4), (2, 4), (3, 2)),
    ),
    "conv": (
        partial(conv, **CONV),
        partial(reference.conv, **CONV),
        sizes((2, 4, 5, 5), (6, 2, 3, 2), (2, 2, 3, 2), (6, 2, 1, 1), (6,)),
    ),
    "embedding": (partial(embedding, IDS), embedded, TABLE),
    "embedding, padding and frequency": (
        partial(embedding, IDS, padding_idx=2, scale_grad_by_freq=True),
        partial(embedded, padding_idx=2, scale_grad_by_freq=True),
        TABLE,
    ),
    "embedding, dropout": (partial(embedding, IDS, keep=KEEP), dropped, TABLE),
    "weight": (modulated_weight, reference.modulated_weight, sizes((3, 4), (2, 4), (3, 2))),
}
SMOOTH = [name for name in CASES if "frequency" not in name]  # whose gradient is that of the function


@pytest.fixture(params=CASES)
def case(request):
    function, dense, make = CASES[request.param]
    return function, dense, [t.requires_grad_() for t in make()]


def assert_close(found, wanted):
    for position, (f, w) in enumerate(zip(found, wanted, strict=True)):
        torch.testing.assert_close(f, w, rtol=1e-10, atol=1e-10, msg=lambda text, at=position: f"{at}: {text}")


@pytest.mark.parametrize("name", SMOOTH)
def test_gradgradcheck(name):
    function, _, make = CASES[name]
    assert torch.autograd.gradgradcheck(function, [t.requires_grad_() for t in make()])


def penalty(function, tensors, wrt):
    """A loss and the squares of its gradients for some tensors, as of a gradient penalty, forces or an inner step."""
    loss = function(*tensors).tanh().sum()
    gradients = torch.autograd.grad(loss, [tensors[i] for i in wrt], create_graph=True)
    return loss + sum(g.square().sum() for g in gradients)


def ask(way, loss, tensors):
    if way == "grad":
        return torch.autograd.grad(loss, tensors)
    for t in tensors:
        t.grad = None
    loss.backward(inputs=tensors if way == "inputs" else None)
    return [t.grad for t in tensors]


@pytest.mark.parametrize("way", ["backward", "inputs", "grad"])
def test_penalties_of_each_gradient_and_of_all(case, way):
    function, dense, tensors = case
    n = len(tensors)
    for wrt in (*([i] for i in range(n)), range(n)):
        found = ask(way, penalty(function, tensors, wrt), tensors)
        assert_close(found, ask("grad", penalty(dense, tensors, wrt), tensors))


def test_the_gradient_of_a_sum_depends_on_the_factors_alone(case):
    """It starts from ones, which depend on nothing."""
    function, dense, tensors = case
    for of in range(len(tensors)):
        both = []
        for f in (function, dense):
            (gradient,) = torch.autograd.grad(f(*tensors).sum(), tensors[of], create_graph=True)
            size = gradient.square().sum() + 0 * sum(t.sum() for t in tensors)  # that of a bias is constant
            both.append(torch.autograd.grad(size, tensors))
        assert_close(*both)


def test_third_derivatives(case):
    function, dense, tensors = case
    both = []
    for f in (function, dense):
        value = f(*tensors).tanh().sum()
        for _ in range(2):
            value = sum(g.square().sum() for g in torch.autograd.grad(value, tensors, create_graph=True))
        both.append(torch.autograd.grad(value, tensors))
    assert_close(*both)


def test_hessian_vector_products(case):
    function, dense, tensors = case
    v = tuple(torch.randn_like(t) for t in tensors)
    both = [
        torch.autograd.functional.hvp(lambda *t, f=f: f(*t).tanh().sum(), tuple(tensors), v)[1]
        for f in (function, dense)
    ]
    assert_close(*both)


@pytest.mark.parametrize("entries", [1, 8])
def test_over_several_blocks(case, entries, monkeypatch):
    monkeypatch.setattr(heuristics, "CPU_BLOCK_ENTRIES", entries)
    function, dense, tensors = case
    every = range(len(tensors))
    assert_close(
        ask("grad", penalty(function, tensors, every), tensors), ask("grad", penalty(dense, tensors, every), tensors)
    )


def test_a_gradient_with_a_graph_has_the_values_of_one_without(case):
    function, _, tensors = case
    once = torch.autograd.grad(function(*tensors).sum(), tensors)
    assert_close(torch.autograd.grad(function(*tensors).sum(), tensors, create_graph=True), once)


def test_in_8_bits_second_derivatives_are_those_of_x_as_it_is_kept():
    """Those of dx are exact, as dx is; those of dA and dB are off by the rounding of x."""
    _, W0, A, B = (t.float() for t in sizes((64, 20), (33, 20), (3, 20), (33, 3))())
    base = torch.randn(64, 20, requires_grad=True)
    tensors = [base, A.requires_grad_(), B.requires_grad_()]

    def rounded(base, A, B, mode="int8"):
        return linear(base.sin(), W0, A, B, weight_gradient=mode)

    for wrt, limit in (([0], 1e-6), ([1, 2], 0.05)):
        both = []
        for mode in ("int8", "exact"):
            y = rounded(*tensors, mode=mode)
            loss = y.sum() if wrt == [0] else y.square().sum()
            gradients = torch.autograd.grad(loss, [tensors[i] for i in wrt], create_graph=True)
            both.append(torch.autograd.grad(sum(g.square().sum() for g in gradients), tensors))
        for found, wanted in zip(*both, strict=True):
            assert (found - wanted).norm() < limit * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_plain_weights_are_those_of_blocks(dtype):
    """With the dither, and for numbers that are rounded to nearest too."""
    W0, A, B = torch.randn(65, 40).to(dtype), torch.randn(3, 40) / 9, torch.randn(65, 3) / 9
    W0[0], W0[1, :4] = (
        0,
        torch.tensor([float("inf"), float("nan"), -torch.finfo(dtype).max, torch.finfo(dtype).tiny / 4]),
    )
    near = torch.arange(-64, 64).float()[None] / 2**14  # around powers of two, from both sides
    powers, ones = (2.0 ** torch.arange(-20, 12).repeat_interleave(4)).repeat(5, 1).to(dtype), torch.ones(5, 1)
    for W in (powers, -powers):
        found = torch.func.vmap(lambda f, W=W: modulated_weight(W, f, ones))(near[None])[0]
        assert torch.equal(found, modulated_weight(W, near, ones))
    plain = torch.func.vmap(lambda _: modulated_weight(W0, A, B))(torch.zeros(1))[0]
    assert torch.equal(plain.view(torch.int16), modulated_weight(W0, A, B).view(torch.int16))
    ids = torch.arange(65)
    rows = torch.func.vmap(lambda ids: embedding(ids, W0, B.t(), A.t()))(ids[None])[0]
    assert torch.equal(rows.view(torch.int16), embedding(ids, W0, B.t(), A.t()).view(torch.int16))
    x = torch.randn(5, 40).to(dtype)
    torch.testing.assert_close(
        torch.func.vmap(lambda x: linear(x, W0[2:], A, B[2:]))(x[None])[0], linear(x, W0[2:], A, B[2:])
    )


# ---- transforms


def scalar(function):
    return lambda *tensors: function(*tensors).tanh().sum()


def detached(tensors):
    return tuple(t.detach() for t in tensors)


def test_func_grad(case):
    function, dense, tensors = case
    at, every = detached(tensors), tuple(range(len(tensors)))
    assert_close(torch.func.grad(scalar(function), every)(*at), torch.autograd.grad(scalar(dense)(*tensors), tensors))
    value = lambda *t: sum(g.square().sum() for g in torch.func.grad(scalar(function), every)(*t))  # noqa: E731
    wanted = torch.autograd.grad(penalty(dense, tensors, every) - scalar(dense)(*tensors), tensors)
    assert_close(torch.func.grad(value, every)(*at), wanted)


@pytest.mark.parametrize("name", SMOOTH)
def test_forward_mode(name):
    function, dense, make = CASES[name]
    at, tangents = tuple(make()), tuple(make())
    assert_close(torch.func.jvp(function, at, tangents), torch.func.jvp(dense, at, tangents))
    wanted = torch.func.jvp(dense, at, tangents)
    with forward_ad.dual_level():
        y = function(*(forward_ad.make_dual(t, tangent) for t, tangent in zip(at, tangents, strict=True)))
        assert_close(forward_ad.unpack_dual(y), wanted)


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("jacobian", [torch.func.jacrev, torch.func.jacfwd, torch.func.hessian])
def test_jacobians(name, jacobian):
    function, dense, make = CASES[name]
    at, every = tuple(make()), tuple(range(len(make())))
    if jacobian is torch.func.hessian:
        function, dense, every = scalar(function), scalar(dense), (len(at) - 1,)
        found, wanted = jacobian(function, every)(*at)[0], jacobian(dense, every)(*at)[0]
    else:
        found, wanted = jacobian(function, every)(*at), jacobian(dense, every)(*at)
    assert_close(found, wanted)


def test_many_gradients_of_one_graph(case):
    """`is_grads_batched`, by which Jacobians are computed at once, runs the backward under vmap."""
    function, dense, tensors = case
    both = []
    for f in (function, dense):
        y = f(*tensors)
        dy = torch.randn(3, *y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(0))
        both.append(torch.autograd.grad(y, tensors, dy, is_grads_batched=True))
    assert_close(*both)


PER_SAMPLE = {"linear": (0,), "update only": (0,), "dequantised": (0,), "conv": (0,)}


@pytest.mark.parametrize("name", PER_SAMPLE)
def test_gradients_for_each_sample(name):
    function, dense, make = CASES[name]
    x, *rest = make()
    factors = tuple(range(1, len(rest) + 1))
    in_dims = (0, *(None for _ in rest))
    found = torch.func.vmap(torch.func.grad(scalar(function), factors), in_dims)(x, *rest)
    each_one = [torch.func.grad(scalar(dense), factors)(sample, *rest) for sample in x]
    assert_close(found, [torch.stack(parts) for parts in zip(*each_one, strict=True)])


@pytest.mark.parametrize("options", [{}, {"padding_idx": 2, "scale_grad_by_freq": True}], ids=str)
def test_gradients_of_an_embedding_for_each_sample(options):
    tensors = tuple(TABLE())

    def loss(f, ids, *tensors):
        return f(ids, *tensors).tanh().sum()

    def dense(ids, W0, A, B):
        return F.embedding(ids, W0 * (1 + (B @ A).t()), **options)

    grad = torch.func.grad(partial(loss, partial(embedding, **options)), (1, 2, 3))
    if not options:
        found = torch.func.vmap(grad, (0, None, None, None))(IDS, *tensors)
    else:  # vmap has no searchsorted
        found = [torch.stack(parts) for parts in zip(*(grad(ids, *tensors) for ids in IDS), strict=True)]
    leaves = [t.requires_grad_() for t in tensors]
    each_one = [torch.autograd.grad(loss(dense, ids, *leaves), leaves) for ids in IDS]
    assert_close(found, [torch.stack(parts) for parts in zip(*each_one, strict=True)])


def test_an_ensemble_of_adapters():
    """vmap over the factors."""
    x, W0, *_ = LINEAR()
    As, Bs = torch.randn(6, 2, 4, dtype=torch.float64), torch.randn(6, 3, 2, dtype=torch.float64)
    found = torch.func.vmap(linear, (None, None, 0, 0))(x, W0, As, Bs)
    assert_close(found, [reference.linear(x, W0, A, B) for A, B in zip(As, Bs, strict=True)])


def test_a_traced_graph_holds_no_memory_of_ours(case):
    function, dense, tensors = case
    at = detached(tensors)
    graph = make_fx(lambda *tensors: function(*tensors))(*at)
    held = [value for value in vars(graph).values() if isinstance(value, Tensor)]
    assert all(t.dim() == 0 or t.dtype == torch.int64 or not t.is_floating_point() for t in held if t is not PACKED)
    other = tuple(torch.randn_like(t) for t in at)
    assert_close([graph(*other)], [dense(*other)])
