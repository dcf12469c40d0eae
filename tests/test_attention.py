"""HiRA on nn.MultiheadAttention, against PyTorch's own with W' put in its place."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from attending import (
    BATCH,
    CASES,
    EXACT,
    FIRST,
    HEADS,
    LENGTH,
    OWN,
    WIDTH,
    Attending,
    adapted,
    assert_same,
    causal,
    config,
    every_case,
    expected,
    gradients,
    modulated,
    padding,
    self_attention,
    x,
)
from autograd_memory import address, kept_for_backward
from oracle import error
from peft import get_peft_model
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import hira
from hira import HiraConfig
from hira.ops.recompute import formed


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@every_case
def test_outputs_and_gradients(case, training):
    options, inputs, others = CASES[case]
    model, layer, plain = adapted(**options)
    model.train(training), plain.train(training)
    args, kwargs = inputs(), others()
    torch.manual_seed(1)
    found = model(*args, **kwargs)
    torch.manual_seed(1)
    wanted = expected(layer, plain, args, kwargs)
    assert_same(found, wanted)
    tensors = [*{id(t): t for t in args}.values(), *(p for p in model.parameters() if p.requires_grad)]
    assert len(tensors) in (5, 6, 7)
    assert_same(gradients(found, tensors), gradients(wanted, tensors))
    assert not torch.allclose(found[0], plain(*args, **kwargs)[0], atol=1e-3)


@every_case
def test_without_gradients(case, monkeypatch):
    """PyTorch's fast path, where it is taken, multiplies by W' too."""
    fast = []
    native = torch._native_multi_head_attention
    monkeypatch.setattr(torch, "_native_multi_head_attention", lambda *args: fast.append(1) or native(*args))
    options, inputs, others = CASES[case]
    model, layer, plain = adapted(**options)
    model.eval(), plain.eval()
    args, kwargs = inputs(), others()
    with torch.no_grad():
        wanted = expected(layer, plain, args, kwargs)
        before = len(fast)
        assert_same(model(*args, **kwargs), wanted)
    assert len(fast) - before == before
    assert before == (1 if case in ("batch first", "padding", "boolean mask", "no weights") else before)


@pytest.mark.parametrize("case", ["batch first", "memory", "three inputs", "causal"])
def test_compiled(case):
    options, inputs, others = CASES[case]
    model, _, _ = adapted(**options)
    args, kwargs = inputs(), others()
    tensors = [*{id(t): t for t in args}.values(), *(p for p in model.parameters() if p.requires_grad)]
    eager = model(*args, **kwargs)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(*args, **kwargs)
    assert_same(compiled, eager)
    assert_same(gradients(compiled, tensors), gradients(eager, tensors))


def test_keywords_alone():
    model, layer, plain = adapted()
    query = x(LENGTH, BATCH, WIDTH)
    kwargs = {"query": query, "key": query, "value": query}
    assert_same(model(**kwargs), expected(layer, plain, (), kwargs))


def test_several_adapters_add_up():
    model, layer, plain = adapted()
    model.add_adapter("other", config(r=1))
    args = self_attention(LENGTH, BATCH, WIDTH)
    for names in (("default",), ("other",), ("default", "other")):
        model.base_model.set_adapter(list(names))
        assert_same(model(*args), expected(layer, plain, args, {}, names))
    with model.disable_adapter():
        assert_same(model(*args), plain(*args))
        assert layer.in_proj_weight is layer.base_layer.in_proj_weight
    model.delete_adapter("default")
    assert_same(model(*args), expected(layer, plain, args, {}, ("other",)))
    assert not model.base_model.model.attn.out_proj.storage.stored.requires_grad


@pytest.mark.parametrize("init_weights", [True, None, "gaussian"])
def test_starts_change_nothing(init_weights):
    base = Attending().double()
    args = self_attention(LENGTH, BATCH, WIDTH)
    before = base(*args)
    model = get_peft_model(base, config(init_weights=init_weights))
    assert_same(model(*args), before)
    assert all(p.requires_grad == ("hira_" in name) for name, p in model.named_parameters())


def weights_of(layer: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    found = {
        "in_proj_weight": modulated(layer, ("default",)),
        "out_proj.weight": modulated(layer.out_proj, ("default",)),
    }
    return {name: weight.to(dtype) for name, weight in found.items()}


def test_bfloat16_is_as_near_as_plain_attention():
    model, layer, plain = adapted(torch.bfloat16, **OWN)
    query = torch.randn(8, 16, WIDTH).bfloat16()
    dense = torch.func.functional_call(plain, weights_of(layer, torch.bfloat16), (query,) * 3)[0]
    twice = weights_of(layer, torch.float64), (query.double(),) * 3
    exact = torch.func.functional_call(copy.deepcopy(plain).double(), *twice)[0]
    found = model(query, query, query)[0]
    assert found.dtype == torch.bfloat16
    assert error(found, exact) < 1.5 * error(dense, exact)


def test_autocast():
    """W' comes out as autocast would round it; its own low bits spread the rounding of a float32 weight."""
    model, layer, plain = adapted(torch.float32, **OWN)
    query = torch.randn(8, 16, WIDTH)
    weights = weights_of(layer, torch.float32)
    tensors = [p for p in model.parameters() if p.requires_grad]
    with torch.autocast("cpu", torch.bfloat16):
        found = model(query, query, query)[0]
        dense = torch.func.functional_call(plain, weights, (query,) * 3)[0]
    assert found.dtype == dense.dtype == torch.bfloat16
    torch.testing.assert_close(found, dense)
    exact = torch.func.functional_call(plain, weights, (query,) * 3)[0]
    for mine, theirs, true in zip(
        *(torch.autograd.grad(y.float().square().sum(), tensors, retain_graph=True) for y in (found, dense, exact)),
        strict=True,
    ):
        assert error(mine, true) < 1.5 * error(theirs, true)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("shared", [3, 2, 1], ids=["self", "memory", "three inputs"])
def test_nothing_weight_sized_is_kept_but_the_base_weights(shared, autocast):
    model, layer, plain = adapted(torch.float32, **OWN)
    query, *keys = (torch.randn(3, length, WIDTH, requires_grad=True) for length in (5, 7, 7))
    args = {3: (query,) * 3, 2: (query, keys[0], keys[0]), 1: (query, *keys)}
    weights = weights_of(layer, torch.float32)

    def run(attention: Callable[..., Any]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return attention(*args[shared])[0]

    kept = kept_for_backward(lambda: run(model))
    bases = {address(layer.storage.stored), address(layer.out_proj.storage.stored)}
    assert bases <= kept.keys()
    # the output's weight, and those of one, two or all of query, key and value
    sizes = {parts * WIDTH * WIDTH * (2 if autocast else 4) for parts in (1, 2, 3)}
    assert not sizes & {size for place, size in kept.items() if place not in bases}
    dense = kept_for_backward(lambda: run(lambda *args: torch.func.functional_call(plain, weights, args)))
    assert sizes & set(dense.values())


@every_case
def test_w_is_freed_after_the_forward(case, monkeypatch):
    storages = []

    def form(*args):
        found = formed(*args)
        storages.append(StorageWeakRef(found.weight.untyped_storage()))
        return found

    monkeypatch.setattr(hira.layers.attention, "formed", form)
    options, inputs, others = CASES[case]
    model, _, _ = adapted(**options)
    outputs = model(*inputs(), **others())
    assert outputs[0].requires_grad
    assert [storage.expired() for storage in storages] == [True, True]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
    model, _, _ = adapted(dropout=0.5)
    args = self_attention(LENGTH, BATCH, WIDTH)
    tensors = [args[0], *(p for p in model.parameters() if p.requires_grad)]

    def run(query):
        return model(query, query, query)

    torch.manual_seed(1)
    wanted = run(args[0])
    torch.manual_seed(1)
    found = checkpoint(run, args[0], use_reentrant=use_reentrant)
    assert_same(found, wanted)
    if use_reentrant:  # which is for backward() alone
        found[0].sum().backward()
        grads = [t.grad.clone() for t in tensors]
        for t in tensors:
            t.grad = None
        wanted[0].sum().backward()
        assert_same(tuple(grads), tuple(t.grad for t in tensors))
    else:
        assert_same(gradients(found, tensors), gradients(wanted, tensors))


def test_a_checkpoint_keeps_nothing_of_attention():
    model, _, _ = adapted(torch.float32)
    query = torch.randn(64, BATCH, WIDTH, requires_grad=True)

    def run(query):
        return model(query, query, query)[0]

    plain = kept_for_backward(lambda: run(query))
    kept = kept_for_backward(lambda: checkpoint(run, query, use_reentrant=False))
    probabilities = BATCH * HEADS * 64 * 64 * 4
    assert probabilities in plain.values()
    assert max(kept.values(), default=0) <= query.nbytes


def test_the_base_layer_is_not_touched():
    """Threads share a base layer, hooks on it run, and an error leaves nothing behind."""
    model, layer, plain = adapted(**OWN)
    base = layer.base_layer
    before, parameters = dict(base.__dict__), dict(base._parameters)
    inputs = [self_attention(*FIRST) for _ in range(16)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda args: model(*args), inputs))
    for args, outputs in zip(inputs, found, strict=True):
        assert_same(outputs, expected(layer, plain, args, {}))
    with pytest.raises(AssertionError, match="attn_mask"):
        model(*inputs[0], attn_mask=torch.zeros(1, 2, 3, 4).double())
    assert base.__dict__ == before
    assert all(base._parameters[name] is parameter for name, parameter in parameters.items())
    seen = []
    handle = base.register_forward_hook(lambda module, args, output: seen.append(output))
    outputs = model(*inputs[0])
    assert_same(outputs, seen[0])
    handle.remove()


class Counting(nn.MultiheadAttention):
    """Assigns attributes, and a buffer, in its forward."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.calls = self.calls + 1
        self.seen = query
        return super().forward(query, *args, **kwargs)


def test_what_a_forward_assigns_stays():
    body = Attending()
    body.attn = Counting(WIDTH, HEADS)
    model = get_peft_model(body, config())
    layer, args = model.base_model.model.attn, self_attention(LENGTH, BATCH, WIDTH)
    args = tuple(x.float() for x in args)
    for _ in range(2):
        model(*args)
    assert layer.base_layer.calls == 2
    assert layer.base_layer.seen is args[0]
    assert dict(layer.base_layer.named_buffers())["calls"] == 2
    assert isinstance(layer.base_layer.out_proj, hira.Linear)


def test_a_forward_replaced_on_the_instance():
    """As accelerate does to move inputs to the device of a module."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    model, layer, plain = adapted(**OWN)
    add_hook_to_module(layer.base_layer, ModelHook())
    add_hook_to_module(layer.out_proj.base_layer, ModelHook())
    args = self_attention(*FIRST)
    found, wanted = model(*args), expected(layer, plain, args, {})
    assert_same(found, wanted)
    tensors = [p for p in model.parameters() if p.requires_grad]
    assert_same(gradients(found, tensors), gradients(wanted, tensors))


def test_second_derivatives():
    """Gradient penalties on x and on A are those of the dense formula."""
    model, layer, plain = adapted()
    args = self_attention(LENGTH, BATCH, WIDTH)
    tensors = [args[0], *(p for p in model.parameters() if p.requires_grad)]
    penalties = []
    for y in (model(*args)[0], expected(layer, plain, args, {})[0]):
        (dx,) = torch.autograd.grad(y.square().sum(), args[0], create_graph=True)
        penalties.append(torch.autograd.grad(dx.square().sum(), tensors))
    assert_same(*penalties)
    A, penalties = layer.hira_A["default"], []
    for y in (model(*args)[0], expected(layer, plain, args, {})[0]):
        (dA,) = torch.autograd.grad(y.square().sum(), A, create_graph=True)
        penalties.append(torch.autograd.grad(dA.square().sum(), tensors))
    assert_same(*penalties)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(copied):
    model, layer, _ = adapted()
    args = self_attention(LENGTH, BATCH, WIDTH)
    twin = copied(model)
    assert_same(twin(*args), model(*args))
    with torch.no_grad():
        layer.hira_B["default"].zero_()
    assert not torch.allclose(twin(*args)[0], model(*args)[0], atol=1e-3)


def test_attributes():
    _, layer, plain = adapted(add_bias_kv=True, batch_first=True, dropout=0.25)
    for name in ("embed_dim", "kdim", "vdim", "num_heads", "head_dim", "dropout", "batch_first", "add_zero_attn"):
        assert getattr(layer, name) == getattr(plain, name)
    assert layer._qkv_same_embed_dim is True
    for name in ("in_proj_bias", "bias_k", "bias_v"):
        assert torch.equal(getattr(layer, name), getattr(plain, name))
    assert not hasattr(layer, "weight")
    args = causal(), padding(), torch.randn(*FIRST)
    mask, kind = layer.merge_masks(*args)
    assert torch.equal(mask, plain.merge_masks(*args)[0])
    assert kind == plain.merge_masks(*args)[1]
    torch.testing.assert_close(layer.in_proj_weight, modulated(layer, ("default",)), **EXACT)
    torch.testing.assert_close(layer.out_proj.weight, modulated(layer.out_proj, ("default",)), **EXACT)
    torch.testing.assert_close(layer.get_additive_delta("default"), layer.in_proj_weight - plain.in_proj_weight)


def with_w(base: nn.Module, model: Any) -> nn.Module:
    """A copy of a model with W' in the place of every adapted weight."""
    base = copy.deepcopy(base)
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, hira.HiraLayer):
            name = name.replace("base_layer.", "")
            attribute = layer.storage.name
            getattr(base.get_submodule(name), attribute).data.copy_(modulated(layer, ("default",)).detach())
    return base


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_encoders_and_decoders(training, batch_first):
    options = {"dropout": 0.0, "batch_first": batch_first, "dtype": torch.float64}
    encoder = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, **options)
    decoder = nn.TransformerDecoderLayer(WIDTH, HEADS, 16, **options)
    targets = ["self_attn", "multihead_attn", "linear1"]
    query = torch.randn(*FIRST).double()
    for base, args in ((encoder, (query,)), (decoder, (query, query.flip(0)))):
        before = copy.deepcopy(base).train(training)(*args).detach()
        wanted = copy.deepcopy(base)
        model = get_peft_model(base, HiraConfig(r=2, target_modules=targets, init_weights=False)).train(training)
        wanted = with_w(wanted, model).train(training)(*args)
        found = model(*args)
        torch.testing.assert_close(found, wanted, **EXACT)
        assert not torch.allclose(found, before, atol=1e-3)
        with torch.no_grad():
            torch.testing.assert_close(model(*args), wanted, **EXACT)


def test_the_fast_path_of_torchs_encoder(monkeypatch):
    """With padding it computes on nested tensors, in layers that call neither attention nor its parts."""
    fast = []
    native = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *args: fast.append(1) or native(*args))
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, dropout=0.0, batch_first=True)
    base = nn.TransformerEncoder(layer, 2)
    plain = copy.deepcopy(base)
    model = get_peft_model(base, HiraConfig(r=2, target_modules=["self_attn", "linear2"], init_weights=False)).eval()
    query, keep = torch.randn(*FIRST), ~padding()
    with torch.no_grad():
        wanted = with_w(plain, model).train()(query, src_key_padding_mask=~keep)
        assert not fast
        found = model(query, src_key_padding_mask=~keep)
        assert len(fast) == 2
        before = plain.eval()(query, src_key_padding_mask=~keep)
    torch.testing.assert_close(found[keep], wanted[keep], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[keep], before[keep], atol=1e-2)
