"""A scale for each adapter, W' = W0 (1 + s BA), set by the layers' methods and by PEFT's helpers; PEFT's optimizers."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from accelerate.utils.deepspeed import DummyOptim
from peft import LoraConfig, get_peft_model
from peft.helpers import rescale_adapter_scale
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import hira
from hira import HiraConfig, HiraError, inference_cache
from hira.layers.experts import ParamWrapper

EXACT = {"rtol": 1e-12, "atol": 1e-12}


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 5, 6))

    def forward(self, x: Tensor) -> Tensor:
        return sum(nn.functional.linear(x, weight) for weight in self.up)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


def ids() -> Tensor:
    return torch.tensor([[3, 0, 5], [1, 3, 2]])


def features() -> Tensor:
    return torch.randn(2, 3, 6, dtype=torch.float64)


KINDS = {
    "linear": (lambda: nn.Linear(6, 5), features),
    "Conv1D": (lambda: Conv1D(5, 6), features),
    "embedding": (lambda: nn.Embedding(7, 5), ids),
    "convolution": (lambda: nn.Conv1d(3, 4, 2), features),
    "depthwise convolution": (lambda: nn.Conv1d(3, 3, 2, groups=3), features),
    "attention": (Attention, features),
    "experts": (Experts, features),
}


def adapted(kind: str, *names: str):
    """A model with one module, and adapters on it."""
    torch.manual_seed(0)
    target = {"experts": {"target_parameters": ["0.up"]}, "attention": {"target_modules": ["attention"]}}
    options = {"r": 2, "init_weights": False, **target.get(kind, {"target_modules": ["0"]})}
    config = HiraConfig(**options, fan_in_fan_out=kind == "Conv1D")
    model = get_peft_model(nn.Sequential(KINDS[kind][0]()), config, names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    model.base_model.set_adapter(list(names))
    return model.double().eval()


def layers(model: nn.Module) -> list[hira.HiraLayer]:
    return [module for module in model.modules() if isinstance(module, hira.HiraLayer)]


def with_scaled_factors(model: nn.Module, **scales: float) -> nn.Module:
    """A copy whose B are multiplied by the scales, and whose adapters have none."""
    model = copy.deepcopy(model)
    for layer in layers(model):
        layer.scaling = dict.fromkeys(layer.scaling, 1.0)
        for name, scale in scales.items():
            layer._factor_dicts[1][name].data.mul_(scale)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_multiplies_BA(kind):
    """In the forward, its gradients, the merged weight and get_delta_weight, with several adapters."""
    model, x = adapted(kind, "a", "b"), KINDS[kind][1]()
    at_first = model(x)
    for layer in layers(model):
        layer.set_scale("a", 0.5)
        layer.set_scale("b", -3)
        layer.set_scale("not there", 7)
    expected = with_scaled_factors(model, a=0.5, b=-3)
    y = model(x)
    torch.testing.assert_close(y, expected(x), **EXACT)
    assert not torch.allclose(y, at_first, rtol=1e-3, atol=1e-3)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    others = dict(expected.named_parameters())
    for name, found, other in zip(
        trained,
        torch.autograd.grad(y.square().sum(), list(trained.values())),
        torch.autograd.grad(expected(x).square().sum(), [others[name] for name in trained]),
        strict=True,
    ):
        scale = (0.5 if name.endswith(".a") else -3) if "_B." in name else 1
        torch.testing.assert_close(found, other * scale, rtol=1e-10, atol=1e-10)
    for layer, other in zip(layers(model), layers(expected), strict=True):
        torch.testing.assert_close(layer.get_delta_weight("b"), other.get_delta_weight("b"), **EXACT)
    model.merge_adapter()
    expected.merge_adapter()
    torch.testing.assert_close(model(x), y, **EXACT)
    for (name, weight), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        if "hira_" not in name:
            torch.testing.assert_close(weight, other, **EXACT)
    model.unmerge_adapter()
    for layer in layers(model):
        layer.unscale_layer()
    assert torch.equal(model(x), at_first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16])
def test_the_merged_weight_is_that_of_the_forward(dtype, factors):
    """Bit for bit, and the scale of a bfloat16 B is not rounded to bfloat16."""
    torch.manual_seed(0)
    base = nn.Linear(32, 16, bias=False).to(dtype).requires_grad_(False)
    layer = hira.Linear(base, "a", HiraConfig(r=4, init_weights=False))
    for values in (layer.hira_A, layer.hira_B):
        values.to(factors)
    layer.set_scale("a", 0.3)
    W0, A, B = base.weight.double(), layer.hira_A["a"].double(), layer.hira_B["a"].double()
    identity = torch.eye(32, dtype=dtype)
    y = layer(identity)
    layer.merge()
    assert torch.equal(base.weight, y.t())
    exact = W0 * (1 + 0.3 * B @ A)
    # one rounding, to a spacing of eps, of a sum of 5 products in float32
    bound = torch.finfo(dtype).eps * exact.abs() + 4e-7 * W0.abs() * (1 + 0.3 * B.abs() @ A.abs())
    assert ((base.weight.double() - exact).abs() <= bound).all()
    assert layer.get_delta_weight("a").dtype == factors


def test_a_scale_of_one_is_no_multiplication():
    layer = layers(adapted("linear", "a"))[0]
    assert layer._factors(["a"]) == (layer.hira_A["a"], layer.hira_B["a"], 0)
    y = layer(x := features())
    layer.set_scale("a", 1.0)
    assert torch.equal(layer(x), y)


def test_a_scale_set_while_merged_acts_once_unmerged():
    """The merged weight stays what it is, and another adapter is merged beside it as it was."""
    model, x = adapted("linear", "a", "b"), features()
    layer = layers(model)[0]
    layer.set_scale("a", 2.0)
    expected = with_scaled_factors(model, a=2.0)(x)
    layer.merge(adapter_names=["a"])
    layer.set_scale("a", 0.25)
    layer.merge(adapter_names=["b"])
    torch.testing.assert_close(model(x), expected, **EXACT)
    layer.unmerge()
    torch.testing.assert_close(model(x), with_scaled_factors(model, a=0.25)(x), **EXACT)


def test_rows_of_a_mixed_batch_have_their_adapters_scale():
    model, x = adapted("linear", "a", "b"), torch.randn(4, 1, 6, dtype=torch.float64)
    layers(model)[0].set_scale("a", 0.5)
    expected, names = with_scaled_factors(model, a=0.5), ["a", "__base__", "b", "a"]
    torch.testing.assert_close(model(x, adapter_names=names), expected(x, adapter_names=names), **EXACT)


@torch.no_grad()
def test_the_weight_kept_for_generation_follows_the_scale():
    model, x = adapted("linear", "a"), torch.randn(1, 6, dtype=torch.float64)
    with inference_cache.keep():
        model(x)
        for scale in (0.5, 2.0, 1.0):
            layers(model)[0].scaling["a"] = scale
            torch.testing.assert_close(model(x), with_scaled_factors(model, a=scale)(x), **EXACT)


def test_scale_layer_is_of_the_active_adapters_and_multiplies():
    layer = layers(adapted("linear", "a", "b"))[0]
    layer.set_adapter("a")
    layer.set_scale("a", 0.5)
    layer.scale_layer(3)
    assert layer.scaling == {"a": 1.5, "b": 1.0}
    layer.unscale_layer(3)
    assert layer.scaling == {"a": 0.5, "b": 1.0}
    layer.unscale_layer()
    assert layer.scaling == {"a": 1.0, "b": 1.0}
    layer.delete_adapter("b")
    assert layer.scaling == {"a": 1.0}


@pytest.mark.parametrize("scale", [math.nan, math.inf, "2", None])
def test_a_bad_scale_is_refused(scale):
    layer = layers(adapted("linear", "a"))[0]
    with pytest.raises(HiraError, match="finite"):
        layer.set_scale("a", scale)
    with pytest.raises(HiraError, match="finite"):
        layer.scale_layer(scale)
    with pytest.raises(HiraError, match=r"\b0\b"):
        layer.unscale_layer(0)
    assert layer.scaling == {"a": 1.0}


def test_a_scale_is_in_no_checkpoint(tmp_path):
    model, x = adapted("linear", "default"), features()
    y = model(x)
    layers(model)[0].set_scale("default", 0.5)
    model.save_pretrained(tmp_path)
    config = (tmp_path / "adapter_config.json").read_text()
    assert "scal" not in config
    other = adapted("linear", "other")
    other.load_adapter(tmp_path, "default")
    other.set_adapter("default")
    assert torch.equal(other.double()(x), y)


@pytest.mark.parametrize("kind", KINDS)
def test_rescale_adapter_scale(kind):
    model, x = adapted(kind, "a"), KINDS[kind][1]()
    y = model(x)
    with rescale_adapter_scale(model, 0.25):
        torch.testing.assert_close(model(x), with_scaled_factors(model, a=0.25)(x), **EXACT)
    assert torch.equal(model(x), y)
    with rescale_adapter_scale(model, 0):
        found = model(x)
    with model.disable_adapter():
        torch.testing.assert_close(found, model(x), **EXACT)


# PEFT's optimizers


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.last = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.experts = ParameterHolder()

    def forward(self, ids: Tensor) -> Tensor:
        return self.last(self.first(self.embed(ids)) @ self.experts.weight)


class ParameterHolder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))


def two(config) -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(Two(), config)


def test_loraplus_gives_B_a_rate_of_its_own():
    """Parameter for parameter the groups of a LoRA on the same modules."""
    targets = {"target_modules": ["embed", "first"], "modules_to_save": ["last"], "r": 2}
    groups = []
    for config in (LoraConfig(**targets), HiraConfig(**targets)):
        model = two(config)
        options = {"lr": 1e-3, "loraplus_lr_ratio": 16.0, "loraplus_weight_decay": 0.1}
        optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, **options)
        names = {
            id(p): n.replace("lora_", "").replace("hira_", "").replace(".weight", "")
            for n, p in model.named_parameters()
        }
        found = [({names[id(p)] for p in g["params"]}, g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
        groups.append(found)
        model(torch.tensor([1, 2])).sum().backward()
        optimizer.step()
    assert groups[0] == groups[1]
    assert any("first.B.default" in name for name in groups[1][2][0])


def test_the_riemannian_preconditioner_is_applied():
    """(B^T B + reg)^-1 dA and dB (A A^T + reg)^-1, for the matrices of HiRA as for those of LoRA."""
    model = two(HiraConfig(r=2, target_modules=["embed", "first"], init_weights=False))
    layer = model.get_base_model().first
    A, B = layer.hira_A["default"], layer.hira_B["default"]
    optimizer = create_riemannian_optimizer(model, torch.optim.SGD, lr=1.0, reg=1e-6)
    model(torch.tensor([1, 2])).square().sum().backward()
    identity = 1e-6 * torch.eye(2)
    wanted_A = A - torch.linalg.solve(B.t() @ B + identity, A.grad)
    wanted_B = B - torch.linalg.solve(A @ A.t() + identity, B.grad.t()).t()
    wanted_A, wanted_B = wanted_A.detach().clone(), wanted_B.detach().clone()
    table = model.get_base_model().embed
    wanted_table = (table.hira_embedding_B["default"] - table.hira_embedding_B["default"].grad).detach().clone()
    optimizer.step()
    torch.testing.assert_close(A, wanted_A, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(B, wanted_B, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(table.hira_embedding_B["default"], wanted_table)


def test_lorafa_is_refused_by_name():
    model = two(HiraConfig(r=2, target_modules=["first"]))
    with pytest.raises(HiraError, match="create_lorafa_optimizer"):
        create_lorafa_optimizer(model, r=2, lora_alpha=4, lr=1e-3)
    assert model.get_base_model().first.hira_A["default"].requires_grad
    create_lorafa_optimizer(two(LoraConfig(r=2, target_modules=["first"])), r=2, lora_alpha=4, lr=1e-3)


def test_optimizers_are_stock_ones_after_unregister():
    try:
        hira.unregister()
        from peft import optimizers

        optimizer = optimizers.create_loraplus_optimizer(
            two(LoraConfig(r=2, target_modules=["first"])), torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=2.0
        )
        assert optimizers.create_loraplus_optimizer.__globals__["__name__"] == "peft.optimizers.loraplus"
        assert len(optimizer.param_groups) == 4
    finally:
        hira.register()


def test_a_wrapped_parameter_is_not_preconditioned():
    """Its A and B are those of all experts, in which a matrix A^T A means nothing."""
    model = two(HiraConfig(r=2, target_modules=["first"], target_parameters=["experts.weight"]))
    wrapper = next(module for module in model.modules() if isinstance(module, ParamWrapper))
    from peft.optimizers import riemannian

    paired = {id(p) for pair in riemannian._collect_lora_pairs(model) for p in pair}
    assert id(wrapper.hira_A["default"]) not in paired
    assert len(paired) == 2


def test_loraplus_serves_placeholders_that_have_no_groups_yet():
    """As accelerate's for an optimizer that DeepSpeed makes."""
    for config in (LoraConfig(r=2, target_modules=["first"]), HiraConfig(r=2, target_modules=["first"])):
        model = two(config)
        optimizer = create_loraplus_optimizer(model, optimizer_cls=DummyOptim, lr=1e-3, loraplus_lr_ratio=4.0)
        rates = {id(p): group["lr"] for group in optimizer.params for p in group["params"]}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert rates[id(parameter)] == (4e-3 if "_B" in name else 1e-3), name
