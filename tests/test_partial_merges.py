"""Merging some of the active adapters, or one that is not active: the rest acts on W0, not on the merged weight."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import hira
from hira import HiraConfig, HiraError

pytestmark = [
    pytest.mark.filterwarnings("ignore:Already following adapters were merged"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
]
EXACT = {"rtol": 1e-12, "atol": 1e-12}
NAMES = ("a", "b", "c")


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.target = nn.MultiheadAttention(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.target(x, x, x)[0]


class Reading(nn.Module):
    """Multiplies by the layer's weight itself."""

    def __init__(self) -> None:
        super().__init__()
        self.target = nn.Conv1d(6, 6, 3, groups=6)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.target.weight, groups=6)


def in_a_model(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def model() -> nn.Module:
        body = nn.Sequential()
        body.add_module("target", make())
        return body

    return model


def hooked() -> nn.Module:
    base = nn.Linear(6, 5)
    base.register_forward_hook(lambda module, args, y: y.tanh())
    return base


def vectors() -> Tensor:
    return torch.randn(3, 6, dtype=torch.float64)


def ids() -> Tensor:
    return torch.tensor([[3, 0, 3, 8], [1, 3, 5, 0]])


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (in_a_model(lambda: nn.Linear(6, 5)), vectors),
    "Conv1D": (in_a_model(lambda: Conv1D(5, 6)), vectors),
    "hooks": (in_a_model(hooked), vectors),
    "embedding": (in_a_model(lambda: nn.Embedding(9, 5)), ids),
    "convolution": (
        in_a_model(lambda: nn.Conv2d(6, 4, 2)),
        lambda: torch.randn(2, 6, 4, 4, dtype=torch.float64),
    ),
    "attention": (Attending, lambda: torch.randn(4, 2, 6, dtype=torch.float64)),
    "a weight that is read": (Reading, lambda: torch.randn(2, 6, 9, dtype=torch.float64)),
}


def adapted(make: Callable[[], nn.Module], names: tuple[str, ...] = NAMES, **options: Any) -> Any:
    config = {"r": 2, "target_modules": ["target"], "init_weights": False, "fan_in_fan_out": True, **options}
    model = get_peft_model(make(), HiraConfig(**config), names[0])
    for name in names[1:]:
        model.add_adapter(name, HiraConfig(**config))
    model.base_model.set_adapter(list(names))
    return model.double().eval()


def layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, hira.HiraLayer)]


def weights(model: nn.Module) -> list[Tensor]:
    return [layer.storage.stored for layer in layers(model)]


def gradients(model: nn.Module, y: Tensor, names: tuple[str, ...]) -> list[Tensor]:
    tensors = [factors[name] for layer in layers(model) for factors in layer._factor_dicts for name in names]
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape).cos()
    return list(torch.autograd.grad(y, tensors, dy))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("merged", [["a"], ["b"], ["c", "a"]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_merging_some_of_the_active_ones_changes_nothing(kind, merged):
    make, make_x = KINDS[kind]
    model, x = adapted(make), make_x()
    before, y = weights(model), model(x)
    wanted = gradients(model, model(x), ("b",))
    model.merge_adapter(merged)
    written = weights(model)
    assert all(layer.merged_adapters == merged for layer in layers(model))
    torch.testing.assert_close(model(x), y, **EXACT)
    torch.testing.assert_close(gradients(model, model(x), ("b",)), wanted, **EXACT)
    assert all(now is then for now, then in zip(weights(model), written, strict=True))
    with torch.no_grad():
        torch.testing.assert_close(model(x), y, **EXACT)
    # all of them merged
    model.merge_adapter(list(NAMES))
    torch.testing.assert_close(model(x), y, **EXACT)
    model.unmerge_adapter()
    assert all(now is then for now, then in zip(weights(model), before, strict=True))
    assert torch.equal(model(x), y)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_adapter_that_is_not_active_acts_as_well(kind):
    """As with LoRA, through the weight; but the active one is not dropped."""
    make, make_x = KINDS[kind]
    model, x = adapted(make, ("a", "b")), make_x()
    both = model(x)
    model.set_adapter("b")
    alone = model(x)
    model.set_adapter("a")
    model.merge_adapter(["b"])
    torch.testing.assert_close(model(x), both, **EXACT)
    model.set_adapter("b")
    torch.testing.assert_close(model(x), alone, **EXACT)
    model.set_adapter("a")
    with model.disable_adapter():
        assert torch.equal(model(x), model.get_base_model()(x))
    assert not any(layer.merged for layer in layers(model))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("kind", ["linear", "hooks", "convolution"])
def test_compiled(kind):
    make, make_x = KINDS[kind]
    model, x = adapted(make, ("a", "b")), make_x()
    y = model(x)
    model.merge_adapter(["a"])
    written = weights(model)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x), y, **EXACT)
    assert all(now is then for now, then in zip(weights(model), written, strict=True))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_unloading_merges_the_named_ones_alone():
    model, x = adapted(KINDS["linear"][0]), vectors()
    (layer,) = layers(model)
    base = layer.get_base_layer()
    W = base.weight * (1 + layer.get_delta_weight("a") + layer.get_delta_weight("c"))
    wanted = F.linear(x, W, base.bias)
    model.merge_adapter(["a"])
    torch.testing.assert_close(model.merge_and_unload(adapter_names=["c"])(x), wanted, **EXACT)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_a_copy_of_a_partly_merged_model():
    model, x = adapted(KINDS["linear"][0]), vectors()
    y = model(x)
    model.merge_adapter(["a"])
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied(x), y, **EXACT)
    copied.unmerge_adapter()
    torch.testing.assert_close(copied(x), y, **EXACT)
    torch.testing.assert_close(model(x), y, **EXACT)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_a_base_weight_loaded_while_partly_merged_is_the_new_one():
    model, x = adapted(KINDS["linear"][0], ("a", "b")), vectors()
    model.merge_adapter(["a"])
    (layer,) = layers(model)
    W0 = torch.randn_like(layer.get_base_layer().weight)
    layer.get_base_layer().load_state_dict({"weight": W0, "bias": torch.zeros(5)})
    W = W0 * (1 + layer.get_delta_weight("a") + layer.get_delta_weight("b"))
    with pytest.warns(UserWarning, match="replaced"):
        y = model(x)
    torch.testing.assert_close(y, F.linear(x, W), **EXACT)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_the_additive_delta_is_of_w0():
    model = adapted(KINDS["linear"][0], ("a", "b"))
    (layer,) = layers(model)
    wanted = layer.get_additive_delta("b")
    model.merge_adapter(["a"])
    assert torch.equal(layer.get_additive_delta("b"), wanted)


def test_experts():
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        intermediate_size=24, num_local_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    tokens = torch.arange(12).view(2, 6)
    model = adapted(
        lambda: transformers.MixtralForCausalLM(config), ("a", "b"), target_modules=[], fan_in_fan_out=False,
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )  # fmt: skip
    y = model(tokens).logits
    model.merge_adapter(["a"])
    torch.testing.assert_close(model(tokens).logits, y, **EXACT)
    model.unmerge_adapter()
    assert torch.equal(model(tokens).logits, y)


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_quantised_weights(kind):
    """The rest acts on W0 as it was, not on one that was quantised anew."""
    bnb = pytest.importorskip("bitsandbytes")
    options = {"Linear4bit": {"compute_dtype": torch.float32}, "Linear8bitLt": {"has_fp16_weights": False}}[kind]
    body = nn.Sequential()
    body.add_module("target", getattr(bnb.nn, kind)(64, 64, **options))
    model = get_peft_model(body.to("cpu"), HiraConfig(r=2, target_modules=["target"], init_weights=False), "a")
    model.add_adapter("b", HiraConfig(r=2, target_modules=["target"], init_weights=False))
    model.base_model.set_adapter(["a", "b"])
    model.eval()
    x = torch.randn(3, 64)
    with torch.no_grad():
        y = model(x)
        model.merge_adapter(["a"])
        written = layers(model)[0].storage.read()
        assert torch.equal(model(x), y)
        assert torch.equal(layers(model)[0].storage.read(), written)
        model.unmerge_adapter()
        assert torch.equal(model(x), y)


def mixed(body: nn.Module, first: str) -> Any:
    """A mixed model with two HiRA adapters and one of LoRA, all active, on one layer."""
    of_hira = {"r": 2, "target_modules": ["target"], "init_weights": False}
    of_lora = peft.LoraConfig(r=2, target_modules=["target"], init_lora_weights=False)
    configs = {"a": HiraConfig(**of_hira), "b": HiraConfig(**of_hira), "l": of_lora}
    model = get_peft_model(body, configs[first], first, mixed=True)
    for name in [name for name in configs if name != first]:
        model.add_adapter(name, configs[name])
    model.set_adapter(["a", "b", "l"])
    return model.double().eval()


@pytest.mark.parametrize("first", ["a", "l"])
@pytest.mark.parametrize("merged", [["a"], ["l"], ["a", "l"], ["b", "a", "l"]], ids=str)
def test_beside_lora(merged, first):
    model, x = mixed(KINDS["linear"][0](), first), vectors()
    y = model(x)
    model.base_model.merge_adapter(adapter_names=merged)
    torch.testing.assert_close(model(x), y, **EXACT)
    model.base_model.unmerge_adapter()
    torch.testing.assert_close(model(x), y, **EXACT)
    model.base_model.merge_adapter(adapter_names=["a"])
    torch.testing.assert_close(model(x), y, **EXACT)


def test_beside_merged_lora_on_a_forward_of_its_own_is_refused():
    model = mixed(KINDS["hooks"][0](), "a")
    model.base_model.merge_adapter(adapter_names=["a", "l"])
    with pytest.raises(HiraError, match=r"'a'.* another tuner"):
        model(vectors())


@pytest.mark.parametrize("first", ["a", "l"])
def test_one_after_another_beside_lora(first):
    model, x = mixed(KINDS["linear"][0](), first), vectors()
    (layer,) = layers(model)  # of both HiRA adapters, wherever LoRA is in between
    W0, y = layer.get_base_layer().weight, model(x)
    for name in ("l", "a", "b"):
        model.base_model.merge_adapter(adapter_names=[name])
        torch.testing.assert_close(model(x), y, **EXACT)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), F.linear(x, W0, layer.get_base_layer().bias), **EXACT)
    assert layer.get_base_layer().weight is W0
    torch.testing.assert_close(model(x), y, **EXACT)
