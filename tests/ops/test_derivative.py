"""Backward passes refuse to be differentiated, also where nothing but the saved tensors would say so."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from hira.ops import conv, embedding, linear, modulated_weight

CONV = partial(conv, stride=(1,), padding=(0,), dilation=(1,), groups=1)
CASES = {
    "linear": (linear, lambda: [torch.randn(5, 4), torch.randn(3, 4), torch.randn(2, 4), torch.randn(3, 2)]),
    "int8": (
        partial(linear, weight_gradient="int8"),
        lambda: [torch.randn(5, 4), torch.randn(3, 4), torch.randn(2, 4), torch.randn(3, 2)],
    ),
    "conv": (CONV, lambda: [torch.randn(2, 4, 7), torch.randn(3, 4, 3), torch.randn(2, 4, 3), torch.randn(3, 2, 1)]),
    "embedding": (
        partial(embedding, torch.tensor([1, 2])),
        lambda: [torch.randn(5, 4), torch.randn(2, 5), torch.randn(4, 2)],
    ),
    "weight": (modulated_weight, lambda: [torch.randn(3, 4), torch.randn(2, 4), torch.randn(3, 2)]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_gradient_penalty_is_refused(name):
    """The gradient of a sum starts from ones, which depend on nothing; it depends on A and B all the same."""
    function, make = CASES[name]
    tensors = [t.requires_grad_() for t in make()]
    for of in range(len(tensors)):
        (gradient,) = torch.autograd.grad(function(*tensors).sum(), tensors[of], create_graph=True)
        with pytest.raises(RuntimeError, match="a HiRA layer has no second derivative"):
            gradient.square().sum().backward()


@pytest.mark.parametrize("name", CASES)
def test_a_graph_that_is_not_differentiated_again_is_fine(name):
    function, make = CASES[name]
    tensors = [t.requires_grad_() for t in make()]
    once = torch.autograd.grad(function(*tensors).sum(), tensors)
    kept = torch.autograd.grad(function(*tensors).sum(), tensors, create_graph=True)
    for a, b in zip(once, kept, strict=True):
        assert torch.equal(a, b)
