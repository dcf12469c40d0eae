"""The oracle itself, against numbers worked out by hand and against loops over entries."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from hira.ops import reference

# Sums of a handful of products of numbers of order one, in float64.
EXACT = {"rtol": 0.0, "atol": 1e-13}


def test_rank_one_by_hand():
    W0 = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    A = torch.tensor([[1.0, 0.0, -1.0]])
    B = torch.tensor([[2.0], [-0.5]])
    # BA = [[2, 0, -2], [-0.5, 0, 0.5]], hence 1 + BA = [[3, 1, -1], [0.5, 1, 1.5]]
    assert reference.delta(A, B).tolist() == [[2.0, 0.0, -2.0], [-0.5, 0.0, 0.5]]
    assert reference.modulated_weight(W0, A, B).tolist() == [[3.0, 2.0, -3.0], [2.0, 5.0, 9.0]]
    x = torch.tensor([[1.0, 10.0, 100.0], [0.0, 0.0, 1.0]])
    bias = torch.tensor([0.5, -1.0])
    # 3 + 20 - 300 = -277 and 2 + 50 + 900 = 952; then the last column alone
    assert reference.linear(x, W0, A, B).tolist() == [[-277.0, 952.0], [-3.0, 9.0]]
    assert reference.linear(x, W0, A, B, bias).tolist() == [[-276.5, 951.0], [-2.5, 8.0]]


def test_rank_two_by_hand():
    A = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    B = torch.tensor([[1.0, -1.0]])
    # (BA) = 1 * [1, 2] - 1 * [3, 4] = [-2, -2], so W' = -W0
    assert reference.modulated_weight(torch.tensor([[7.0, -9.0]]), A, B).tolist() == [[-7.0, 9.0]]


def test_gradients_by_hand():
    """One entry: y = x w (1 + b a), so dy/da = x w b, dy/db = x w a, dy/dx = w (1 + b a), dy/dw = x (1 + b a)."""
    x, w, a, b = (torch.tensor([[v]], requires_grad=True) for v in (2.0, 3.0, 5.0, 7.0))
    reference.linear(x, w, a, b).sum().backward()
    assert [t.grad.item() for t in (x, w, a, b)] == [3.0 * 36, 2.0 * 36, 2.0 * 3 * 7, 2.0 * 3 * 5]


@pytest.mark.parametrize("rank", [1, 3])
def test_linear_weight_is_a_loop_over_entries(rank):
    W0, A, B = (torch.randn(s, dtype=torch.float64) for s in [(4, 5), (rank, 5), (4, rank)])
    looped = torch.empty_like(W0)
    for o, i in itertools.product(range(4), range(5)):
        looped[o, i] = W0[o, i] * (1 + sum(B[o, k] * A[k, i] for k in range(rank)))
    torch.testing.assert_close(reference.modulated_weight(W0, A, B), looped, **EXACT)


@pytest.mark.parametrize("kernel", [(3,), (2, 3), (1, 2, 3)])
def test_kernel_is_a_loop_over_entries(kernel):
    W0 = torch.randn(4, 2, *kernel, dtype=torch.float64)
    A = torch.randn(3, 2, *kernel, dtype=torch.float64)
    B = torch.randn(4, 3, *[1] * len(kernel), dtype=torch.float64)
    looped = torch.empty_like(W0)
    for o, i, *at in itertools.product(*map(range, W0.shape)):
        index = (i, *at)
        looped[(o, *index)] = W0[(o, *index)] * (1 + sum(B.flatten(1)[o, k] * A[(k, *index)] for k in range(3)))
    torch.testing.assert_close(reference.modulated_weight(W0, A, B), looped, **EXACT)


def test_embedding_is_a_loop_over_ids():
    W0, A, B = (torch.randn(s, dtype=torch.float64) for s in [(6, 4), (2, 6), (4, 2)])
    ids = torch.tensor([[0, 5, 5], [3, 0, 1]])
    looped = torch.empty(2, 3, 4, dtype=torch.float64)
    for t in itertools.product(range(2), range(3)):
        for d in range(4):
            row = int(ids[t])
            looped[(*t, d)] = W0[row, d] * (1 + sum(B[d, k] * A[k, row] for k in range(2)))
    torch.testing.assert_close(reference.embedding(ids, W0, A, B), looped, **EXACT)


def test_convolution_by_hand():
    x = torch.tensor([[[1.0, 2.0, 3.0]]])
    W0 = torch.tensor([[[1.0, 2.0]]])
    A = torch.tensor([[[1.0, -1.0]]])
    B = torch.tensor([[[2.0]]])
    # 1 + BA = [3, -1], W' = [3, -2]: y = [3 * 1 - 2 * 2, 3 * 2 - 2 * 3]
    y = reference.conv(x, W0, A, B, torch.tensor([10.0]), stride=[1], padding=[0], dilation=[1], groups=1)
    assert y.tolist() == [[[9.0, 10.0]]]


@pytest.mark.parametrize("kernel", [(3,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_convolution_is_a_loop_over_groups(kernel, groups):
    dims = len(kernel)
    x = torch.randn(2, 4, *[7] * dims, dtype=torch.float64)
    W0 = torch.randn(8, 4 // groups, *kernel, dtype=torch.float64)
    A = torch.randn(3, 4 // groups, *kernel, dtype=torch.float64)
    B = torch.randn(8, 3, *[1] * dims, dtype=torch.float64)
    bias = torch.randn(8, dtype=torch.float64)
    options = {"stride": (2,) * dims, "padding": (1,) * dims, "dilation": (1,) * dims}
    function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims]
    parts = []
    for g in range(groups):
        out, into = slice(8 // groups * g, 8 // groups * (g + 1)), slice(4 // groups * g, 4 // groups * (g + 1))
        weight = W0[out] * (1 + torch.stack([sum(B.flatten(1)[o, k] * A[k] for k in range(3)) for o in range(8)])[out])
        parts.append(function(x[:, into], weight, bias[out], *options.values()))
    y = reference.conv(x, W0, A, B, bias, **options, groups=groups)
    torch.testing.assert_close(y, torch.cat(parts, 1), **EXACT)


def test_gradcheck():
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in [(3, 5), (4, 5), (2, 5), (4, 2), (4,)]]
    assert torch.autograd.gradcheck(reference.linear, tensors)
