"""The 4-bit and 8-bit linear layers of bitsandbytes, the real ones, on a CPU."""

from __future__ import annotations

import copy
import math
import sys
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from conftest import address, error, kept_for_backward
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import hira
from hira import HiraError, ops
from hira.bnb import Linear4bit, Linear8bitLt, dispatch_bnb_4bit, dispatch_bnb_8bit
from hira.ops import reference

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
    pytest.mark.filterwarnings("ignore:Already following adapters were merged"),
]

IN, OUT, R = 128, 64, 3
FOUR_BIT = [(kind, double) for kind in ("nf4", "fp4") for double in (True, False)]
COMPUTE = [torch.float32, torch.bfloat16]


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


def results(y: Tensor, dy: Tensor, *tensors: Tensor) -> list[Tensor]:
    return [y.detach(), *torch.autograd.grad(y, tensors, dy.to(y.dtype))]


# Forward and backward


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("compute", COMPUTE, ids=str)
@pytest.mark.parametrize(("kind", "double"), FOUR_BIT)
def test_4bit_as_the_reference(kind, double, compute, x_dtype, bias):
    layer = adapted(base_4bit(kind, double, compute, bias=bias))
    assert isinstance(layer, Linear4bit)
    base, (A, B) = layer.get_base_layer(), (layer.hira_A["default"], layer.hira_B["default"])
    W0 = dense_weight(base)
    x = torch.randn(2, 5, IN, dtype=x_dtype, requires_grad=True)
    dy = torch.randn(2, 5, OUT)
    y = layer(x)
    assert y.dtype == x_dtype
    exact = [t.detach().double().requires_grad_() for t in (x, A, B)]
    wanted = reference.linear(exact[0], W0.double(), *exact[1:], base.bias.double() if bias else None)
    plain = F.linear(
        x.to(compute), reference.modulated_weight(W0, A, B).to(compute), base.bias.to(compute) if bias else None
    ).to(x_dtype)
    for found, expected, usual in zip(
        results(y, dy, x, A, B), results(wanted, dy, *exact), results(plain, dy, x, A, B), strict=True
    ):
        assert found.dtype == usual.dtype
        assert error(found, expected) <= 1.5 * error(usual, expected) + 1e-7


def test_4bit_without_a_compute_dtype_follows_the_input():
    layer = adapted(base_4bit(compute=None))
    W = reference.modulated_weight(dense_weight(layer.get_base_layer()), *factors(layer, "default"))
    x = torch.randn(3, IN)
    torch.testing.assert_close(layer(x), F.linear(x, W, layer.bias))
    assert layer(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16], ids=str)
def test_8bit_adds_the_update_to_the_integer_product(x_dtype, bias):
    layer = adapted(base_8bit(bias=bias))
    assert isinstance(layer, Linear8bitLt)
    base, (A, B) = layer.get_base_layer(), (layer.hira_A["default"], layer.hira_B["default"])
    W0 = dense_weight(base)
    x = torch.randn(5, IN, dtype=x_dtype, requires_grad=True)
    dy = torch.randn(5, OUT)
    y = layer(x)
    assert y.dtype == x_dtype
    exact = [t.detach().double().requires_grad_() for t in (x, A, B)]
    of_base = results(base(x), dy, x)
    update = results(F.linear(exact[0], W0.double() * reference.delta(*exact[1:])), dy, *exact)
    plain = results(base(x) + F.linear(x, (W0 * reference.delta(A, B)).to(x_dtype)), dy, x, A, B)
    wanted = [of_base[0] + update[0], of_base[1] + update[1], *update[2:]]
    for found, expected, usual in zip(results(y, dy, x, A, B), wanted, plain, strict=True):
        assert found.dtype == usual.dtype
        assert error(found, expected) <= 1.5 * error(usual, expected) + 1e-7


@pytest.mark.parametrize("compute", COMPUTE, ids=str)
def test_4bit_keeps_only_the_packed_weight(compute):
    layer = adapted(base_4bit(compute=compute))
    x = torch.randn(2, IN, dtype=compute, requires_grad=True)
    packed = layer.get_base_layer().weight
    kept = kept_for_backward(lambda: layer(x))
    assert kept.pop(address(packed)) == IN * OUT // 2
    small = [x, layer.hira_A["default"], layer.hira_B["default"]]
    assert kept == {address(t): t.untyped_storage().nbytes() for t in small}


def test_8bit_keeps_only_the_integers():
    layer = adapted(base_8bit())
    x = torch.randn(2, IN, requires_grad=True)
    kept = kept_for_backward(lambda: layer(x))
    codes = layer.get_base_layer().state.CB
    assert kept.pop(address(codes)) == IN * OUT
    assert max(kept.values()) < IN * OUT


@pytest.mark.parametrize("bits", BASES)
def test_several_adapters_and_dropout(bits):
    layer = adapted(BASES[bits](), ("a", "b"))
    base, x = layer.get_base_layer(), torch.randn(4, IN)
    W0 = dense_weight(base)
    update = F.linear(x, W0 * reference.delta(*factors(layer, "a", "b")))
    torch.testing.assert_close(layer(x), base(x) + update, rtol=1e-4, atol=1e-5)
    layer.enable_adapters(False)
    torch.testing.assert_close(layer(x), base(x), rtol=0, atol=0)
    layer.enable_adapters(True)
    layer.update_layer("dropped", R, hira.HiraConfig(r=R, init_weights=False, hira_dropout=0.5))
    layer.set_adapter("dropped")
    layer.hira_dropout["dropped"].forward = lambda x: 3 * x
    update = F.linear(3 * x, W0 * reference.delta(*factors(layer, "dropped")))
    torch.testing.assert_close(layer(x), base(x) + update, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", BASES)
def test_a_start_that_does_nothing(bits):
    base = BASES[bits]()
    x = torch.randn(4, IN)
    y = base(x)
    layer: Any = hira.dispatch.dispatch(base, "default", hira_config=hira.HiraConfig(r=R))
    torch.testing.assert_close(layer(x), y)
    assert layer.hira_A["default"].dtype == torch.float32


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


def test_8bit_merges_the_sum():
    layer = adapted(base_8bit(), ("a", "b"))
    base = layer.get_base_layer()
    W0 = layer.storage.read()
    torch.testing.assert_close(W0, dense_weight(base))
    A, B = factors(layer, "a", "b")
    codes, scales, _ = bnb.functional.int8_vectorwise_quant(ops.modulated_weight(W0, A, B).half())
    layer.merge()
    assert torch.equal(base.state.CB, codes)
    assert torch.equal(base.state.SCB, scales)
    assert base.weight.data.data_ptr() == base.state.CB.data_ptr()
    # rows of 8-bit integers are within 1/254 of their largest entry, a few times the root mean square
    assert error(dense_weight(base), W0 * (1 + reference.delta(A, B))) < 0.02


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bits", BASES)
def test_unmerging_is_exact(bits, training):
    layer = adapted(BASES[bits](), ("a", "b")).train(training)
    base, x = layer.get_base_layer(), torch.randn(4, IN)
    before, weight, W0 = stored(base), base.weight, dense_weight(base)
    y = layer(x)
    for names in (["a"], ["a", "b"], ["b"]):
        layer.merge(adapter_names=names)
        assert not same(stored(base), before)
        merged = layer(x)
        torch.testing.assert_close(merged, base(x), rtol=0, atol=0)
        layer.unmerge()
        assert base.weight is weight
        assert same(stored(base), before)
        assert torch.equal(dense_weight(base), W0)
        torch.testing.assert_close(layer(x), y, rtol=0, atol=0)


@pytest.mark.parametrize("bits", BASES)
def test_merging_in_turn_is_merging_at_once(bits):
    layer = adapted(BASES[bits](), ("a", "b"))
    base = layer.get_base_layer()
    before = stored(base)
    layer.merge(adapter_names=["a", "b"])
    at_once = stored(base)
    layer.unmerge()
    layer.merge(adapter_names=["a"])
    layer.merge(adapter_names=["b"])
    assert same(stored(base), at_once)
    layer.unmerge()
    assert same(stored(base), before)


@pytest.mark.parametrize("bits", BASES)
def test_a_safe_merge_that_is_refused(bits):
    layer = adapted(BASES[bits]())
    base = layer.get_base_layer()
    before, weight = stored(base), base.weight
    with torch.no_grad():
        layer.hira_A["default"][1, 2] = math.nan
    with pytest.raises(HiraError, match=r"^NaNs detected in the merged weights\. The adapter default seems to be"):
        layer.merge(safe_merge=True)
    assert base.weight is weight
    assert same(stored(base), before)
    assert not layer.merged


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
    with pytest.warns(UserWarning, match=r"was replaced while \['default'\] were merged; it is kept"):
        layer.unmerge()
    assert base.weight is other.weight
    assert same(stored(base), stored(other))


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


@pytest.mark.parametrize("bits", BASES)
def test_a_model_trains_and_its_base_stays(bits):
    model = get_peft_model(Body(bits), config(init_weights=True))
    base = model.base_model.model.first.get_base_layer()
    before, x = stored(base), torch.randn(16, IN)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(trainable) == 4
    optimizer = torch.optim.Adam(trainable, lr=0.02)
    losses = []
    for _ in range(20):
        loss = (model(x) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert same(stored(base), before)


@pytest.mark.parametrize("bits", BASES)
def test_merge_and_unload(bits):
    model = get_peft_model(Body(bits), config()).eval()
    layer = model.base_model.model.first
    base = layer.get_base_layer()
    wanted = ops.modulated_weight(dense_weight(base), *factors(layer, "default"))
    unloaded = model.merge_and_unload()
    assert unloaded.first is base
    assert not any(isinstance(module, hira.HiraLayer) for module in unloaded.modules())
    assert error(dense_weight(base), wanted) < {"4-bit": 0.15, "8-bit": 0.02}[bits]


@pytest.mark.parametrize("bits", BASES)
def test_a_model_is_copied(bits):
    model, x = get_peft_model(Body(bits), config()).eval(), torch.randn(4, IN)
    y = model(x)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), y)
    copied.merge_adapter()
    assert torch.equal(model(x), y)
    copied.unmerge_adapter()
    assert torch.equal(copied(x), y)


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
    layer: Any = hira.dispatch.dispatch(base, "default", hira_config=hira.HiraConfig(r=R))
    assert type(layer) is hira.Linear


@pytest.mark.parametrize("bits", BASES)
def test_a_layer_that_is_quantised_after_it_was_adapted(bits):
    cls, options = {
        "4-bit": (bnb.nn.Linear4bit, {"compute_dtype": torch.float32}),
        "8-bit": (bnb.nn.Linear8bitLt, {"has_fp16_weights": False}),
    }[bits]
    config = hira.HiraConfig(r=R, init_weights=False)
    layer: Any = hira.dispatch.dispatch(cls(IN, OUT, **options), "default", hira_config=config)
    base, x = layer.get_base_layer(), torch.randn(4, IN)
    weight = base.weight
    message = (
        rf"^The weight of {cls.__name__} is not quantised yet: bitsandbytes does so when the model is moved to its"
    )
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
    layer: Any = hira.dispatch.dispatch(lora, "h", hira_config=hira.HiraConfig(r=R, init_weights=False))
    assert type(layer) is {"4-bit": Linear4bit, "8-bit": Linear8bitLt}[bits]
    update = F.linear(x, dense_weight(layer.get_base_layer()) * reference.delta(*factors(layer, "h")))
    torch.testing.assert_close(layer(x), lora(x) + update, rtol=1e-4, atol=1e-5)
