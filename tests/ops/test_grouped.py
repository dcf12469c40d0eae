"""All experts' products as one: the numbers and gradients of one product after another, without a look at the rows."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_as_exact, exact_results, results
from torch.utils._python_dispatch import TorchDispatchMode

from hira.ops import effective_weight, heuristics, reference
from hira.ops.grouped import form_stack, grouped_linear

E, R, LORA_R, OUT, IN = 4, 3, 2, 16, 24
OFFS = torch.tensor([5, 5, 12, 14], dtype=torch.int32)  # of 16 rows: one expert has none, two rows are nobody's
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def tensors(dtype, transposed=False):
    W0 = torch.randn(E, IN, OUT).mT if transposed else torch.randn(E, OUT, IN)
    A, B = torch.randn(E, R + LORA_R, IN), torch.randn(E, OUT, R + LORA_R) / 4
    x = torch.randn(16, IN).to(dtype)
    return [x.requires_grad_(), W0.to(dtype).requires_grad_(), A.requires_grad_(), B.requires_grad_()]


def weights(W0, A, B):
    exact = torch.promote_types(W0.dtype, torch.float32)
    parts = (W0.to(exact), A[:, :R], B[..., :R], A[:, R:], B[..., R:])
    return [reference.modulated_weight(*(part[e] for part in parts)).to(W0.dtype) for e in range(E)]


def plain(x, W0, A, B):
    ends = [0, *OFFS.tolist()]
    each = zip(ends, ends[1:], weights(W0, A, B), strict=False)
    return torch.cat([*(x[start:end] @ W.t() for start, end, W in each), x.new_zeros(len(x) - ends[-1], OUT)])


def grouped(x, W0, A, B):
    return grouped_linear(x, W0, A, B, LORA_R, OFFS)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("entries", [1, 2 * OUT * IN, 1 << 22])
@every_dtype
def test_numbers_and_gradients(dtype, entries, transposed, monkeypatch):
    monkeypatch.setattr(heuristics, "CPU_BLOCK_ENTRIES", entries)
    monkeypatch.setattr(heuristics, "DITHER", False)
    every, dy = tensors(dtype, transposed), torch.randn(16, OUT)
    assert_as_exact(results(grouped, every, dy), results(plain, every, dy), exact_results(plain, every, dy))


@every_dtype
def test_each_weight_is_that_of_a_linear_layer(dtype):
    """The dither included; the product BA may sum in another order, as one of a batch."""
    _, W0, A, B = (tensor.detach() for tensor in tensors(dtype))
    formed = form_stack(W0, A, B, LORA_R, dtype)
    for e in range(E):
        alone = effective_weight.form(W0[e], A[e], B[e], LORA_R, dtype)
        torch.testing.assert_close(formed[e], alone, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_the_host_never_looks_at_a_number():
    """Nothing that a device would have to be waited for: no `item`, and no indexing by a mask."""

    class Looks(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero), func
            return func(*args, **(kwargs or {}))

    every = tensors(torch.float32)
    with Looks():
        grouped(*every).sum().backward()


def test_nothing_of_a_weights_size_is_kept():
    kept = []
    every = tensors(torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        grouped(*every)
    assert all(any(t is given for given in (*every, OFFS)) for t in kept)
