"""W' kept while a model generates: when it is used, when it is formed anew, and when it is freed."""

from __future__ import annotations

import copy
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import GenerationMixin, LlamaConfig, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer

import hira
from hira import HiraConfig, inference_cache
from hira.ops import effective_weight


@pytest.fixture(autouse=True)
def _empty():
    assert inference_cache.nbytes == 0
    yield
    assert inference_cache.nbytes == 0


@pytest.fixture
def scope():
    with inference_cache.keep():
        yield


@pytest.fixture
def formed(monkeypatch):
    """The shapes of the weights that were formed, whole or a block at a time."""
    shapes, form = [], effective_weight._formed

    def counted(W0, *args, **kwargs):
        shapes.append(tuple(W0.shape))
        return form(W0, *args, **kwargs)

    monkeypatch.setattr(effective_weight, "_formed", counted)
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


def test_w_is_formed_once(scope, formed):
    layer = adapted()
    y = [generate(layer) for _ in range(4)]
    assert formed == [(5, 6)]
    assert inference_cache.nbytes == 5 * 6 * 4
    torch.testing.assert_close(y[3], expected(layer, X))
    assert torch.equal(y[0], y[3])


def test_under_inference_mode(scope, formed):
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
    "a scale": lambda layer: layer.set_scale("a", 0.5),
    "dropout": lambda layer: layer.hira_dropout.update({"a": nn.Dropout(1.0)}),  # in training, in a model that is not
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen(scope, change):
    layer = adapted()
    before = generate(layer)
    with torch.no_grad():
        change(layer)
    x = X.to(layer.base_layer.weight.dtype)
    after = generate(layer, x)
    torch.testing.assert_close(after, expected(copy.deepcopy(layer), x))
    if change is not CHANGES["merged"]:
        assert after.dtype != before.dtype or not torch.allclose(after, before)


WRITES = {
    "A": lambda layer: layer.hira_A["a"].data.zero_(),
    "an entry of B": lambda layer: layer.hira_B["a"].data[3, 1].add_(1),
    "an entry of W0": lambda layer: layer.base_layer.weight.data[2, 3].add_(1),
    "W0 by NumPy": lambda layer: layer.base_layer.weight.numpy().__imul__(2),
    "W0's data replaced": lambda layer: setattr(layer.base_layer.weight, "data", torch.ones(5, 6)),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_whatever_is_written_is_seen_by_the_next_scope(write):
    """What is written through .data or by NumPy leaves no trace but in the numbers."""
    layer = adapted()
    with inference_cache.keep():
        before = generate(layer)
    write(layer)
    with inference_cache.keep():
        after = generate(layer)
    torch.testing.assert_close(after, expected(layer, X))
    assert not torch.allclose(after, before)


def test_the_row_of_a_new_token_is_seen():
    layer = hira.Linear(
        nn.Linear(64, 3200, bias=False).requires_grad_(False), "a", HiraConfig(r=4, init_weights=False)
    ).eval()
    x = torch.randn(1, 64)
    with inference_cache.keep():
        generate(layer, x)
    layer.base_layer.weight.data[1234] += 1
    with inference_cache.keep():
        torch.testing.assert_close(generate(layer, x), expected(layer, x))


def test_nothing_is_kept_outside_of_a_scope(formed):
    layer = adapted()
    for _ in range(2):
        generate(layer)
    assert len(formed) == 2
    assert inference_cache.nbytes == 0
    assert not inference_cache.keeps


def test_nothing_is_kept_of_forwards_with_gradients(scope):
    layer = adapted()
    layer(X)
    assert inference_cache.nbytes == 0
    generate(layer)
    assert layer(X).requires_grad


def test_a_scope_ends_with_an_error_too_and_one_within_another_is_part_of_it(formed):
    layer = adapted()
    with pytest.raises(KeyError), inference_cache.keep():
        generate(layer)
        with inference_cache.keep():
            generate(layer)
        generate(layer)
        assert len(formed) == 1
        raise KeyError
    assert inference_cache.nbytes == 0


def test_an_error_while_forming_leaves_no_bytes_behind(scope, monkeypatch):
    layer = adapted()
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(effective_weight, "form", lambda *_, **__: (_ for _ in ()).throw(MemoryError()))
        generate(layer)
    assert inference_cache.nbytes == 0
    generate(layer)
    assert inference_cache.nbytes == 5 * 6 * 4


@pytest.mark.parametrize("tokens", [1, 40])
@torch.no_grad()
def test_dropout_in_training_drops_whatever_the_model_is_in(scope, tokens):
    """As in MC dropout, where the model is in evaluation mode and its dropout modules are not."""
    base = nn.Linear(6, 5).requires_grad_(False)
    layer = hira.Linear(base, "a", HiraConfig(r=2, init_weights=False, hira_dropout=0.5)).eval()
    x = torch.randn(tokens, 6)
    assert torch.equal(layer(x), layer(x))
    layer.hira_dropout["a"].train()
    assert not torch.equal(layer(x), layer(x))


@torch.no_grad()
def test_dropout_in_training_drops_in_a_mixed_batch_of_single_tokens():
    """Those of several adapters share one product, which has no dropout."""
    config = HiraConfig(r=2, init_weights=False, hira_dropout=0.5)
    layer = hira.Linear(nn.Linear(6, 5).requires_grad_(False), "a", config).eval()
    for name in "bc":
        layer.update_layer(name, 2, config)
    layer.eval().hira_dropout["b"].train()
    x, names = torch.randn(3, 1, 6), ["a", "b", "c"]
    first, second = layer(x, adapter_names=names), layer(x, adapter_names=names)
    assert [torch.equal(a, b) for a, b in zip(first, second, strict=True)] == [True, False, True]


@torch.no_grad()
def test_a_mixed_batch_keeps_a_weight_for_each_adapter(formed, monkeypatch):
    layer = hira.Linear(nn.Linear(6, 5).requires_grad_(False), "a", HiraConfig(r=2, init_weights=False)).eval()
    for name in "bc":
        layer.update_layer(name, 2, HiraConfig(r=2, init_weights=False))
    x, names = torch.randn(4, 1, 6), ["a", "b", "__base__", "c"]
    wanted = layer(x, adapter_names=names)
    formed.clear()
    with inference_cache.keep():
        for _ in range(3):
            torch.testing.assert_close(layer(x, adapter_names=names), wanted)
        assert len(formed) == 3
        assert inference_cache.nbytes == 3 * 5 * 6 * 4
    monkeypatch.setattr(inference_cache, "max_bytes", 5 * 6 * 4)  # for one of them; the others share a product
    with inference_cache.keep():
        torch.testing.assert_close(layer(x, adapter_names=names), wanted)
        assert len(formed) == 4


def test_a_long_prompt_starts_it(scope, formed):
    layer, many = adapted(), torch.randn(100, 6)
    wanted = expected(copy.deepcopy(layer), many)
    formed.clear()
    torch.testing.assert_close(generate(layer, many), wanted)
    generate(layer)
    assert len(formed) == 1


def test_it_is_bounded(scope, monkeypatch, formed):
    monkeypatch.setattr(inference_cache, "max_bytes", 2 * 5 * 6 * 4)
    layers = [adapted() for _ in range(3)]
    for layer in [*layers, *layers]:
        torch.testing.assert_close(generate(layer), expected(copy.deepcopy(layer), X))
    assert inference_cache.nbytes == 2 * 5 * 6 * 4
    monkeypatch.setattr(inference_cache, "max_bytes", 0)
    inference_cache.clear()
    generate(layers[0])
    assert inference_cache.nbytes == 0


def test_under_autocast(scope):
    layer = adapted()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = generate(layer)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, expected(copy.deepcopy(layer), X))
    assert generate(layer).dtype == torch.float32  # formed anew, in float32


def test_bfloat16(scope):
    layer = adapted(torch.bfloat16)
    torch.testing.assert_close(generate(layer, X.bfloat16()), expected(copy.deepcopy(layer), X.bfloat16()))


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_a_transposed_weight(scope, fan_in_fan_out):
    layer = hira.Linear(
        nn.Linear(6, 6).requires_grad_(False), "a", HiraConfig(r=2, init_weights=False), fan_in_fan_out=fan_in_fan_out
    ).eval()
    torch.testing.assert_close(generate(layer), expected(copy.deepcopy(layer), X))


def llama():
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=50
    )
    return LlamaForCausalLM(config)


CONFIG = HiraConfig(r=4, target_modules="all-linear", init_weights=False)


def added():
    model = llama()
    model.add_adapter(CONFIG)
    return model


MODELS = {"PeftModel": lambda: get_peft_model(llama(), CONFIG), "add_adapter": added}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_model_keeps_weights_while_it_generates(make, formed, monkeypatch):
    model = make().eval()
    ids = torch.randint(50, (1, 5))
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    options["eos_token_id"] = None
    seen = []

    class Streamer(BaseStreamer):
        def put(self, value):
            seen.append(inference_cache.nbytes)

        def end(self):
            pass

    kept = model.generate(input_ids=ids, streamer=Streamer(), **options)
    layers = [layer for layer in model.modules() if isinstance(layer, hira.Linear)]
    assert seen[-1] == sum(layer.get_base_layer().weight.nbytes for layer in layers)
    assert inference_cache.nbytes == 0
    assert len(formed) == len(layers)  # once for each, in a call of 12 tokens
    monkeypatch.setattr(inference_cache, "max_bytes", 0)
    assert torch.equal(model.generate(input_ids=ids, **options), kept)
    assert len(formed) == 13 * len(layers)


def test_generate_is_as_it_was_once_hira_is_unregistered():
    try:
        hira.unregister()
        plain = GenerationMixin.generate
    finally:
        hira.register()
    assert GenerationMixin.generate.__wrapped__ is plain


def test_threads_that_generate_at_once_stay_within_the_bound(monkeypatch):
    """All form weights at the same time: each has to reckon with those that are not formed yet."""
    threads, bound = 6, 4
    monkeypatch.setattr(inference_cache, "max_bytes", bound * 5 * 6 * 4)
    barrier, form, most = threading.Barrier(threads), effective_weight.form, []

    def slow(*args, **options):
        time.sleep(0.01)
        weight = form(*args, **options)
        most.append(inference_cache.nbytes)
        return weight

    monkeypatch.setattr(effective_weight, "form", slow)
    layers = [adapted() for _ in range(threads)]
    wanted = [expected(layer, X) for layer in layers]

    def work(k):
        with inference_cache.keep():
            barrier.wait()
            for _ in range(3):
                for layer, y in zip(layers, wanted, strict=True):
                    torch.testing.assert_close(generate(layer), y)
            barrier.wait()
            return sum(entry.weight.nbytes for entry in inference_cache._scope.entries.values())

    with ThreadPoolExecutor(threads) as pool:
        held = list(pool.map(work, range(threads)))
    assert sum(held) == bound * 5 * 6 * 4 == max(most)


def test_threads_see_each_others_changes():
    """What a thread keeps is its own: another that begins later forms W' of the weights as they are then."""
    layer = adapted()
    with inference_cache.keep():
        before = generate(layer)
        layer.base_layer.weight.data.mul_(2)

        def other():
            with inference_cache.keep():
                return generate(layer)

        with ThreadPoolExecutor(1) as pool:
            after = pool.submit(other).result()
    torch.testing.assert_close(after, expected(layer, X))
    assert not torch.allclose(before, after)


def test_clearing_frees_what_all_threads_keep():
    layer = adapted()
    with inference_cache.keep():
        generate(layer)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(inference_cache.clear).result()
        assert inference_cache.nbytes == 0
        generate(layer)
        assert inference_cache.nbytes == 5 * 6 * 4
