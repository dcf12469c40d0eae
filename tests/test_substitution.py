"""A module's own call with other tensors."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hira.layers.substitution import substituted


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale


def test_the_module_computes_with_other_tensors():
    base, x = nn.Linear(4, 3), torch.randn(2, 4)
    before, weight = base(x), torch.randn(3, 4, requires_grad=True)
    with substituted(base, weight=weight):
        y = base(x)
    torch.testing.assert_close(y, x @ weight.T + base.bias)
    y.sum().backward()
    assert weight.grad is not None
    assert base.weight.grad is None
    assert torch.equal(base(x), before)


def test_children_and_buffers():
    base, x = Tower(), torch.randn(2, 4)
    state = dict(base.__dict__)
    with substituted(base, inner=nn.Identity(), scale=torch.tensor(3.0)):
        assert torch.equal(base(x), 3 * x)
        with substituted(base, scale=torch.tensor(5.0)):
            assert torch.equal(base(x), 5 * x)
        assert torch.equal(base(x), 3 * x)
    assert base.__dict__ == state


def test_what_the_forward_assigns_stays():
    class Assigning(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.seen = x
            self.weight = nn.Parameter(torch.ones_like(self.weight))
            return x

    base, x = Assigning(4, 3), torch.randn(2, 4)
    with substituted(base, weight=torch.zeros(3, 4)):
        base(x)
    assert base.seen is x
    assert torch.equal(base.weight, torch.ones(3, 4))
    assert "weight" in dict(base.named_parameters())


def test_a_computed_attribute():
    base, x = nn.Linear(4, 3), torch.randn(2, 4)
    parametrize.register_parametrization(base, "weight", nn.Tanh())
    kind, before, weight = type(base), base(x), torch.randn(3, 4)
    for cached in (False, True):
        with substituted(base, weight=weight), parametrize.cached() if cached else torch.enable_grad():
            assert torch.equal(base(x), nn.functional.linear(x, weight, base.bias))
    assert type(base) is kind
    assert torch.equal(base(x), before)


def test_a_forward_on_the_instance_runs():
    base, x = nn.Linear(4, 4), torch.randn(2, 4)
    plain = base.forward
    base.forward = lambda x: 2 * plain(x)
    with substituted(base, weight=torch.eye(4), bias=None):
        assert torch.equal(base(x), 2 * x)


def test_an_error_leaves_nothing_behind():
    base = nn.Linear(4, 3)
    state = dict(base.__dict__)
    with pytest.raises(RuntimeError), substituted(base, weight=torch.randn(3, 5)):
        base(torch.randn(2, 4))
    assert base.__dict__ == state


def test_threads_do_not_see_each_others_tensors():
    base, x = nn.Linear(64, 64, bias=False), torch.ones(8, 64)

    def run(value: int) -> bool:
        with substituted(base, weight=value * torch.eye(64)):
            time.sleep(0.002)  # time enough for the others to put theirs in its place, if they could
            return torch.equal(base(x), value * x)

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(run, range(20)))
    assert "weight" not in base.__dict__
