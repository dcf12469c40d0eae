"""W' kept between the forwards of generation: when it is used, when it is formed anew, and when it is freed."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import hira
from hira import HiraConfig, inference_cache
from hira.ops import modulate, paths


@pytest.fixture(autouse=True)
def _empty():
    inference_cache.clear()
    yield
    inference_cache.clear()


@pytest.fixture
def formed(monkeypatch):
    """The shapes of the weights that were formed, whole or a block at a time."""
    shapes, block = [], modulate.block

    def counted(W0, *args, **kwargs):
        shapes.append(tuple(W0.shape))
        return block(W0, *args, **kwargs)

    monkeypatch.setattr(modulate, "block", counted)
    monkeypatch.setattr(sys.modules["hira.ops.linear"], "block", counted)
    return shapes


def adapted(dtype=torch.float32, **options):
    base = nn.Linear(6, 5).to(dtype).requires_grad_(False)
    return hira.Linear(base, "a", HiraConfig(r=2, init_weights=False), **options).eval()


X = torch.randn(3, 6)


def expected(layer, x):
    """The layer's output as in training."""
    return layer(x).detach()


@torch.no_grad()
def generate(layer, x=X):
    return layer(x)


def test_w_is_formed_once(formed):
    layer = adapted()
    y = [generate(layer) for _ in range(4)]
    assert formed == [(5, 6)]
    assert inference_cache.nbytes == 5 * 6 * 4
    torch.testing.assert_close(y[3], expected(layer, X))
    assert torch.equal(y[0], y[3])


def test_under_inference_mode(formed):
    layer = adapted()
    with torch.inference_mode():
        layer(X)
        layer(X)
    assert len(formed) == 1
    torch.testing.assert_close(generate(layer), expected(layer, X))


CHANGES = {
    "A in place": lambda layer: layer.hira_A["a"].mul_(2),
    "B in place": lambda layer: layer.hira_B["a"].add_(1),
    "W0 in place": lambda layer: layer.base_layer.weight.mul_(3),
    "A's data replaced": lambda layer: setattr(layer.hira_A["a"], "data", torch.ones(2, 6)),
    "a new W0": lambda layer: setattr(layer.base_layer, "weight", nn.Parameter(torch.randn(5, 6))),
    "a state dict": lambda layer: layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()}),
    "an adapter more": lambda layer: (
        layer.update_layer("b", 3, HiraConfig(init_weights=False)),
        layer.set_adapter(["a", "b"]),
    ),
    "no adapter": lambda layer: layer.enable_adapters(False),
    "merged": lambda layer: layer.merge(),
    "deleted": lambda layer: layer.delete_adapter("a"),
    "reset": lambda layer: layer.reset_hira_parameters("a", True),
    "another dtype": lambda layer: layer.double(),
    "A through .data": lambda layer: layer.hira_A["a"].data.zero_(),
    "an entry of B through .data": lambda layer: layer.hira_B["a"].data[3, 1].add_(1),
    "W0 through .data": lambda layer: layer.base_layer.weight.data.mul_(2),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen(change):
    layer = adapted()
    before = generate(layer)
    with torch.no_grad():
        change(layer)
    x = X.to(layer.base_layer.weight.dtype)
    after = generate(layer, x)
    torch.testing.assert_close(after, expected(copy.deepcopy(layer), x))
    if change is not CHANGES["merged"]:
        assert after.dtype != before.dtype or not torch.allclose(after, before)


def test_not_in_training(formed):
    layer = adapted()
    layer.train()
    generate(layer)
    assert inference_cache.nbytes == 0
    layer.eval()
    layer(X)  # with gradients
    assert inference_cache.nbytes == 0
    generate(layer)
    assert inference_cache.nbytes > 0
    layer.train()
    assert inference_cache.nbytes == 0


def test_a_training_forward_in_evaluation_mode_frees_it():
    """Some optimisers write through .data, which leaves no trace."""
    layer = adapted()
    generate(layer)
    layer(X)
    assert inference_cache.nbytes == 0


def test_many_tokens_do_not_start_it_but_use_it(formed):
    layer, many = adapted(), torch.randn(paths.FEW_TOKENS + 1, 6)
    generate(layer, many)
    assert inference_cache.nbytes == 0
    generate(layer)
    formed.clear()
    torch.testing.assert_close(generate(layer, many), expected(copy.deepcopy(layer), many))


def test_it_is_bounded(monkeypatch, formed):
    monkeypatch.setattr(inference_cache, "max_bytes", 2 * 5 * 6 * 4)
    layers = [adapted() for _ in range(3)]
    for layer in [*layers, *layers]:
        torch.testing.assert_close(generate(layer), expected(copy.deepcopy(layer), X))
    assert inference_cache.nbytes == 2 * 5 * 6 * 4
    monkeypatch.setattr(inference_cache, "max_bytes", 0)
    inference_cache.clear()
    generate(layers[0])
    assert inference_cache.nbytes == 0


def test_it_goes_with_its_layer():
    layer = adapted()
    generate(layer)
    del layer
    gc.collect()
    assert inference_cache.nbytes == 0


def test_copies_have_none():
    layer = adapted()
    generate(layer)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert inference_cache.nbytes == 5 * 6 * 4
        assert torch.equal(generate(copied), generate(layer))
        inference_cache.discard(copied)


def test_under_autocast():
    layer = adapted()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = generate(layer)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, expected(copy.deepcopy(layer), X))
    assert generate(layer).dtype == torch.float32  # formed anew, in float32


def test_bfloat16():
    layer = adapted(torch.bfloat16)
    torch.testing.assert_close(generate(layer, X.bfloat16()), expected(copy.deepcopy(layer), X.bfloat16()))


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_a_transposed_weight(fan_in_fan_out):
    layer = hira.Linear(
        nn.Linear(6, 6).requires_grad_(False), "a", HiraConfig(r=2, init_weights=False), fan_in_fan_out=fan_in_fan_out
    ).eval()
    torch.testing.assert_close(generate(layer), expected(copy.deepcopy(layer), X))


def test_a_model_generates_as_without():
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=50
    )
    model = get_peft_model(
        LlamaForCausalLM(config), HiraConfig(r=4, target_modules="all-linear", init_weights=False)
    ).eval()
    ids = torch.randint(50, (1, 5))
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    kept = model.generate(input_ids=ids, **options)
    assert inference_cache.nbytes == sum(
        layer.get_base_layer().weight.nbytes for layer in model.modules() if isinstance(layer, hira.Linear)
    )
    inference_cache.clear()
    size, inference_cache.max_bytes = inference_cache.max_bytes, 0
    try:
        assert torch.equal(model.generate(input_ids=ids, **options), kept)
    finally:
        inference_cache.max_bytes = size


def test_merging_and_disabling_free_it():
    layer = adapted()
    generate(layer)
    layer.merge()
    generate(layer)
    assert inference_cache.nbytes == 0
    layer.unmerge()
    generate(layer)
    assert inference_cache.nbytes > 0
    layer.enable_adapters(False)
    generate(layer)
    assert inference_cache.nbytes == 0


def test_threads_may_generate_at_once():
    layers = [adapted() for _ in range(40)]

    def work(seed):
        for k in range(200):
            generate(layers[(7 * k + seed) % 40])
            if k % 10 == 0:
                inference_cache.discard(layers[(3 * k + seed) % 40])

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(6) as threads:
            list(threads.map(work, range(6)))
    finally:
        sys.setswitchinterval(interval)
    assert inference_cache.nbytes <= 40 * 5 * 6 * 4
