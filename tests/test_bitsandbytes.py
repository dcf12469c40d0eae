"""What is particular to the layers of bitsandbytes; the laws of all storages are in test_storages."""

from __future__ import annotations

import copy
import pickle
import sys
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from oracle import error
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import hira
from hira import HiraError, ops
from hira.layers.bitsandbytes import Linear4bit, Linear8bitLt, dispatch_bnb_4bit, dispatch_bnb_8bit
from hira.ops import reference

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
    pytest.mark.filterwarnings("ignore:Already following adapters were merged"),
]

IN, OUT, R = 128, 64, 3
FOUR_BIT = [(kind, double) for kind in ("nf4", "fp4") for double in (True, False)]


def base_4bit(kind: str = "nf4", double: bool = True, compute: torch.dtype | None = torch.float32, **options) -> Any:
    dense = nn.Linear(IN, OUT, **options)
    layer = bnb.nn.Linear4bit(IN, OUT, quant_type=kind, compress_statistics=double, compute_dtype=compute, **options)
    layer.load_state_dict(dense.state_dict())
    return layer.to("cpu")


def base_8bit(**options) -> Any:
    dense = nn.Linear(IN, OUT, **options)
    layer = bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False, **options)
    layer.load_state_dict(dense.state_dict())
    return layer.to("cpu")


BASES = {"4-bit": base_4bit, "8-bit": base_8bit}


def adapted(base: nn.Module, names: tuple[str, ...] = ("default",)) -> Any:
    dispatch = dispatch_bnb_4bit if isinstance(base, bnb.nn.Linear4bit) else dispatch_bnb_8bit
    layer: Any = dispatch(base, names[0], hira_config=hira.HiraConfig(r=R, init_weights=False))
    for name in names[1:]:
        layer.update_layer(name, R + 1, hira.HiraConfig(r=R + 1, init_weights=False))
    layer.set_adapter(list(names))
    return layer


def dense_weight(base: Any) -> Tensor:
    """W0 by bitsandbytes' own functions."""
    if isinstance(base, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state)
    codes, scales = (base.weight.data, base.weight.SCB) if base.state.CB is None else (base.state.CB, base.state.SCB)
    return bnb.functional.int8_vectorwise_dequant(codes, scales)


def stored(base: Any) -> list[Tensor]:
    """Copies of all that the weight is stored as."""
    if isinstance(base, bnb.nn.Linear8bitLt):
        state, weight = base.state, base.weight
        return [weight.data.clone(), (weight.SCB if state.SCB is None else state.SCB).clone()]
    assert base.quant_state is base.weight.quant_state
    state = base.weight.quant_state.as_dict(packed=True)
    return [base.weight.data.clone(), *(value.clone() for _, value in sorted(state.items()))]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def factors(layer: Any, *names: str) -> tuple[Tensor, Tensor]:
    """A and B of some adapters, joined."""
    A = torch.cat([layer.hira_A[name].detach() for name in names])
    return A, torch.cat([layer.hira_B[name].detach() for name in names], dim=1)


# Forward and backward


def test_4bit_without_a_compute_dtype_follows_the_input():
    layer = adapted(base_4bit(compute=None))
    W = reference.modulated_weight(dense_weight(layer.get_base_layer()), *factors(layer, "default"))
    x = torch.randn(3, IN)
    torch.testing.assert_close(layer(x), F.linear(x, W, layer.bias))
    assert layer(x.bfloat16()).dtype == torch.bfloat16


# Merging


@pytest.mark.parametrize(("kind", "double"), FOUR_BIT)
def test_4bit_merges_the_sum(kind, double):
    layer = adapted(base_4bit(kind, double), ("a", "b"))
    base = layer.get_base_layer()
    W0, old = dense_weight(base), base.weight
    A, B = factors(layer, "a", "b")
    dense = ops.modulated_weight(W0, A, B)
    codes, state = bnb.functional.quantize_4bit(
        dense, blocksize=old.blocksize, compress_statistics=double, quant_type=kind
    )
    layer.merge()
    assert torch.equal(base.weight.data, codes)
    assert torch.equal(dense_weight(base), bnb.functional.dequantize_4bit(codes, state))
    assert base.quant_state is base.weight.quant_state
    for name in ("blocksize", "compress_statistics", "quant_type", "quant_storage", "requires_grad"):
        assert getattr(base.weight, name) == getattr(old, name)
    # W' (1 + d1 + d2) to the error of 4-bit storage, which the product (1 + d1)(1 + d2) is beyond
    exact = W0 * (1 + reference.delta(A, B))
    product = W0 * (1 + reference.delta(*factors(layer, "a"))) * (1 + reference.delta(*factors(layer, "b")))
    assert error(dense_weight(base), exact) < 0.15 < error(product, exact)


@pytest.mark.parametrize("bits", BASES)
def test_a_merge_that_fails(bits, monkeypatch):
    layer = adapted(BASES[bits](), ("a", "b"))
    base = layer.get_base_layer()
    layer.merge(adapter_names=["a"])
    before, weight = stored(base), base.weight

    def fail(*_):
        raise RuntimeError("no memory")

    monkeypatch.setattr(layer, "_effective_weight", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        layer.merge(adapter_names=["b"])
    assert base.weight is weight
    assert same(stored(base), before)
    assert layer.merged_adapters == ["a"]


def test_a_packed_weight_replaced_while_merged_is_kept():
    layer = adapted(base_4bit())
    base = layer.get_base_layer()
    layer.merge()
    torch.manual_seed(1)
    other = base_4bit()
    base.weight, base.quant_state = other.weight, other.quant_state
    with pytest.warns(UserWarning, match=r"replaced.*'default'"):
        layer.unmerge()
    assert base.weight is other.weight
    assert same(stored(base), stored(other))


# A weight that bitsandbytes repacks for its CPU kernel, as it does on processors with AVX512-BF16


def repack(base: Any) -> Tensor:
    """Repack the weight as bitsandbytes does; returns W0 after it, its codes times scales that are rounded."""
    state = base.weight.quant_state
    scales = state.absmax
    if state.nested:
        scales = bnb.functional.dequantize_blockwise(scales, state.state2) + state.offset
    plain = bnb.functional.QuantState(
        absmax=scales.bfloat16().float(),
        shape=state.shape,
        code=state.code,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=state.dtype,
    )
    W0: Tensor = bnb.functional.dequantize_4bit(base.weight.data, plain)
    packed, _ = bnb.functional._convert_weight_packed_for_cpu(base.weight.data, state)
    base.weight.data = packed
    return W0


@pytest.mark.parametrize(("kind", "double"), FOUR_BIT)
def test_a_weight_that_was_repacked_is_read(kind, double):
    layer = adapted(base_4bit(kind, double))
    base, (A, B) = layer.get_base_layer(), factors(layer, "default")
    W0 = repack(base)
    packed = base.weight.data.clone()
    x, dy = torch.randn(3, IN, requires_grad=True), torch.randn(3, OUT)
    for _ in range(2):
        assert torch.equal(layer.storage.read(), W0)
        wanted = F.linear(x, reference.modulated_weight(W0, A, B), base.bias)
        torch.testing.assert_close(layer(x), wanted)
        torch.testing.assert_close(torch.autograd.grad(layer(x), x, dy), torch.autograd.grad(wanted, x, dy))
    assert base.weight.quant_state.packing_format_for_cpu
    assert torch.equal(base.weight.data, packed)


@pytest.mark.parametrize(("kind", "double"), FOUR_BIT)
def test_a_weight_that_is_repacked_before_backward(kind, double):
    layer = adapted(base_4bit(kind, double))
    x, dy = torch.randn(3, IN, requires_grad=True), torch.randn(3, OUT)
    trained = (x, layer.hira_A["default"], layer.hira_B["default"])
    wanted = torch.autograd.grad(layer(x), trained, dy)
    y = layer(x)
    repack(layer.get_base_layer())
    for found, exact in zip(torch.autograd.grad(y, trained, dy), wanted, strict=True):
        assert error(found, exact) < 2**-8  # the scales are rounded to bfloat16


@pytest.mark.parametrize(("kind", "double"), FOUR_BIT)
def test_a_repacked_weight_is_merged_and_put_back(kind, double):
    layer = adapted(base_4bit(kind, double), ("a", "b"))
    base = layer.get_base_layer()
    W0 = repack(base)
    weight, packed = base.weight, base.weight.data.clone()
    options = {"blocksize": weight.blocksize, "compress_statistics": double, "quant_type": kind}
    for names in (["a"], ["b", "a"]):
        merged = bnb.functional.quantize_4bit(ops.modulated_weight(W0, *factors(layer, *names)), **options)
        layer.merge(adapter_names=names)
        assert torch.equal(layer.storage.read(), bnb.functional.dequantize_4bit(*merged))
        repack(base)  # the merged weight too
        layer.unmerge()
        assert base.weight is weight
        assert base.quant_state is weight.quant_state
        assert weight.quant_state.packing_format_for_cpu
        assert torch.equal(weight.data, packed)
        assert torch.equal(layer.storage.read(), W0)


@pytest.mark.parametrize(("kind", "double"), FOUR_BIT)
def test_a_weight_that_was_repacked_before_it_is_adapted(kind, double):
    base = base_4bit(kind, double)
    W0 = repack(base)
    layer: Any = hira.layers.dispatch.dispatch(
        base, "default", hira_config=hira.HiraConfig(r=R, init_weights=False, hira_dropout=0.5)
    )
    assert torch.equal(dense_weight(base), W0)
    x, dy = torch.randn(3, IN, requires_grad=True), torch.randn(3, OUT)
    layer.hira_dropout["default"].forward = lambda x: x
    # with dropout the base layer's own product is part of the sum, which has no gradient where the weight is repacked
    wanted = F.linear(x, W0 * (1 + reference.delta(*factors(layer, "default"))), base.bias)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-5)
    for found, exact in zip(torch.autograd.grad(layer(x), x, dy), torch.autograd.grad(wanted, x, dy), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)
    saved = {name.removeprefix("weight."): value for name, value in base.state_dict().items()}
    codes, _ = saved.pop("weight"), saved.pop("bias")
    loaded = bnb.nn.Params4bit.from_prequantized(codes, saved, device="cpu")
    assert torch.equal(bnb.functional.dequantize_4bit(loaded.data, loaded.quant_state), W0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_of_a_repacked_layer(copied):
    layer = adapted(base_4bit())
    W0 = repack(layer.get_base_layer())
    x = torch.randn(3, IN)
    other = copied(layer)
    assert torch.equal(other(x), layer(x))
    other.merge()
    assert torch.equal(layer.storage.read(), W0)
    other.unmerge()
    assert torch.equal(other.storage.read(), W0)


@pytest.mark.parametrize("available", [True, False])
def test_only_merged_and_unloaded_weights_may_be_repacked(available, monkeypatch):
    monkeypatch.setattr(bnb.functional, "has_avx512bf16", lambda: available)
    base = base_4bit()
    base.support_avx512bf16_for_cpu = available
    layer, x = adapted(base, ("a", "b")).eval(), torch.randn(3, IN)
    before, y = stored(base), layer(x)
    with torch.no_grad():
        layer.enable_adapters(False)
        layer(x)
        layer.enable_adapters(True)
        layer(x, adapter_names=["a", "__base__", "b"])
    assert same(stored(base), before)
    assert torch.equal(layer(x), y)
    layer.merge()
    assert base.support_avx512bf16_for_cpu == available
    layer.unmerge()
    assert not base.support_avx512bf16_for_cpu
    layer.unload_and_optionally_merge_module(merge=False, safe_merge=False, adapter_names=None)
    assert base.support_avx512bf16_for_cpu == available


# Models


class Body(nn.Module):
    def __init__(self, bits: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = BASES[bits]()
        self.act = nn.Tanh()
        self.second = nn.Linear(OUT, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.act(self.first(x)))


def config(**options) -> peft.HiraConfig:
    return peft.HiraConfig(**{"r": R, "target_modules": ["first", "second"], "init_weights": False, **options})


@pytest.mark.parametrize("bits", BASES)
def test_an_adapter_is_saved_and_loaded(bits, tmp_path):
    model, x = get_peft_model(Body(bits), config()).eval(), torch.randn(4, IN)
    assert type(model.base_model.model.first) is {"4-bit": Linear4bit, "8-bit": Linear8bitLt}[bits]
    assert type(model.base_model.model.second) is hira.Linear
    y = model(x)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Body(bits), tmp_path).eval()
    assert torch.equal(loaded(x), y)
    loaded.load_adapter(tmp_path, adapter_name="second")
    loaded.set_adapter("second")
    assert torch.equal(loaded(x), y)


# Dispatch


def test_each_dispatcher_takes_its_own():
    options = {"hira_config": hira.HiraConfig(r=R)}
    four, eight, dense = base_4bit(), base_8bit(), nn.Linear(IN, OUT)
    assert type(dispatch_bnb_4bit(four, "default", **options)) is Linear4bit
    assert type(dispatch_bnb_8bit(eight, "default", **options)) is Linear8bitLt
    assert dispatch_bnb_4bit(eight, "default", **options) is None
    assert dispatch_bnb_8bit(four, "default", **options) is None
    for target in (dense, nn.Embedding(3, 4), nn.ReLU(), adapted(base_8bit())):
        assert dispatch_bnb_4bit(target, "default", **options) is None
    assert dispatch_bnb_8bit(dense, "default", **options) is None
    layer: Any = dispatch_bnb_4bit(four, "default", r=7, loaded_in_4bit=True, **options)
    assert layer.r == {"default": 7}


def test_a_dispatcher_without_bitsandbytes(monkeypatch):
    monkeypatch.delitem(sys.modules, "bitsandbytes")
    assert dispatch_bnb_4bit(nn.Linear(3, 2), "default", hira_config=hira.HiraConfig(r=R)) is None


def test_an_8bit_layer_that_keeps_its_weight_in_floats():
    base = bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=True)
    layer: Any = hira.layers.dispatch.dispatch(base, "default", hira_config=hira.HiraConfig(r=R))
    assert type(layer) is hira.Linear


@pytest.mark.parametrize("bits", BASES)
def test_a_layer_that_is_quantised_after_it_was_adapted(bits):
    cls, options = {
        "4-bit": (bnb.nn.Linear4bit, {"compute_dtype": torch.float32}),
        "8-bit": (bnb.nn.Linear8bitLt, {"has_fp16_weights": False}),
    }[bits]
    config = hira.HiraConfig(r=R, init_weights=False)
    layer: Any = hira.layers.dispatch.dispatch(cls(IN, OUT, **options), "default", hira_config=config)
    base, x = layer.get_base_layer(), torch.randn(4, IN)
    weight = base.weight
    message = f"{cls.__name__}.* bitsandbytes"
    with pytest.raises(HiraError, match=message):
        layer.merge()
    assert base.weight is weight
    assert not layer.merged
    layer.to("cpu")
    update = F.linear(x, dense_weight(base) * reference.delta(*factors(layer, "default")))
    torch.testing.assert_close(layer(x), base(x) + update, rtol=1e-4, atol=1e-5)
    before = stored(base)
    layer.merge()
    layer.unmerge()
    assert same(stored(base), before)


@pytest.mark.parametrize("bits", BASES)
def test_around_another_tuners_layer(bits):
    body = get_peft_model(Body(bits), peft.LoraConfig(r=2, target_modules=["first"])).base_model.model
    lora = body.first
    for name in ("lora_A", "lora_B"):
        nn.init.normal_(getattr(lora, name)["default"].weight, std=0.1)
    x = torch.randn(4, IN)
    layer: Any = hira.layers.dispatch.dispatch(lora, "h", hira_config=hira.HiraConfig(r=R, init_weights=False))
    assert type(layer) is {"4-bit": Linear4bit, "8-bit": Linear8bitLt}[bits]
    update = F.linear(x, dense_weight(layer.get_base_layer()) * reference.delta(*factors(layer, "h")))
    torch.testing.assert_close(layer(x), lora(x) + update, rtol=1e-4, atol=1e-5)
