"""A merged layer against one that is not, for every number of tokens from 1 to 40, on each path.

Merged, y is a product with W', which is rounded; not merged, it is a product with the same W', or in inference on a
device with few tokens one with W0 and W0 * BA, each rounded by itself. So the entries of y differ by the rounding of
W', less than a unit in the last place with the dither, by that of W0 * BA, by that of sums of in-features products in
float32, and by the rounding of y itself.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from interpreted import randn
from torch import nn
from torch.utils.checkpoint import checkpoint

import hira
from hira.ops import heuristics, linear, modulated_weight

OUT, INTO, R = 24, 72, 3
PATHS = ["cpu", "operators", "kernels"]


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """How a CPU computes, a device without kernels, and one with them."""
    if request.param != "cpu":
        monkeypatch.setattr(heuristics, "on_cpu", lambda device: False)
    kernels = request.param == "kernels"
    monkeypatch.setattr(heuristics, "TRITON", "1" if kernels else "0")
    monkeypatch.setattr(heuristics, "triton", lambda tensor: kernels)
    return request.param


def bound(x, W, y):
    """What rounding explains, entry by entry."""
    unit = torch.finfo(x.dtype).eps
    products = x.double().abs() @ W.double().abs().t()
    of_weight = 0.0 if x.dtype == torch.float32 else unit
    of_sums = 2 * (INTO + R + 2) * torch.finfo(torch.float32).eps
    return (of_weight + of_sums) * products + unit * y.double().abs()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_merged_and_unmerged_agree(path, dtype, with_bias):
    W0, A, B = randn(OUT, INTO, dtype=dtype), randn(R, INTO), randn(OUT, R) / 10
    bias = randn(OUT, dtype=dtype) if with_bias else None
    W = modulated_weight(W0, A, B)
    for tokens in range(1, 41):
        x = randn(tokens, INTO, dtype=dtype)
        merged = F.linear(x, W, bias)
        with torch.no_grad():
            inference = linear(x, W0, A, B, bias)
        training = linear(x, W0, A.requires_grad_(), B.requires_grad_(), bias).detach()
        for found in (inference, training):
            off = (found.double() - merged.double()).abs()
            assert (off <= bound(x, W, merged)).all(), (tokens, float((off / bound(x, W, merged)).max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bound_sees_an_update_that_is_lost(dtype):
    W0, A, B = randn(OUT, INTO, dtype=dtype), randn(R, INTO), randn(OUT, R) / 10
    x, W = randn(4, INTO, dtype=dtype), modulated_weight(W0, A, B)
    merged = F.linear(x, W)
    assert ((F.linear(x, W0).double() - merged.double()).abs() > bound(x, W, merged)).any()


@pytest.mark.parametrize("tokens", [1, 16, 17])
def test_few_tokens_are_decoded_in_inference_alone(tokens, monkeypatch):
    """In training y and dx are products with one W', so that the gradient is that of the function computed."""
    import hira.ops.triton as kernels

    monkeypatch.setattr(heuristics, "TRITON", "1")
    monkeypatch.setattr(heuristics, "triton", lambda tensor: True)
    calls = []
    for name in ("form", "decode"):
        kernel = getattr(kernels, name)
        monkeypatch.setattr(
            kernels, name, lambda *a, name=name, kernel=kernel, **k: calls.append(name) or kernel(*a, **k)
        )
    x, W0, A, B = randn(tokens, INTO), randn(OUT, INTO), randn(R, INTO).requires_grad_(), randn(OUT, R).requires_grad_()
    linear(x.requires_grad_(), W0, A, B).sum().backward()
    assert calls == ["form", "form"]
    calls.clear()
    with torch.no_grad():
        linear(x, W0, A, B)
    with torch.inference_mode():
        linear(x, W0, A, B)
    assert calls == (["decode"] if tokens <= heuristics.DECODED_TOKENS else ["form"]) * 2


@pytest.mark.parametrize("training", [True, False])
def test_reentrant_checkpointing_forms_the_same_weight_twice(training, monkeypatch):
    """Its first forward runs with gradients off, and is no inference all the same; generate() in training mode is."""
    import hira.ops.triton as kernels

    monkeypatch.setattr(heuristics, "TRITON", "1")
    monkeypatch.setattr(heuristics, "on_cpu", lambda device: False)
    monkeypatch.setattr(heuristics, "triton", lambda tensor: True)
    calls = []
    decode = kernels.decode
    monkeypatch.setattr(kernels, "decode", lambda *a: calls.append(1) or decode(*a))
    layer = hira.Linear(nn.Linear(INTO, OUT), "a", hira.HiraConfig(r=R, init_weights=False)).train(training)
    x = randn(3, INTO).requires_grad_()
    once = checkpoint(layer, x, use_reentrant=True)
    again = layer(x)
    if training:
        assert not calls
        assert torch.equal(once, again)
    else:
        assert len(calls) == 1
    calls.clear()
    with torch.no_grad(), hira.inference_cache.keep():
        layer(x)
    assert calls == [1]


@pytest.mark.parametrize("tokens", [1, 16])
def test_compiled_training_decodes_nothing_either(tokens, monkeypatch):
    import hira.ops.triton as kernels

    monkeypatch.setattr(heuristics, "TRITON", "1")
    monkeypatch.setattr(heuristics, "triton", lambda tensor: True)
    monkeypatch.setattr(kernels, "decode", lambda *a: pytest.fail("decoded"))
    x, W0, A, B = randn(tokens, INTO), randn(OUT, INTO), randn(R, INTO).requires_grad_(), randn(OUT, R).requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, W0, A, B), linear(x, W0, A, B))
