"""Which parameters `target_parameters` may name, and what is adapted where it names none."""

from __future__ import annotations

import pytest
import torch
from expert_models import EXPERTS, R, adapt, model_of, wrapper_of
from peft import LoraConfig, PeftConfig, PeftMixedModel, PeftModel, get_peft_model
from stock_peft import stock_peft
from torch import nn

import hira
from hira import HiraConfig, HiraError, ParamWrapper
from hira.ops import reference


def test_stock_peft_says_that_it_does_not_know_the_field(tmp_path):
    adapt(model_of("mixtral")).save_pretrained(tmp_path)
    with stock_peft():
        with pytest.warns(UserWarning, match="target_parameters"):
            PeftConfig.from_pretrained(tmp_path)
        with pytest.warns(UserWarning), pytest.raises(ValueError, match="target_parameters"):
            PeftModel.from_pretrained(model_of("mixtral"), tmp_path)


def test_targets_of_a_further_adapter_have_to_be_the_same():
    model = adapt(model_of("mixtral"))
    before = model.state_dict().keys()
    with pytest.raises(HiraError, match=r"down_proj.* 'default'"):
        model.add_adapter("other", HiraConfig(r=2, target_modules=[], target_parameters=EXPERTS[:1]))
    assert model.state_dict().keys() == before
    model.add_adapter("attention", HiraConfig(r=2, target_modules=["q_proj"]))
    assert any("q_proj.hira_A.attention" in key for key in model.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_parameters": "experts.down_proj"}, "target_parameters"),
        ({"hira_dropout": 0.1}, "hira_dropout"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"target_parameters": ["experts.down_proj", "experts.up_proj"]}, r"experts\.up_proj"),
        ({"target_parameters": ["input_layernorm.weight"]}, r"shape \(32,\)"),
        ({"target_parameters": ["q_proj.weight"], "target_modules": ["q_proj"]}, "valid target"),
    ],
)
def test_bad_targets_adapt_nothing(options, message):
    model = model_of("mixtral")
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        adapt(model, **options)
    assert [(name, type(module)) for name, module in model.named_modules()] == before


def test_a_parameter_and_its_module_are_not_adapted_both():
    model = adapt(model_of("mixtral"), target_parameters=["q_proj.weight"])
    with pytest.raises(HiraError, match="parameter weight"):
        model.add_adapter("other", HiraConfig(r=2, target_modules=["q_proj"]))


def test_a_parameter_that_is_not_dense_is_refused():
    model = model_of("mixtral")
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.data.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(HiraError, match=r"experts\.down_proj: .*float8_e4m3fn"):
        adapt(model)
    assert not any(isinstance(module, ParamWrapper) for module in model.modules())


def test_a_parametrized_parameter():
    base = nn.Sequential(nn.Linear(6, 5, bias=False)).double()
    nn.utils.parametrize.register_parametrization(base[0], "weight", nn.Tanh())
    W0, x = base[0].weight.detach(), torch.randn(4, 6, dtype=torch.float64)
    config = HiraConfig(r=R, target_parameters=["0.weight"], init_weights=False)
    model = get_peft_model(base, config).double()
    wrapper = model.base_model.model[0]
    A, B = wrapper.hira_A["default"], wrapper.hira_B["default"]
    torch.testing.assert_close(model(x), reference.linear(x, W0, A, B), rtol=1e-12, atol=1e-12)
    with pytest.raises(HiraError, match=r"^0\.weight: .*ParametrizedLinear"):
        model.merge_adapter()
    assert torch.equal(model.unload()(x), x @ W0.T)


def test_mixed_models_are_refused():
    model = PeftMixedModel(model_of("mixtral"), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(HiraError, match="mixed"):
        model.add_adapter("hira", HiraConfig(r=2, target_modules=[], target_parameters=EXPERTS))


@pytest.mark.parametrize(("kind", "defaults"), [("mixtral", {"q_proj", "v_proj"}), ("gpt_oss", None)])
def test_without_target_modules_the_architectures_are_adapted_where_it_has_some(kind, defaults):
    model = adapt(model_of(kind), target_modules=None)
    assert model.peft_config["default"].target_modules == defaults
    kinds = {type(m) for m in model.modules() if isinstance(m, hira.HiraLayer)}
    assert kinds == ({ParamWrapper, hira.Linear} if defaults else {ParamWrapper})


def test_a_config_of_stock_peft_has_no_such_field():
    with stock_peft():
        config = hira.peft_integration.registration.peft.HiraConfig(r=2, target_modules=["q_proj"])
    assert not hasattr(config, "target_parameters")
    assert get_peft_model(model_of("mixtral"), config).base_model.targeted_module_names


def test_a_parameter_that_zero_3_has_partitioned_is_refused():
    model = adapt(model_of("mixtral"))
    wrapper_of(model).get_base_layer().down_proj.ds_id = 0  # by which DeepSpeed knows its parameters
    with pytest.raises(HiraError, match=r"down_proj of MixtralExperts.* processes"):
        model(torch.arange(6).view(1, 6))
