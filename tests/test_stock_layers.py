"""Models and configurations of PEFT's own HiRA beside ours: refused, told apart, copied, pickled."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from pathlib import Path

import peft
import pytest
import torch
from stock_peft import stock_peft, two_linear
from torch import nn

import hira


def test_a_stock_config_made_before_works(tmp_path):
    with stock_peft():
        stock_class = peft.HiraConfig
        config = stock_class(r=2, target_modules=["0", "2"], rank_pattern={"2": 3}, init_weights=False)
    assert not isinstance(config, hira.HiraConfig)
    model = peft.get_peft_model(two_linear(), config)
    assert type(model.base_model) is hira.HiraModel
    layers = [module for module in model.modules() if isinstance(module, hira.HiraLayer)]
    assert [layer.r["default"] for layer in layers] == [2, 3]
    model.save_pretrained(tmp_path)
    x = torch.randn(6, 4)
    base = two_linear()
    base.load_state_dict(model.unload().state_dict())
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    adapted = [module for module in loaded.modules() if isinstance(module, hira.HiraLayer)]
    assert isinstance(loaded.peft_config["default"], hira.HiraConfig)
    assert all(
        torch.equal(new.get_delta_weight("default"), old.get_delta_weight("default"))
        for new, old in zip(adapted, layers, strict=True)
    )
    assert not torch.equal(loaded(x), base[2].base_layer(torch.relu(base[0].base_layer(x))))


def test_a_model_with_stock_layers_is_refused():
    with stock_peft():
        stock = peft.get_peft_model(two_linear(), peft.HiraConfig(r=2, target_modules=["0"], init_weights=False))
    x = torch.randn(6, 4)
    expected = stock(x)
    base = stock.base_model.model
    modules = {name: type(module) for name, module in base.named_modules()}
    refusal = "^0 .*PEFT's own HiRA"
    config = hira.HiraConfig(r=2, target_modules=["2"])
    with pytest.raises(hira.HiraError, match=refusal):
        peft.get_peft_model(base, config)
    with pytest.raises(hira.HiraError, match=refusal):
        peft.inject_adapter_in_model(config, base)
    with pytest.raises(hira.HiraError, match=refusal):
        peft.get_peft_model(base, config, mixed=True)
    with pytest.raises(hira.HiraError, match=refusal):
        stock.add_adapter("other", config)
    assert list(stock.peft_config) == ["default"]
    assert {name: type(module) for name, module in base.named_modules()} == modules
    assert torch.equal(stock(x), expected)


def test_a_model_with_stock_layers_goes_on_after_unregister():
    """The other thing that the refusal advises."""
    with stock_peft():
        stock = peft.get_peft_model(two_linear(), peft.HiraConfig(r=2, target_modules=["0"]))
        stock.add_adapter("other", peft.HiraConfig(r=3, target_modules=["0", "2"]))
        assert stock.base_model.model[0].r == {"default": 2, "other": 3}


def test_what_the_refusal_advises_works(tmp_path):
    with stock_peft():
        stock = peft.get_peft_model(two_linear(), peft.HiraConfig(r=2, target_modules=["0"], init_weights=False))
    x = torch.randn(6, 4)
    expected = stock(x)
    stock.save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(stock.unload(), tmp_path)
    assert isinstance(model.base_model.model[0], hira.Linear)
    torch.testing.assert_close(model(x), expected)


def test_models_keep_their_layers_after_unregister():
    model = peft.get_peft_model(two_linear(), peft.HiraConfig(r=2, target_modules=["0"], init_weights=False))
    x = torch.randn(6, 4)
    expected = model(x)
    with stock_peft():
        assert torch.equal(model(x), expected)
        fresh = peft.get_peft_model(two_linear(), peft.HiraConfig(r=2, target_modules=["0"]))
        assert type(fresh.base_model).__module__ == "peft.tuners.hira.model"
        assert not any(isinstance(module, hira.HiraLayer) for module in fresh.modules())
    assert torch.equal(model(x), expected)


class Three(nn.Module):
    """A layer of each kind that PEFT's own HiRA has."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv, self.linear = nn.Embedding(7, 4), nn.Conv2d(1, 2, 3), nn.Linear(4, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return self.linear(x) + self.conv(x[:, None]).mean()


IDS = torch.tensor([[1, 5, 2, 6], [1, 6, 0, 3]])
TARGETS = ["embed", "conv", "linear"]


def stock_model() -> peft.PeftModel:
    with stock_peft():
        return peft.get_peft_model(Three(), peft.HiraConfig(r=2, target_modules=TARGETS, init_weights=False)).eval()


def test_layers_print_whose_they_are():
    ours = peft.get_peft_model(Three(), peft.HiraConfig(r=2, target_modules=TARGETS))
    stock = stock_model()
    for name, kind in zip(TARGETS, ("Embedding", "Conv2d", "Linear"), strict=True):
        layers = {whose: repr(getattr(model.base_model.model, name)) for whose, model in (("o", ours), ("s", stock))}
        assert layers["o"].startswith(f"hira.{kind}(\n  hira {hira.__version__}\n")
        assert layers["s"].startswith(f"peft.tuners.hira.{kind}(\n")
        assert f"hira {hira.__version__}" not in layers["s"]
    with stock_peft():
        assert repr(stock.base_model.model.linear).startswith("hira.Linear(\n")
        assert f"hira {hira.__version__}" in repr(ours.base_model.model.linear)


def test_models_without_linear_layers_print_whose_they_are():
    experts = nn.Module()
    experts.register_parameter("down_proj", nn.Parameter(torch.randn(2, 3, 4)))
    model = nn.Sequential(experts, nn.MultiheadAttention(4, 2))
    config = hira.HiraConfig(r=2, target_modules=["1"], target_parameters=["0.down_proj"])
    adapted = peft.get_peft_model(model, config)
    assert len(re.findall(rf"^ *hira {re.escape(hira.__version__)}$", repr(adapted), re.MULTILINE)) == 3


def stock_warnings(run) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(warning.message) for warning in caught if "PEFT's own HiRA" in str(warning.message)]


@pytest.mark.parametrize("first", ["forward", "save", "one layer of another kind"])
def test_a_model_with_stock_layers_is_warned_of_once(first, tmp_path):
    stock = stock_model()
    expected = stock(IDS)  # warned of, or not, in another registration
    hira.unregister()
    hira.register()
    runs = {
        "forward": lambda: stock(IDS),
        "save": lambda: stock.save_pretrained(tmp_path),
        "one layer of another kind": lambda: stock.base_model.model.conv(torch.randn(1, 1, 4, 4)),
    }
    (message,) = stock_warnings(runs[first])
    assert "import hira before" in message.lower()
    assert "hira.unregister()" in message
    for run in runs.values():
        assert not stock_warnings(run)
    assert torch.equal(stock(IDS), expected)
    assert not any(line.startswith("- hira") for line in (tmp_path / "README.md").read_text().splitlines())
    with stock_peft():
        assert not stock_warnings(lambda: stock(IDS))


def test_our_layers_are_not_warned_of(tmp_path):
    hira.unregister()
    hira.register()
    ours = peft.get_peft_model(Three(), hira.HiraConfig(r=2, target_modules=TARGETS))
    assert not stock_warnings(lambda: (ours(IDS), ours.save_pretrained(tmp_path)))


def card(folder: Path) -> tuple[list[str], dict]:
    import huggingface_hub

    read = huggingface_hub.ModelCard.load(folder / "README.md")
    return read.text.splitlines(), read.data.to_dict()


def test_the_model_card_names_hira(tmp_path):
    model = peft.get_peft_model(two_linear(), hira.HiraConfig(r=2, target_modules=["0"]))
    for _ in range(2):  # the second time PEFT updates the card
        model.save_pretrained(tmp_path)
        lines, data = card(tmp_path)
        at = lines.index("### Framework versions")
        assert lines[at + 2 : at + 4] == [f"- PEFT {peft.__version__}", f"- hira {hira.__version__}"]
        assert lines.count(f"- hira {hira.__version__}") == 1
        assert data["library_name"] == "peft"
        assert data["tags"] == ["hira"]


def test_cards_of_other_adapters_are_peft_own(tmp_path):
    peft.get_peft_model(two_linear(), peft.LoraConfig(r=2, target_modules=["0"])).save_pretrained(tmp_path / "a")
    with stock_peft():
        peft.get_peft_model(two_linear(), peft.LoraConfig(r=2, target_modules=["0"])).save_pretrained(tmp_path / "b")
    assert (tmp_path / "a" / "README.md").read_text() == (tmp_path / "b" / "README.md").read_text()


def test_stock_objects_are_copied_and_pickled_while_hira_is_registered():
    stock = stock_model()
    with stock_peft():
        config = peft.HiraConfig(r=3, target_modules=["0"])
    expected = stock(IDS)
    for copied in (copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))):
        assert copied(config) == config
        assert type(copied(config)) is type(config)
        again = copied(stock)
        assert type(again.base_model.model.linear) is type(stock.base_model.model.linear)
        assert torch.equal(again(IDS), expected)
    # what was pickled while registered is read while registered
    blob = pickle.dumps(stock)
    hira.unregister()
    hira.register()
    assert torch.equal(pickle.loads(blob)(IDS), expected)


def test_a_pickled_stock_config_becomes_ours():
    with stock_peft():
        blob = pickle.dumps(peft.HiraConfig(r=3, target_modules=["0"]))
    config = pickle.loads(blob)
    assert type(config) is hira.HiraConfig
    assert config == hira.HiraConfig(r=3, target_modules=["0"])


def test_a_pickled_stock_model_is_refused_and_not_taken_for_ours():
    stock = stock_model()
    with stock_peft():
        expected, blob = stock(IDS), pickle.dumps(stock)
    with pytest.raises(hira.HiraError, match=r"PEFT's own HiRA.*hira\.unregister\(\)"):
        pickle.loads(blob)
    with stock_peft():
        assert torch.equal(pickle.loads(blob)(IDS), expected)
