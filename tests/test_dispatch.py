"""Which layer serves which module, and the refusals."""

from __future__ import annotations

import importlib

import peft
import pytest
import torch
from peft import get_peft_model
from stock_peft import stock_peft
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

import hira
from hira import HiraConfig, HiraError
from hira.layers.attention import dispatch_attention
from hira.layers.dispatch import DISPATCHERS, dispatch, dispatch_default, dispatch_parameter

CONFIG = HiraConfig(r=2, init_weights=False)


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


SERVED = {
    "linear": (lambda: nn.Linear(4, 3), hira.Linear),
    "a subclass": (lambda: OwnForward(4, 3), hira.Linear),
    "attention": (lambda: nn.MultiheadAttention(4, 2), hira.MultiheadAttention),
    "attention's output": (lambda: nn.MultiheadAttention(4, 2).out_proj, hira.Linear),
    "Conv1D": (lambda: Conv1D(3, 4), hira.Linear),
    "embedding": (lambda: nn.Embedding(4, 3), hira.Embedding),
    "scaled embedding": (lambda: Gemma3TextScaledWordEmbedding(4, 3, 0), hira.Embedding),
    "1d": (lambda: nn.Conv1d(4, 3, 2), hira.Conv1d),
    "2d": (lambda: nn.Conv2d(4, 3, 2), hira.Conv2d),
    "3d": (lambda: nn.Conv3d(4, 3, 2), hira.Conv3d),
}
NOT_SERVED = {
    "norm": lambda: nn.LayerNorm(4),
    "activation": nn.ReLU,
    "transposed convolution": lambda: nn.ConvTranspose1d(4, 3, 2),
    "bag": lambda: nn.EmbeddingBag(4, 3),
    "bilinear": lambda: nn.Bilinear(2, 3, 4),
    "recurrent": lambda: nn.LSTM(2, 3),
    "container": lambda: nn.Sequential(nn.Linear(2, 3)),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("make", "cls"), SERVED.values(), ids=SERVED)
def test_what_serves_what(make, cls):
    base = make()
    config = HiraConfig(r=2, fan_in_fan_out=isinstance(base, Conv1D))
    layer = dispatch(base, "default", hira_config=config)
    assert type(layer) is cls
    assert layer.get_base_layer() is base
    assert (layer.r, layer.active_adapters) == ({"default": 2}, ["default"])
    assert getattr(layer, "fan_in_fan_out", False) == isinstance(base, Conv1D)
    assert getattr(layer, "is_target_conv_1d_layer", False) == isinstance(base, Conv1D)


def test_a_rank_goes_before_the_configured_one():
    layer = dispatch(nn.Linear(4, 3), "default", hira_config=CONFIG, r=1, loaded_in_8bit=False)
    assert layer.r == {"default": 1}
    assert layer.hira_A["default"].shape == (1, 4)


@pytest.mark.parametrize("make", NOT_SERVED.values(), ids=NOT_SERVED)
def test_what_is_not_served(make):
    target = make()
    with pytest.raises(HiraError, match=type(target).__name__):
        dispatch(target, "default", hira_config=CONFIG)
    assert {dispatcher(target, "default", hira_config=CONFIG) for dispatcher in DISPATCHERS} == {None}


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.complex64], ids=str)
@pytest.mark.parametrize("name", ["linear", "Conv1D", "embedding", "2d"])
def test_dtypes_that_are_not_dense_floats(name, dtype):
    base = SERVED[name][0]()
    base.weight = nn.Parameter(base.weight.detach().to(dtype), requires_grad=False)
    config = HiraConfig(r=2, fan_in_fan_out=name == "Conv1D")
    message = f"(?s){type(base).__name__}.*{dtype}"
    with pytest.raises(HiraError, match=message):
        dispatch(base, "default", hira_config=config)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_that_are(dtype):
    layer = dispatch(nn.Linear(4, 3, dtype=dtype), "default", hira_config=CONFIG)
    assert layer(torch.ones(2, 4, dtype=dtype)).dtype == dtype


class Scaled(torch.Tensor):
    """Stands for the weights of torchao and others, which are tensors of their own kind."""


def test_a_tensor_of_another_kind():
    base = nn.Linear(4, 3)
    base.weight = nn.Parameter(torch.Tensor._make_subclass(Scaled, torch.ones(3, 4)), requires_grad=False)
    with pytest.raises(HiraError, match="Scaled"):
        dispatch(base, "default", hira_config=CONFIG)


def test_a_refusal_in_a_model_names_the_module():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    with pytest.raises(HiraError, match=r"^1: .*LayerNorm"):
        get_peft_model(model, HiraConfig(r=2, target_modules=["0", "1"]))
    assert [type(module) for module in model] == [nn.Linear, nn.LayerNorm]


# Orientation


@pytest.mark.parametrize(
    ("make", "said", "is_so"), [(lambda: nn.Linear(4, 3), True, False), (lambda: Conv1D(3, 4), False, True)]
)
def test_orientation_is_found_out(make, said, is_so):
    base = make()
    with pytest.warns(UserWarning) as warned:
        layer = dispatch(base, "default", hira_config=HiraConfig(r=2, init_weights=False, fan_in_fan_out=said))
    assert [str(warning.message) for warning in warned] == [
        f"fan_in_fan_out is set to {said} but the target module is a {type(base).__name__}. "
        f"Setting fan_in_fan_out to {is_so}."
    ]
    W0 = base.weight.t() if is_so else base.weight
    W = W0 * (1 + layer.hira_B["default"] @ layer.hira_A["default"])
    x = torch.randn(2, 4)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, W, base.bias))


# Other tuners' layers


# LoRA adapts attention as a whole, by merging
@pytest.mark.parametrize("name", sorted(SERVED.keys() - {"attention", "attention's output"}))
def test_around_a_layer_of_another_tuner(name):
    make, cls = SERVED[name]
    model = get_peft_model(nn.Sequential(make()), peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    lora = model.base_model.model[0]
    assert isinstance(lora, peft.tuners.lora.LoraLayer)
    base = lora.get_base_layer()
    layer = dispatch(lora, "h", hira_config=HiraConfig(r=2, init_weights=False, fan_in_fan_out=name == "Conv1D"))
    assert type(layer) is cls
    assert layer.base_layer is lora
    assert layer.get_base_layer() is base
    x = torch.randint(4, (3, 5)) if cls is hira.Embedding else torch.randn(1, 4, *[5] * (base.weight.dim() - 2))
    W = base.weight * (1 + layer.get_delta_weight("h"))
    wanted = torch.func.functional_call(lora, {"base_layer.weight": W}, (x,))
    assert not torch.allclose(wanted, lora(x))
    torch.testing.assert_close(layer(x), wanted)


def test_a_layer_of_ours_takes_another_adapter_instead():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), HiraConfig(r=2, target_modules=["0"]), adapter_name="first")
    layer = model.base_model.model[0]
    model.add_adapter("second", HiraConfig(r=3, target_modules=["0"]))
    assert model.base_model.model[0] is layer
    assert layer.r == {"first": 2, "second": 3}


# Names


def test_names_under_peft():
    from peft.tuners.hira.bnb import dispatch_bnb_4bit, dispatch_bnb_8bit
    from peft.tuners.hira.dispatch import dispatch_default as under_peft

    assert under_peft is dispatch_default
    assert DISPATCHERS[0] is dispatch_parameter  # what a parameter's module is does not matter
    assert {dispatch_bnb_8bit, dispatch_bnb_4bit, dispatch_attention} < set(DISPATCHERS)
    assert DISPATCHERS[-1] is dispatch_default
    assert peft.tuners.hira.dispatch.dispatch_default is dispatch_default
    with stock_peft(), pytest.raises(ModuleNotFoundError, match=r"peft\.tuners\.hira\.dispatch"):
        importlib.import_module("peft.tuners.hira.dispatch")
