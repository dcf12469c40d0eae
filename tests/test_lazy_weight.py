"""LazyWeight: what a module may do with the weights of its experts, against dense weights that autograd tracks."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from hira import HiraError
from hira.layers import lazy_weight
from hira.layers.lazy_weight import Expert, LazyWeight
from hira.ops import reference

E, OUT, IN, R, T = 4, 6, 8, 2, 5


def setting(transposed):
    """A lazy weight, the dense one, and what both depend on; (E, out, in), or (E, in, out)."""
    W0, A, B = (torch.randn(shape, dtype=torch.float64) for shape in ((E, OUT, IN), (E, R, IN), (E, OUT, R)))
    leaves = [A.requires_grad_(), B.requires_grad_()]
    experts = [Expert(*parts) for parts in zip(W0, A.unbind(0), B.unbind(0), strict=True)]
    dense = torch.stack([reference.modulated_weight(*expert[:3]) for expert in experts])
    if transposed:
        dense = dense.transpose(1, 2)
    return LazyWeight(experts, range(E), transposed=transposed), dense, leaves


torch.manual_seed(1)
x = torch.randn(T, IN, dtype=torch.float64)
batch = torch.randn(E, T, IN, dtype=torch.float64)
bias = torch.randn(OUT, dtype=torch.float64)
ids = torch.tensor([2, 0, 2])
offs = torch.tensor([0, 2, 2, 4], dtype=torch.int32)  # two empty groups, one row behind the last


def grouped(x, W, offs):
    """What a grouped product is; torch's own knows no float64."""
    if isinstance(W, LazyWeight):
        return F.grouped_mm(x, W, offs=offs)
    ends = [0, *offs.tolist()]
    parts = [x[start:end] @ W[e] for e, (start, end) in enumerate(pairwise(ends))]
    return torch.cat([*parts, x.new_zeros(len(x) - ends[-1], W.shape[-1])])


# for weights (E, out, in); for weights (E, in, out) the same after a transpose
FOLLOWED = {
    "an integer": lambda W: F.linear(x, W[1]),
    "a negative one": lambda W: F.linear(x, W[-1], bias),
    "a tensor": lambda W: F.linear(x, W[torch.tensor(3)], bias=bias),
    "a matrix product": lambda W: x @ W[2].t(),
    "mm": lambda W: torch.mm(x, W[2].T),
    "a vector": lambda W: torch.matmul(x[0], W[2].transpose(0, 1)),
    "leading dimensions": lambda W: batch @ W[2].mT,
    "batched, one for each": lambda W: torch.bmm(batch, W.transpose(1, 2)),
    "batched, on the left": lambda W: torch.bmm(W, batch.transpose(1, 2)),
    "batched, by matmul": lambda W: batch @ W.mT,
    "batched, chosen": lambda W: torch.bmm(W[ids], batch[:3].transpose(1, 2)),
    "chosen twice": lambda W: F.linear(x, W[ids][torch.tensor([2, 1])][0]),
    "grouped": lambda W: grouped(x, W.transpose(-2, -1), offs),
}
FOLLOWED |= {
    "rows": lambda W: F.embedding(ids, W[0]),
    "rows with options": lambda W: F.embedding(ids, W[0], -1, scale_grad_by_freq=True),
}
FORMED = {
    "a sum": lambda W: W.sum(),
    "einsum": lambda W: torch.einsum("eti,eoi->eto", batch, W),
    "a slice": lambda W: F.linear(x, W[1:3][1]),
    "a mask": lambda W: W[torch.tensor([True, False, True, False])].sum(0),
    "an index in an index": lambda W: W[1, 2] * 2,
    "a matrix of indices": lambda W: W[torch.tensor([[0, 1]])],
    "no index": lambda W: W[torch.tensor([], dtype=torch.int64)].sum(),
    "the other orientation": lambda W: torch.mm(x[:, :OUT], W[0]),
    "keywords": lambda W: F.linear(input=x, weight=W[0]),
    "another transpose": lambda W: W.transpose(0, 1),
    "a broadcast product": lambda W: torch.matmul(batch.unsqueeze(1), W.mT),
    "an iteration": lambda W: sum(F.linear(x, matrix) for matrix in W),
    "a dtype": lambda W: W.to(torch.float32).double(),
    "a matrix's entries": lambda W: W[0][1],
    "both sides": lambda W: W[0] @ W[1].t(),
}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", [*FOLLOWED, *FORMED])
def test_results_and_gradients_are_those_of_dense_weights(name, transposed, monkeypatch):
    lazy, dense, leaves = setting(transposed)
    expression = (FOLLOWED | FORMED)[name]
    formed = []
    form = lazy_weight.modulated_weight
    monkeypatch.setattr(lazy_weight, "modulated_weight", lambda *parts: formed.append(parts) or form(*parts))
    found, exact = (expression(W.transpose(1, 2) if transposed else W) for W in (lazy, dense))
    assert bool(formed) == (name in FORMED)
    torch.testing.assert_close(found, exact)
    dy = torch.randn_like(exact)
    if exact.requires_grad and name != "no index":
        for gradients in zip(*(torch.autograd.grad(y, leaves, dy) for y in (found, exact)), strict=True):
            torch.testing.assert_close(*gradients)


def test_only_what_is_asked_for_is_formed(monkeypatch):
    lazy, dense, _ = setting(False)
    formed = []
    form = lazy_weight.modulated_weight
    monkeypatch.setattr(lazy_weight, "modulated_weight", lambda *parts: formed.append(parts) or form(*parts))
    torch.testing.assert_close(lazy[ids] + 1, dense[ids] + 1)
    assert len(formed) == 2  # experts 2 and 0
    torch.testing.assert_close(lazy[3] + 1, dense[3] + 1)
    assert len(formed) == 3


def test_it_looks_like_the_tensor_it_stands_for():
    lazy, dense, _ = setting(True)
    assert isinstance(lazy, torch.Tensor)
    assert lazy.shape == dense.shape and lazy[0].shape == dense[0].shape and lazy[ids].shape == dense[ids].shape
    assert (lazy.dtype, lazy.device, lazy.dim(), len(lazy)) == (dense.dtype, dense.device, 3, E)
    assert lazy.requires_grad
    with torch.no_grad():
        assert not setting(False)[0].requires_grad
    with pytest.raises(IndexError):
        lazy[E]


def test_transformers_own_fallback_is_followed():
    from transformers.integrations import moe  # noqa: F401, defines the operator

    lazy, dense, _ = setting(True)
    torch.testing.assert_close(
        torch.ops.transformers.grouped_mm_fallback(x, lazy, offs=offs), grouped(x, dense, offs.clone())
    )


class _Opaque(torch.autograd.Function):
    """A product with a backward of its own, as kernels come with."""

    @staticmethod
    def forward(ctx, x, W):
        ctx.save_for_backward(x)
        return x @ (W[0] + 0).t()

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return None, torch.stack([dy.t() @ x] * E)


def test_a_gradient_that_would_be_lost_is_refused():
    y = _Opaque.apply(x, setting(False)[0])
    with pytest.raises(HiraError, match="set_experts_implementation"):
        y.sum().backward()


def test_a_kernel_that_wants_the_data_is_refused():
    lazy, _, _ = setting(False)
    assert lazy.data_ptr() == 0
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(HiraError, match="multiplied"):
        lazy + 1
