"""What a call of a base layer with a forward of its own leaves behind: attributes, memory, and nothing else."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from autograd_memory import address, kept_for_backward
from own_forwards import (
    EXACT,
    Cosine,
    Remembering,
    config,
    ids,
    modulated,
    output_hooked,
    replaced,
    vectors,
    with_weight,
)
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

import hira
from hira.ops import effective_weight


def test_what_a_forward_assigns_stays():
    layer, x = hira.Linear(Remembering(7, 5), "default", config()), torch.randn(3, 7)
    base = layer.get_base_layer()
    W0, attributes = base.weight, set(base.__dict__)
    for calls in (1, 2):
        layer(x)
        assert base.calls == calls
    assert torch.equal(base.seen, x)
    torch.testing.assert_close(base.mean, 1.5 * x.mean())
    assert base.weight is W0
    assert set(base.__dict__) == attributes | {"seen"}


def test_an_error_leaves_nothing_behind():
    layer = hira.Linear(Cosine(7, 5), "default", config())
    before = dict(layer.get_base_layer().__dict__)
    with pytest.raises(RuntimeError):
        layer(torch.randn(3, 6))
    assert layer.get_base_layer().__dict__ == before


def test_threads_share_a_layer():
    layer = hira.Linear(Cosine(7, 5), "default", config()).double()
    inputs, W = [vectors() for _ in range(64)], modulated(layer)
    wanted = [with_weight(layer, W, x) for x in inputs]
    with ThreadPoolExecutor(4) as threads:
        for found, exact in zip(threads.map(layer, inputs), wanted, strict=True):
            torch.testing.assert_close(found, exact, **EXACT)
    assert "weight" not in layer.get_base_layer().__dict__


def test_hooks_get_the_base_layer_itself():
    layer, seen = hira.Linear(nn.Linear(7, 5), "default", config()), []
    base = layer.get_base_layer()
    base.register_forward_pre_hook(lambda module, args: seen.append(module))
    base.register_forward_hook(lambda module, args, y: seen.append(module))
    layer(torch.randn(3, 7))
    assert len(seen) == 2
    assert all(module is base for module in seen)


def test_nothing_weight_sized_is_kept_but_the_weight():
    layer, x = hira.Linear(replaced(nn.Linear(64, 48)), "default", config()), torch.randn(5, 64)
    layer.get_base_layer().requires_grad_(False)
    W0 = layer.get_base_layer().weight
    kept = kept_for_backward(lambda: layer(x))
    assert kept.pop(address(W0)) == W0.nbytes
    assert max(kept.values()) < W0.nbytes


@pytest.mark.parametrize("base", [output_hooked(nn.Embedding(9, 5)), Gemma3TextScaledWordEmbedding(9, 5, 0, 7.0)])
def test_an_embedding_forms_the_rows_that_are_looked_up(base, monkeypatch):
    layer = hira.Embedding(base, "default", config())
    monkeypatch.setattr(effective_weight, "form", lambda *_, **__: pytest.fail("the whole table was formed"))
    rows: list[int] = []
    ops = sys.modules["hira.ops.embedding"]
    product = ops._product
    monkeypatch.setattr(ops, "_product", lambda found, *args: rows.append(len(found)) or product(found, *args))
    layer(ids()).sum().backward()
    assert rows
    assert set(rows) == {ids().numel()}
