"""W' formed anew in backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from autograd_memory import address, kept_for_backward
from torch import Tensor
from torch.autograd.graph import disable_saved_tensors_hooks, save_on_cpu

from hira.ops import effective_weight, recompute
from hira.ops.recompute import formed, recomputed


def problem(m: int = 6, n: int = 4, r: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x (5, in), W0 (out, in), A (r, in) and B (out, r)."""
    x, W0, A, B = (torch.randn(*shape, dtype=dtype) for shape in ((5, n), (m, n), (r, n), (m, r)))
    return [x.requires_grad_(), W0, A.requires_grad_(), B.requires_grad_()]


USES = {
    "whole": lambda x, W: F.linear(x, W),
    "parts": lambda x, W: torch.cat([F.linear(x, part) for part in W.split([1, 2, 3])], dim=1),
    "columns": lambda x, W: x[:, 1:3] @ W.t()[1:3],
    "reshaped": lambda x, W: F.linear(x, W.view(2, 3, 4)[1]),
    "a copy": lambda x, W: F.linear(x, W.float()[:, :4].to(x.dtype)),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_gradients(use):
    x, W0, A, B = problem()
    wanted = torch.autograd.grad(use(x, effective_weight.modulated_weight(W0, A, B)).square().sum(), [x, A, B])
    W = formed(W0, A, B)
    with recomputed(W):
        y = use(x, W.weight)
    found = torch.autograd.grad(y.square().sum(), [x, A, B])
    assert all(torch.equal(mine, other) for mine, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("use", ["whole", "parts", "columns", "reshaped"])
def test_views_of_w_are_not_kept(use):
    x, W0, A, B = problem()
    W = formed(W0, A, B)

    def run() -> Tensor:
        return USES[use](x, W.weight)

    assert address(W.weight) in kept_for_backward(run)

    def dropping() -> Tensor:
        with recomputed(W):
            return run()

    assert kept_for_backward(dropping).keys() == {address(x)}


def test_several_weights():
    x, W0, A, B = problem(4, 4)
    other = problem(4, 4)[1:]
    first, second = formed(W0, A, B), formed(*other)
    with recomputed(first, second):
        y = F.linear(F.linear(x, first.weight), second.weight)
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, (torch.ones(5, 4).double() @ second.weight @ first.weight).detach())


@pytest.mark.parametrize("changed", [1, 2, 3])
def test_sources_that_changed_are_refused(changed):
    tensors = [t.detach() for t in problem()]
    x = tensors[0].requires_grad_()
    W = formed(*tensors[1:])
    with recomputed(W):
        y = F.linear(x, W.weight)
    tensors[changed].add_(1)
    with pytest.raises(RuntimeError, match=r"W'.* inplace"):
        y.sum().backward()


def test_hooks_outside_get_the_rest():
    x, W0, A, B = problem()
    W = formed(W0, A, B)
    packed, unpacked = [], []

    def unpack(tensor: Tensor) -> Tensor:
        unpacked.append(address(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(address(t)) or t, unpack), recomputed(W):
        y = F.linear(x, W.weight)
    assert packed == [address(x)]
    y.sum().backward()
    assert unpacked == packed
    with save_on_cpu(), recomputed(W):
        F.linear(x, W.weight).sum().backward(inputs=[x])


def test_a_dtype_of_its_own():
    x, W0, A, B = problem(dtype=torch.float32)
    W = formed(W0, A, B, dtype=torch.bfloat16)
    assert torch.equal(W.weight, effective_weight.form(W0, A, B, 0, torch.bfloat16))
    low = x.detach().bfloat16().requires_grad_()
    with recomputed(W):
        y = F.linear(low, W.weight)
    dx, dA = torch.autograd.grad(y.sum(), [low, A])
    torch.testing.assert_close(dx, torch.ones(5, 6).bfloat16() @ W.weight.detach())
    G = torch.ones(5, 6).bfloat16().t() @ low.detach()
    torch.testing.assert_close(dA, B.detach().t() @ (G.float() * W0))


@pytest.mark.parametrize("reason", ["an older PyTorch", "hooks are not allowed"])
def test_where_hooks_cannot_be_used_w_is_kept(reason, monkeypatch):
    x, W0, A, B = problem()
    W = formed(W0, A, B)
    if reason == "an older PyTorch":
        monkeypatch.setattr(recompute, "_AUTOGRAD", object())
        with recomputed(W):
            y = F.linear(x, W.weight)
    else:
        with disable_saved_tensors_hooks("not here"), recomputed(W):
            y = F.linear(x, W.weight)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], torch.ones(5, 6).double() @ W.weight.detach())


def test_without_gradients_no_hook_is_set(monkeypatch):
    monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", None)
    x, W0, A, B = problem()
    with torch.no_grad(), recomputed(formed(W0, A, B)):
        F.linear(x, W0)
    with recomputed():
        F.linear(x, W0)
