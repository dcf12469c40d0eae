"""The operators by way of the Triton kernels, where `paths` says so, give what they give without."""

from __future__ import annotations

import pytest
import torch
from interpreted import DEVICE, DTYPES
from oracle import assert_as_exact, assert_same_bits, exact_results, results
from torch import nn
from torch.utils._pytree import tree_leaves

import hira
from hira.ops import effective_weight, heuristics, kernel_choice, linear, modulated_weight, reference


@pytest.fixture
def kernels(monkeypatch):
    """Kernels on any device, and a count of their calls."""
    import hira.ops.triton as cuda

    calls = []

    def counted(name, function):
        def call(*args, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)

        return call

    for name in ("form", "factor_gradients", "decode"):
        monkeypatch.setattr(cuda, name, counted(name, getattr(cuda, name)))
    monkeypatch.setattr(heuristics, "TRITON", "1")
    monkeypatch.setattr(heuristics, "triton", lambda tensor: tensor.dtype != torch.float64)
    monkeypatch.setattr(heuristics, "CPU_BLOCK_ENTRIES", 300)
    return calls


def tensors(T, dtype, out=33, into=20, r=3):
    x = torch.randn(T, into).to(DEVICE, dtype).requires_grad_()
    W0 = torch.randn(out, into).to(DEVICE, dtype)
    A, B = torch.randn(r, into).to(DEVICE) / r, torch.randn(out, r).to(DEVICE) / 10
    return [x, W0, A.requires_grad_(), B.requires_grad_(), torch.randn(out).to(DEVICE, dtype)]


def plain(x, W0, A, B, bias):
    return torch.nn.functional.linear(x, W0 * (1 + (B @ A).to(W0.dtype)), bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [3, 40])
def test_linear(kernels, T, dtype):
    every = tensors(T, dtype)
    dy = torch.randn(T, 33).to(DEVICE)
    assert_as_exact(results(linear, every, dy), results(plain, every, dy), exact_results(reference.linear, every, dy))
    assert set(kernels) == {"form", "factor_gradients"}  # training keeps one W' for y and dx


@pytest.mark.parametrize("dither", [False, True])
def test_merged_and_forward_weights_are_the_same(kernels, monkeypatch, dither):
    monkeypatch.setattr(heuristics, "DITHER", dither)
    _, W0, A, B, _ = tensors(1, torch.bfloat16)
    eye = torch.eye(20, dtype=torch.bfloat16, device=DEVICE)
    with torch.no_grad():
        assert torch.equal(linear(eye, W0, A, B).t(), modulated_weight(W0, A, B))
    assert set(kernels) == {"form"}


@pytest.mark.parametrize("lora_r", [0, 2])
@pytest.mark.parametrize("update_only", [False, True])
def test_forming_the_weight(kernels, monkeypatch, update_only, lora_r):
    monkeypatch.setattr(heuristics, "DITHER", True)
    _, W0, A, B, _ = tensors(1, torch.bfloat16)
    A, B = A.detach().round() / 4, B.detach().mul(100).round() / 64  # sums of which are exact in any order
    formed = effective_weight.form(W0, A, B, lora_r, torch.bfloat16, update_only=update_only)
    assert set(kernels) == {"form"}
    monkeypatch.undo()
    monkeypatch.setattr(heuristics, "DITHER", True)
    assert_same_bits([formed], [effective_weight.form(W0, A, B, lora_r, torch.bfloat16, update_only=update_only)])


def test_a_base_that_trains(kernels):
    every = tensors(20, torch.float32)
    every[1].requires_grad_()
    dy = torch.randn(20, 33).to(DEVICE)
    assert_as_exact(results(linear, every, dy), results(plain, every, dy), exact_results(reference.linear, every, dy))


def test_a_layer_decodes_by_the_kernel_and_keeps_no_weight(kernels, monkeypatch):
    monkeypatch.setattr(heuristics, "keeps_weight", lambda x: False)  # as on CUDA
    layer = hira.Linear(nn.Linear(20, 33).to(DEVICE), "a", hira.HiraConfig(r=3, init_weights=False)).eval()
    x = torch.randn(2, 1, 20, device=DEVICE)
    with torch.no_grad(), hira.inference_cache.keep():
        y = layer(x)
        assert hira.inference_cache.nbytes == 0
    assert kernels == ["decode"]
    W = modulated_weight(layer.base_layer.weight, layer.hira_A["a"], layer.hira_B["a"])
    torch.testing.assert_close(y, torch.nn.functional.linear(x, W, layer.base_layer.bias), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("setting", ["0", "1", "auto"])
def test_kernels_serve_cuda_alone(setting, monkeypatch):
    monkeypatch.setattr(heuristics, "TRITON", setting)
    assert not heuristics.triton(torch.ones(1))
    assert heuristics.triton(torch.ones(1, device=DEVICE)) == (DEVICE == "cuda" and setting != "0")


@pytest.mark.parametrize("faster", [True, False])
def test_a_kernel_serves_where_it_is_chosen(faster, kernels, monkeypatch):
    monkeypatch.setattr(heuristics, "TRITON", "auto")
    asked = []

    def serves(name, W0, dtype, kernel, plain):
        asked.append(name)
        for found, wanted in zip(tree_leaves(kernel()), tree_leaves(plain()), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        kernels.clear()
        return faster

    monkeypatch.setattr(kernel_choice, "serves", serves)
    shapes = ((40, 20), (33, 20), (3, 20), (33, 3))
    x, W0, A, B = (torch.randn(*shape, device=DEVICE, requires_grad=True) for shape in shapes)
    linear(x, W0.detach(), A, B).sum().backward()
    assert set(asked) == {"form", "factor_gradients"}
    assert bool(kernels) == faster
    with torch.no_grad():
        linear(x[:2], W0, A, B)
    assert "decode" in asked
