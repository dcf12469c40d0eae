"""Names of adapters: those that PyTorch or PEFT cannot hold are refused, every other one is saved and found again."""

from __future__ import annotations

import re

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from hira import HiraConfig, HiraError

X = torch.randn(4, 6)
REFUSED = [
    "",
    " ",
    "a ",
    " a",
    "my.adapter",
    "a/b",
    "/a",
    "a\\b",
    "hira_A",
    "hira_v2",
    "keys",
    "update",
    "type",
    "train",
]
ALLOWED = [
    "default",
    "0",
    "a b",
    "名前",
    "weight",
    "bias",
    "model",
    "base_model",
    "hira",
    "A",
    "default_0",
    "base_layer",
]


class Body(nn.Module):
    """Modules whose names are those of adapters here."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight_proj, self.default, self.score = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.score(self.default(self.weight_proj(x)))


def config(**options) -> HiraConfig:
    return HiraConfig(**{"r": 2, "target_modules": ["weight_proj", "default"], "init_weights": False, **options})


def structure(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules()]


@pytest.mark.parametrize("name", REFUSED)
def test_a_name_that_cannot_be_held_is_refused_before_anything_changes(name, tmp_path):
    body = Body()
    before = structure(body)
    for add in (
        lambda: get_peft_model(body, config(), adapter_name=name),
        lambda: get_peft_model(body, config(), adapter_name=name, mixed=True),
        lambda: inject_adapter_in_model(config(), body, name),
    ):
        with pytest.raises(HiraError, match=re.escape(repr(name))):
            add()
        assert structure(body) == before
    model = get_peft_model(body, config(), adapter_name="first")
    model.save_pretrained(tmp_path)
    before = structure(model)
    for add in (lambda: model.add_adapter(name, config()), lambda: model.load_adapter(tmp_path / "first", name)):
        with pytest.raises(HiraError, match=re.escape(repr(name))):
            add()
        assert structure(model) == before
        assert list(model.peft_config) == ["first"]
    with pytest.raises(HiraError, match=re.escape(repr(name))):
        PeftModel.from_pretrained(Body(), tmp_path / "first", adapter_name=name)


@pytest.mark.parametrize("mixed", [False, True])
def test_a_refused_adapter_leaves_the_configurations_of_an_adapted_model(mixed):
    body, first = Body(), config()
    inject_adapter_in_model(first, body, "first")
    before = structure(body)
    for name in ("my.adapter", "first"):
        with pytest.raises(HiraError):
            get_peft_model(body, config(r=3), adapter_name=name, mixed=mixed)
        assert body.peft_config == {"first": first}
        assert body.peft_config["first"] is first
        assert structure(body) == before
    inject_adapter_in_model(config(r=3), body, "second")
    assert list(body.peft_config) == ["first", "second"]


def test_a_name_that_is_no_text_is_refused():
    body = Body()
    with pytest.raises(HiraError, match=r"^3 .*int"):
        inject_adapter_in_model(config(), body, 3)
    assert structure(body) == structure(Body())


def test_transformers_own_method_refuses_it():
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1, num_key_value_heads=1))
    before = structure(llama)
    with pytest.raises(HiraError, match=r"'my\.adapter'"):
        llama.add_adapter(HiraConfig(target_modules=["q_proj"]), "my.adapter")
    assert structure(llama) == before


def outputs_after_loading(names: list[str], folder, **options) -> list[tuple[Tensor, Tensor]]:
    """For each adapter, what a model computes with it, and what another one computes that loaded it."""
    model = get_peft_model(Body(), config(**options), adapter_name=names[0]).eval()
    for name in names[1:]:
        model.add_adapter(name, config(**options))
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data += torch.randn_like(parameter)
    model.save_pretrained(folder)
    found = []
    for name in names:
        model.set_adapter(name)
        path = folder if name == "default" else folder / name
        for other in (name, "fresh"):
            loaded = PeftModel.from_pretrained(Body(), path, adapter_name=other).eval()
            found.append((model(X), loaded(X)))
    return found


@pytest.mark.parametrize("name", ALLOWED)
def test_other_names_are_saved_and_found_again(name, tmp_path):
    for expected, found in outputs_after_loading([name], tmp_path):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "names",
    [["a", "weight_proj"], ["default", "other"], ["a", "model"], ["a", "base_model"], ["a", "weight"], ["a", "ab"]],
    ids="-".join,
)
def test_an_adapter_named_as_a_module_is_saved_beside_another(names, tmp_path):
    """PEFT leaves out every tensor whose name has another adapter's name in it, a module's name or not."""
    assert not torch.equal(*(expected for expected, _ in outputs_after_loading(names, tmp_path)[::2]))
    for expected, found in outputs_after_loading(names, tmp_path):
        assert torch.equal(found, expected)


def test_no_tensor_of_another_adapter_is_saved_with_one(tmp_path):
    outputs_after_loading(["a", "model"], tmp_path)
    for name in ("a", "model"):
        keys = peft.utils.load_peft_weights(tmp_path / name)
        assert len(keys) == 4
        assert all(key.endswith((".hira_A", ".hira_B")) for key in keys)


@pytest.mark.parametrize("name", ["weight", "bias", "score", "highscore", "modules_to_save"])
def test_a_name_that_saved_modules_cannot_go_with_is_refused(name):
    body = Body()
    with pytest.raises(HiraError, match=f"'{name}'"):
        get_peft_model(body, config(modules_to_save=["score"]), adapter_name=name)
    assert structure(body) == structure(Body())


def test_a_second_adapter_cannot_have_the_name_of_a_module_to_save():
    """PEFT would leave the module out when it saves the first one."""
    model = get_peft_model(Body(), config(modules_to_save=["score"]), adapter_name="first")
    before = structure(model)
    with pytest.raises(HiraError, match="'score'"):
        model.add_adapter("score", config())
    assert structure(model) == before


def test_saved_modules_go_with_names_of_other_modules(tmp_path):
    for expected, found in outputs_after_loading(["default", "weight_proj"], tmp_path, modules_to_save=["score"]):
        assert torch.equal(found, expected)
