"""A module's twin with other tensors."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from hira import HiraError
from hira.stand_in import stand_in


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x):
        return self.inner(x) * self.scale


def test_the_twin_computes_with_other_tensors():
    base, x = nn.Linear(4, 3), torch.randn(2, 4)
    weight = torch.randn(3, 4, requires_grad=True)
    twin = stand_in(base, weight=weight)
    assert type(twin) is nn.Linear
    torch.testing.assert_close(twin(x), x @ weight.T + base.bias)
    twin(x).sum().backward()
    assert weight.grad is not None
    assert base.weight.grad is None


def test_children_and_buffers():
    base, x = Tower(), torch.randn(2, 4)
    inner = stand_in(base.inner, weight=torch.eye(4), bias=None)
    twin = stand_in(base, inner=inner, scale=torch.tensor(3.0))
    assert torch.equal(twin(x), 3 * x)


def test_the_module_is_left_alone():
    base, x = Tower(), torch.randn(2, 4)
    before, state = base(x), dict(base.__dict__)
    twin = stand_in(base, scale=torch.tensor(3.0))
    twin(x)
    assert base.__dict__ == state
    assert torch.equal(base(x), before)
    assert [name for name, _ in base.named_parameters()] == [name for name, _ in twin.named_parameters()]
    gone = weakref.ref(twin)
    del twin
    gc.collect()
    assert gone() is None


def test_mode_and_hooks_are_shared():
    base, seen = nn.Sequential(nn.Dropout(0.5)).eval(), []
    base.register_forward_hook(lambda *_: seen.append(1))
    x = torch.randn(3)
    assert torch.equal(stand_in(base)(x), x)
    assert seen == [1]


def test_a_computed_attribute():
    base, x = nn.Linear(4, 3), torch.randn(2, 4)
    parametrize.register_parametrization(base, "weight", nn.Tanh())
    before, weight = base(x), torch.randn(3, 4)
    assert torch.equal(stand_in(base, weight=weight)(x), nn.functional.linear(x, weight, base.bias))
    assert torch.equal(base(x), before)


def test_a_replaced_forward_is_refused():
    base = nn.Linear(4, 3)
    base.forward = lambda x: x
    with pytest.raises(HiraError, match=r"^The forward of this Linear was replaced .*; undo that first\.$"):
        stand_in(base, weight=torch.randn(3, 4))
