"""add_weighted_adapter: the weighted sum of adapters' updates, exact or of a smaller rank, on every kind of layer."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from every_kind import IDS, LAYERS, PARAMETERS, TARGETS, Net
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from hira import HiraConfig, HiraError
from hira.tuner.model import hira_layers


def config(r: int, targets: Any = TARGETS, **options: Any) -> HiraConfig:
    return HiraConfig(r=r, target_modules=targets, init_weights=False, **options)


def adapted(**options: Any) -> Any:
    """The second adapter has a LoRA beside HiRA."""
    torch.manual_seed(0)
    model = get_peft_model(Net(), config(2, target_parameters=PARAMETERS, **options), adapter_name="one")
    model.add_adapter("two", config(3, target_parameters=PARAMETERS, lora_r=2))
    return model.double().eval()


def updates(model: Any, name: str) -> dict[str, Tensor]:
    """What an adapter adds to each weight."""
    return {
        f"{key} {type(layer).__name__}": layer.get_additive_delta(name)
        for key, layer in model.named_modules()
        if layer in set(hira_layers(model)) and name in layer.r
    }


def assert_updates(model: Any, name: str, wanted: dict[str, Tensor], **tolerance: float) -> None:
    found = updates(model, name)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, **tolerance)


@pytest.mark.parametrize("kind", ["cat", "linear"])
def test_the_sum_is_exact(kind):
    model = adapted()
    model.add_weighted_adapter(["one", "two"], [0.75, -2.0], "sum", kind)
    a, b = updates(model, "one"), updates(model, "two")
    assert len(a) == LAYERS
    assert_updates(model, "sum", {key: 0.75 * a[key] - 2 * b[key] for key in a}, rtol=1e-9, atol=1e-9)
    assert model.peft_config["sum"].r == 5
    assert model.active_adapters == ["one"]
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".sum" in name)


def test_svd_of_the_full_rank_is_the_sum():
    model = adapted()
    model.add_weighted_adapter(["one", "two"], [0.75, -2.0], "sum", svd_rank=5)
    a, b = updates(model, "one"), updates(model, "two")
    assert_updates(model, "sum", {key: 0.75 * a[key] - 2 * b[key] for key in a}, rtol=1e-4, atol=1e-4)


def test_svd_is_the_nearest_of_its_rank():
    model = adapted()
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum")
    assert model.peft_config["sum"].r == 3
    layer = model.base_model.model.first
    exact = layer.get_delta_weight("one") + layer.get_delta_weight("two")
    error = torch.linalg.matrix_norm(exact - layer.get_delta_weight("sum"))
    torch.testing.assert_close(error, torch.linalg.svdvals(exact)[3:].norm(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("end", ["", "_svd"])
@pytest.mark.parametrize("kind", ["ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_one_adapter_whose_entries_are_all_kept_stays_as_it_is(kind, end):
    model = adapted()
    model.add_weighted_adapter(["two"], [1.0], "same", kind + end, density=1.0)
    assert_updates(model, "same", updates(model, "two"), rtol=1e-4, atol=1e-4)


def test_pruning_keeps_the_largest_entries():
    model = adapted()
    model.add_weighted_adapter(["one"], [1.0], "pruned", "magnitude_prune", svd_rank=8, density=0.25)
    layer = model.base_model.model.first
    before, after = layer.get_delta_weight("one"), layer.get_delta_weight("pruned")
    kept = after.abs() > 1e-5
    assert kept.sum() == round(0.25 * before.numel())
    torch.testing.assert_close(after[kept], before[kept], rtol=1e-4, atol=1e-5)
    assert before[kept].abs().min() >= before[~kept].abs().max()


@pytest.mark.parametrize("clamp", [None, 0.0, 0.37, 0.9, 1.0])
def test_clamping_is_that_of_lora(clamp):
    products = []
    for config_of in (
        lambda r: LoraConfig(r=r, lora_alpha=r, target_modules=["0"], init_lora_weights=False),
        lambda r: HiraConfig(r=r, target_modules=["0"], init_weights=False),
    ):
        torch.manual_seed(0)
        model = get_peft_model(nn.Sequential(nn.Linear(9, 7)), config_of(2), adapter_name="one")
        model.add_adapter("two", config_of(3))
        layer = model.base_model.model[0]
        generator = torch.Generator().manual_seed(1)
        for parameter in (p for name, p in model.named_parameters() if "lora_" in name or "hira_" in name):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
        options = {"svd_clamp": clamp, "svd_full_matrices": clamp != 0.9, "svd_driver": None}
        model.add_weighted_adapter(["one", "two"], [0.75, -2.0], "sum", "svd", 4, **options)
        products.append(layer.get_delta_weight("sum").detach())
    torch.testing.assert_close(*products, rtol=1e-4, atol=1e-5)


def test_an_error_while_it_is_made_changes_nothing():
    model = adapted()
    tuner = model.base_model
    tuner.targeted_module_names = []  # injecting an adapter lists the modules anew
    before = [(module, dict(vars(module))) for module in model.modules()]
    names, lists = (
        set(model.state_dict()),
        {name: list(value) for name, value in vars(tuner).items() if name[:4] == "targ"},
    )
    with pytest.raises(HiraError, match="svd_driver"):
        model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum", svd_driver="gesvd")  # there is no CUDA device
    assert set(model.state_dict()) == names
    assert {name: vars(tuner)[name] for name in lists} == lists
    assert set(tuner.peft_config) == {"one", "two"}
    assert all(vars(module).keys() == was.keys() for module, was in before)
    assert all(vars(module)[name] is value for module, was in before for name, value in was.items())
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum")


def test_ranks_of_a_pattern_are_those_of_the_modules_alone():
    """A module's name may end with another's."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)))
    model = get_peft_model(base, config(2, ["0", "1.1", "1.2"], rank_pattern={"^0": 3}), adapter_name="one")
    model.add_weighted_adapter(["one"], [1.0], "same", "cat")
    again = get_peft_model(copy.deepcopy(base), model.peft_config["same"])
    ranks = [
        {layer.name: layer.r[name] for layer in hira_layers(m)} for m, name in ((model, "same"), (again, "default"))
    ]
    assert ranks[0] == ranks[1] == {"0": 3, "1.0": 2, "1.1": 2, "1.2": 2}


def test_scales_are_part_of_the_sum():
    model = adapted(hira_alpha=8)
    assert any(layer.alpha_scale["one"] != 1 for layer in hira_layers(model))
    model.base_model.model.first.set_scale("two", 0.5)
    a, b = updates(model, "one"), updates(model, "two")
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum", "cat")
    assert model.peft_config["sum"].hira_alpha is None
    assert_updates(model, "sum", {key: a[key] + b[key] for key in a}, rtol=1e-9, atol=1e-9)


def test_adapters_of_different_modules_and_ranks(tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(Net(), config(2, ["first", "second"], rank_pattern={"second": 4}), adapter_name="one").eval()
    model.add_adapter("two", config(3, ["first", "embedding"]))
    model.add_weighted_adapter(["one", "two"], [1.0, 2.0], "sum", "cat")
    a, b = updates(model, "one"), updates(model, "two")
    wanted = {key: a.get(key, 0) + 2 * b.get(key, 0) for key in a | b}
    assert_updates(model, "sum", wanted)
    ranks = {layer.name.rpartition(".")[2]: layer.r["sum"] for layer in hira_layers(model)}
    assert ranks == {"first": 5, "second": 4, "embedding": 3}
    model.set_adapter("sum")
    y = model(IDS)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    torch.manual_seed(0)
    # attention has a forward of its own where nothing trains
    torch.testing.assert_close(PeftModel.from_pretrained(Net(), tmp_path / "sum").eval()(IDS), y)
    model.merge_adapter()
    torch.testing.assert_close(model(IDS), y)


def test_patterns_of_modules_are_joined():
    torch.manual_seed(0)
    model = get_peft_model(Net(), config(2, r".*first"), adapter_name="one")
    model.add_adapter("two", config(2, r".*second"))
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum", "cat")
    assert updates(model, "sum").keys() == updates(model, "one").keys() | updates(model, "two").keys()


@pytest.mark.parametrize(
    ("arguments", "mentioned"),
    [
        ((["one", "absent"], [1.0, 1.0], "sum"), "absent"),
        (([], [], "sum"), "adapters"),
        (("onetwo", [1.0, 1.0], "sum"), "adapters"),
        ((["one", "two"], [1.0], "sum"), "weights"),
        ((["one", "two"], [1.0, math.nan], "sum"), "weights"),
        ((["one", "two"], [1.0, 1.0], "two"), "'two'"),
        ((["one", "two"], [1.0, 1.0], "sum", "mean"), "mean"),
        ((["one", "two"], [1.0, 1.0], "sum", "svd", 0), "svd_rank"),
        ((["one", "two"], [1.0, 1.0], "sum", "svd", 2, 1.5), "svd_clamp"),
        ((["one", "two"], [1.0, 1.0], "sum", "svd", 2, None, True, "gesdd"), "svd_driver"),
        ((["one", "two"], [1.0, 1.0], "sum", "ties"), "density"),
        ((["one", "two"], [1.0, 1.0], "sum", "ties", None, None, False, None, 1.5), "density"),
        ((["one", "saving"], [1.0, 1.0], "sum"), "modules_to_save"),
        ((["one", "pattern"], [1.0, 1.0], "sum"), "target_parameters"),
        ((["plain", "pattern"], [1.0, 1.0], "sum"), "target_modules"),
        ((["plain", "first layer"], [1.0, 1.0], "sum"), "layers_to_transform"),
    ],
)
def test_what_is_refused_changes_nothing(arguments, mentioned):
    model = adapted()
    model.add_adapter("saving", config(2, ["first"], target_parameters=PARAMETERS, modules_to_save=["norm"]))
    model.add_adapter("plain", config(2, ["first"]))
    model.add_adapter("first layer", config(2, ["first"]))
    model.peft_config["first layer"].layers_to_transform = [0]
    model.add_adapter("pattern", config(2, r".*first"))
    names = set(model.state_dict())
    with pytest.raises(HiraError, match=mentioned):
        model.add_weighted_adapter(*arguments)
    assert set(model.state_dict()) == names
    assert set(model.peft_config) == {"one", "two", "saving", "pattern", "plain", "first layer"}
