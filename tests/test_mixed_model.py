"""PEFT's mixed models: HiRA beside LoRA, on modules of their own and on the same ones."""

from __future__ import annotations

import peft
import pytest
import torch
from stock_peft import stock_peft
from torch import Tensor, nn

import hira

X = torch.linspace(-2, 2, 24, dtype=torch.float64).reshape(6, 4)
HIRA_ON = {"beside": ["0", "2"], "same": ["0", "1", "2"]}
LORA_ON = {"beside": ["1", "3"], "same": ["0", "2", "3"]}
PLACES = pytest.mark.parametrize("place", ["beside", "same"])
ORDERS = pytest.mark.parametrize("first", ["hira", "lora"])


def configs(place: str) -> dict[str, peft.PeftConfig]:
    return {
        "hira": hira.HiraConfig(r=2, target_modules=HIRA_ON[place], init_weights=False),
        "lora": peft.LoraConfig(r=2, target_modules=LORA_ON[place], init_lora_weights=False),
    }


def mixed_model(place: str, first: str) -> peft.PeftMixedModel:
    """Four linear layers in a row, with one adapter of each kind, added in an order."""
    body = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(3, 2))
    second = {"hira": "lora", "lora": "hira"}[first]
    model = peft.get_peft_model(body, configs(place)[first], adapter_name=first, mixed=True)
    model.add_adapter(second, configs(place)[second])
    model.set_adapter(["hira", "lora"])
    return model.double().eval()


def effective_weight(layer: nn.Module, names: set[str]) -> Tensor:
    """W0 with the HiRA adapter, plus the LoRA update."""
    if not hasattr(layer, "base_layer"):
        return layer.weight
    base = layer.get_base_layer()
    weight, lora = base.weight.clone(), torch.zeros_like(base.weight)
    while layer is not base:
        if isinstance(layer, hira.HiraLayer) and "hira" in names:
            weight = weight * (1 + layer.hira_B["hira"] @ layer.hira_A["hira"])
        elif not isinstance(layer, hira.HiraLayer) and "lora" in names:
            lora = layer.scaling["lora"] * layer.lora_B["lora"].weight @ layer.lora_A["lora"].weight
        layer = layer.base_layer
    return weight + lora


def expected(model: peft.PeftMixedModel, names: set[str]) -> Tensor:
    y = X
    for layer in model.base_model.model:
        bias = (layer.get_base_layer() if hasattr(layer, "base_layer") else layer).bias
        y = y @ effective_weight(layer, names).t() + bias
    return y


def base_weights(model: nn.Module) -> list[Tensor]:
    """The weights of the layers under the adapters, in order; the model's own, not copies."""
    layers = model.base_model.model
    return [(layer.get_base_layer() if hasattr(layer, "base_layer") else layer).weight for layer in layers]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_state(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    assert [name for name in before if not torch.equal(before[name].nan_to_num(7), after[name].nan_to_num(7))] == []


def test_stock_peft_refuses_what_it_calls_compatible():
    with stock_peft(), pytest.raises((TypeError, ValueError), match=r"HIRA|HiraConfig"):
        config = peft.HiraConfig(r=2, target_modules=["0"])
        peft.get_peft_model(nn.Sequential(nn.Linear(4, 5)), config, mixed=True)


@PLACES
@ORDERS
def test_outputs(place, first):
    model = mixed_model(place, first)
    torch.testing.assert_close(model(X), expected(model, {"hira", "lora"}))
    model.set_adapter("hira")
    torch.testing.assert_close(model(X), expected(model, {"hira"}))
    model.set_adapter(["lora"])
    torch.testing.assert_close(model(X), expected(model, {"lora"}))
    with model.disable_adapter():
        torch.testing.assert_close(model(X), expected(model, set()))
    assert not torch.allclose(expected(model, {"hira"}), expected(model, {"lora"}))


@PLACES
@ORDERS
def test_both_kinds_train(place, first):
    model = mixed_model(place, first).train()
    model(X).square().sum().backward()
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[-2] for name in names if "hira" in name} == {"hira_A", "hira_B"}
    assert all("hira_" in name or "lora_" in name for name in names)
    assert len(names) == 2 * (len(HIRA_ON[place]) + len(LORA_ON[place]))
    gradients = [model.get_parameter(name).grad for name in names]
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)


@PLACES
@ORDERS
@pytest.mark.parametrize("safe", [False, True], ids=["plain", "safe"])
def test_merge_and_unmerge(place, first, safe):
    model = mixed_model(place, first)
    before = snapshot(model)
    y = model(X)
    weights = [effective_weight(layer, {"hira", "lora"}).detach() for layer in model.base_model.model]
    model.base_model.merge_adapter(safe_merge=safe)
    for found, wanted in zip(base_weights(model), weights, strict=True):
        torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(model(X), y)
    model.base_model.unmerge_adapter()
    torch.testing.assert_close(model(X), y)
    # LoRA's unmerge subtracts; a layer that HiRA merged into gets its own weight back, bit for bit
    for name, value in model.state_dict().items():
        layer = name.removeprefix("base_model.model.")[0]
        if layer in HIRA_ON[place]:
            assert torch.equal(value, before[name]), name
        else:
            torch.testing.assert_close(value, before[name])


@PLACES
@ORDERS
def test_merge_and_unload(place, first):
    model = mixed_model(place, first)
    y = model(X)
    merged = model.merge_and_unload()
    assert [type(module) for module in merged] == [nn.Linear] * 4
    torch.testing.assert_close(merged(X), y)


@PLACES
@ORDERS
def test_merge_of_the_hira_adapter_alone(place, first):
    model = mixed_model(place, first)
    wanted = expected(model, {"hira"})
    merged = model.merge_and_unload(adapter_names=["hira"])
    assert [type(module) for module in merged] == [nn.Linear] * 4
    torch.testing.assert_close(merged(X), wanted)


@PLACES
@ORDERS
def test_unload_gives_the_base_back(place, first):
    model = mixed_model(place, first)
    wanted = [weight.clone() for weight in base_weights(model)]
    plain = model.unload()
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(plain, wanted, strict=True))
    assert [type(module) for module in plain] == [nn.Linear] * 4


@ORDERS
def test_delete_one_kind(first):
    model = mixed_model("beside", first)
    wanted = expected(model, {"lora"})
    model.delete_adapter("hira")
    model.set_adapter("lora")
    torch.testing.assert_close(model(X), wanted)
    assert [name for name in model.state_dict() if "hira_" in name] == []
    with pytest.raises(ValueError, match=r"'hira'.*'lora'"):
        model.set_adapter("hira")


@PLACES
@ORDERS
@pytest.mark.parametrize("broken", ["hira_A", "lora_A"])
@pytest.mark.parametrize("unload", [False, True], ids=["merge", "unload"])
def test_a_safe_merge_that_fails_changes_nothing(place, first, broken, unload):
    """The last layer is broken, so that others were merged before it is reached."""
    model = mixed_model(place, first)
    parameters = [parameter for name, parameter in model.named_parameters() if broken in name]
    parameters[-1].data.flatten()[0] = float("nan")
    modules = {name: type(module) for name, module in model.named_modules()}
    before = snapshot(model)
    attempt = model.merge_and_unload if unload else model.base_model.merge_adapter
    with pytest.raises(ValueError, match=rf"NaNs.* {broken[:4]}"):
        attempt(safe_merge=True)
    assert {name: type(module) for name, module in model.named_modules()} == modules
    assert_same_state(model, before)
    assert not any(module.merged for module in model.modules() if isinstance(module, hira.HiraLayer))
    parameters[-1].data.nan_to_num_(0.5)
    y = model(X)
    torch.testing.assert_close(model.merge_and_unload(safe_merge=True)(X), y)


def test_an_unknown_adapter_is_named():
    model = mixed_model("beside", "hira")
    before = snapshot(model)
    for attempt in (model.base_model.merge_adapter, model.merge_and_unload):
        with pytest.raises(hira.HiraError, match="'nope'"):
            attempt(adapter_names=["hira", "nope"])
    assert_same_state(model, before)


def test_bad_configs_adapt_nothing():
    model = mixed_model("beside", "lora")
    before = snapshot(model)
    bad = hira.HiraConfig(r=2, target_modules=["0"])
    bad.r = 0
    with pytest.raises(hira.HiraError, match="`r`"):
        model.add_adapter("other", bad)
    with pytest.raises(ValueError, match="'hira'"):
        model.add_adapter("hira", hira.HiraConfig(r=2, target_modules=["0"]))
    assert_same_state(model, before)
    assert set(model.peft_config) == {"hira", "lora"}
