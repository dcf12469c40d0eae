"""The checkpoint format: files written here load in PEFT's own HiRA, and the reverse, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from stock_peft import stock_peft
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import hira

IDS = torch.tensor([[1, 5, 9, 3, 0, 2], [1, 6, 7, 8, 4, 10]])
SHAPES = {
    "embed.hira_embedding_A": (3, 11),
    "embed.hira_embedding_B": (8, 3),
    "conv1.hira_A": (3, 8, 3),
    "conv1.hira_B": (6, 3, 1),
    "conv2.hira_A": (3, 1, 2, 3),
    "conv2.hira_B": (4, 3, 1, 1),
    "linear.hira_A": (3, 32),
    "linear.hira_B": (5, 3),
    "transposed.hira_A": (3, 5),
    "transposed.hira_B": (7, 3),
}
FIELDS = {
    *("r", "target_modules", "exclude_modules", "hira_dropout", "fan_in_fan_out", "modules_to_save", "init_weights"),
    *("layers_to_transform", "layers_pattern", "rank_pattern"),
}


class AllKinds(nn.Module):
    """One layer of each kind: embedding, 1-d and 2-d convolution, linear, and transformers' `Conv1D`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8)
        self.conv1 = nn.Conv1d(8, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 4, (2, 3), stride=(2, 3), padding=(1, 0))
        self.linear = nn.Linear(32, 5)
        self.transposed = Conv1D(7, 5)
        nn.init.normal_(self.transposed.weight)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv1(self.embed(ids).transpose(1, 2))
        x = self.conv2(x[:, None])  # (2, 4, 4, 2)
        return self.transposed(torch.tanh(self.linear(x.flatten(1))))


def config(**options) -> peft.HiraConfig:
    """Of the registered class."""
    targets = ["embed", "conv1", "conv2", "linear", "transposed"]
    return peft.HiraConfig(**{"r": 3, "target_modules": targets, "init_weights": False, **options})


def factors(model: nn.Module) -> dict[str, Tensor]:
    names = ((name.removeprefix("base_model.model."), value) for name, value in model.named_parameters())
    return {name.removesuffix(".default"): value.detach() for name, value in names if "hira_" in name}


def assert_same(some: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert some.keys() == other.keys()
    assert [name for name in some if not torch.equal(some[name], other[name])] == []


def read_config(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def test_keys_and_shapes(tmp_path):
    get_peft_model(AllKinds(), config()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {key: tuple(value.shape) for key, value in tensors.items()} == {
        f"base_model.model.{key}": shape for key, shape in SHAPES.items()
    }


def test_saved_here_loads_in_stock(tmp_path):
    model = get_peft_model(AllKinds(), config(init_weights=True)).eval()
    for value in factors(model).values():
        nn.init.normal_(value)
    model.save_pretrained(tmp_path)
    with stock_peft():
        stock = PeftModel.from_pretrained(AllKinds(), tmp_path)
        assert type(stock.base_model).__module__ == "peft.tuners.hira.model"
        assert_same(factors(stock), factors(model))
        torch.testing.assert_close(stock(IDS), model(IDS), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(stock(IDS), AllKinds()(IDS), rtol=1e-2)


def test_saved_by_stock_loads_here(tmp_path):
    with stock_peft():
        stock = get_peft_model(AllKinds(), config()).eval()
        expected = stock(IDS)
        stock.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(AllKinds(), tmp_path)
    assert type(model.base_model) is hira.HiraModel
    assert_same(factors(model), factors(stock))
    torch.testing.assert_close(model(IDS), expected, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "again")
    assert_same(
        load_file(tmp_path / "again/adapter_model.safetensors"), load_file(tmp_path / "adapter_model.safetensors")
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"hira_dropout": 0.25, "init_weights": "gaussian", "exclude_modules": ["conv1"]},
        {"rank_pattern": {"linear": 2}, "modules_to_save": ["conv2"], "target_modules": ["linear", "embed"]},
        {"target_modules": ".*(linear|embed)"},
    ],
    ids=["defaults", "options", "patterns", "expression"],
)
def test_the_configuration_file_is_the_same(tmp_path, options):
    get_peft_model(AllKinds(), config(**options)).save_pretrained(tmp_path / "ours")
    with stock_peft():
        get_peft_model(AllKinds(), config(**options)).save_pretrained(tmp_path / "stock")
    ours, stock = read_config(tmp_path / "ours"), read_config(tmp_path / "stock")
    assert ours["peft_type"] == "HIRA"
    assert ours.keys() >= FIELDS
    for name in ("target_modules", "exclude_modules"):  # written from sets
        if isinstance(stock[name], list):
            ours[name], stock[name] = sorted(ours[name]), sorted(stock[name])
    assert ours == stock


def test_configurations_load_in_the_other(tmp_path):
    options = {"hira_dropout": 0.25, "rank_pattern": {"linear": 2}, "layers_to_transform": [1], "layers_pattern": "h"}
    config(**options).save_pretrained(tmp_path / "ours")
    with stock_peft():
        config(**options).save_pretrained(tmp_path / "stock")
        loaded = peft.PeftConfig.from_pretrained(tmp_path / "ours")
        assert type(loaded) is peft.HiraConfig
        assert {name: getattr(loaded, name) for name in FIELDS} == {
            name: getattr(config(**options), name) for name in FIELDS
        }
    loaded = peft.PeftConfig.from_pretrained(tmp_path / "stock")
    assert type(loaded) is hira.HiraConfig
    assert {name: getattr(loaded, name) for name in FIELDS} == {
        name: getattr(config(**options), name) for name in FIELDS
    }


def test_a_rank_pattern_that_stock_ignored_loads_with_the_shapes_of_the_file(tmp_path):
    """Row 1 of the peer's faults: the file says rank 1 for two modules and holds tensors of rank 3."""
    pattern = {"linear": 1, "embed": 1}
    with stock_peft():
        stock = get_peft_model(AllKinds(), config(rank_pattern=pattern)).eval()
        expected = stock(IDS)
        stock.save_pretrained(tmp_path)
    assert read_config(tmp_path)["rank_pattern"] == pattern
    for low_cpu_mem_usage in (False, True):
        model = PeftModel.from_pretrained(AllKinds(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert_same(factors(model), factors(stock))
        assert model.base_model.model.linear.r == model.base_model.model.embed.r == {"default": 3}
        torch.testing.assert_close(model(IDS), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.merge_and_unload()(IDS), expected, rtol=1e-4, atol=1e-5)


def test_a_rank_pattern_written_here_is_kept(tmp_path):
    model = get_peft_model(AllKinds(), config(rank_pattern={"linear": 1, "conv2": 5})).eval()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors["base_model.model.linear.hira_A"].shape == (1, 32)
    assert tensors["base_model.model.conv2.hira_B"].shape == (4, 5, 1, 1)
    loaded = PeftModel.from_pretrained(AllKinds(), tmp_path)
    assert torch.equal(loaded(IDS), model(IDS))


def test_a_second_adapter_with_a_rank_pattern_loads_from_stock(tmp_path):
    """There PEFT obeys the pattern, so the file's tensors are of the pattern's rank."""
    with stock_peft():
        stock = get_peft_model(AllKinds(), config(), adapter_name="first")
        stock.add_adapter("second", config(rank_pattern={"linear": 1}))
        stock.save_pretrained(tmp_path, selected_adapters=["second"])
    assert load_file(tmp_path / "second/adapter_model.safetensors")["base_model.model.linear.hira_A"].shape[0] == 1
    model = PeftModel.from_pretrained(AllKinds(), tmp_path / "second")
    assert model.base_model.model.linear.r == {"default": 1}
    assert torch.equal(factors(model)["linear.hira_A"], stock.base_model.model.linear.hira_A["second"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_travel_unchanged(tmp_path, dtype):
    with stock_peft():
        stock = get_peft_model(AllKinds().to(dtype), config(), autocast_adapter_dtype=False).to(dtype)
        stock.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(AllKinds().to(dtype), tmp_path, autocast_adapter_dtype=False).to(dtype)
    assert {value.dtype for value in factors(model).values()} == {dtype}
    assert_same(factors(model), factors(stock))


def test_pickled_weights_load(tmp_path):
    """`adapter_model.bin`, PEFT's older kind of file."""
    model = get_peft_model(AllKinds(), config()).eval()
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").is_file()
    assert torch.equal(PeftModel.from_pretrained(AllKinds(), tmp_path)(IDS), model(IDS))


def test_several_adapters_in_folders_of_their_own(tmp_path):
    model = get_peft_model(AllKinds(), config()).eval()
    model.add_adapter("other", config(r=2, target_modules=["linear"]))
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == len(SHAPES)
    assert set(load_file(tmp_path / "other/adapter_model.safetensors")) == {
        *("base_model.model.linear.hira_A", "base_model.model.linear.hira_B")
    }
    loaded = PeftModel.from_pretrained(AllKinds(), tmp_path)
    loaded.load_adapter(tmp_path / "other", "other")
    for name in ("default", "other"):
        model.set_adapter(name)
        loaded.set_adapter(name)
        assert torch.equal(loaded(IDS), model(IDS))


def test_a_renamed_adapter_is_the_same_file(tmp_path):
    """The adapter's name is not in the file."""
    model = get_peft_model(AllKinds(), config(), adapter_name="mine").eval()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "mine/adapter_model.safetensors")
    assert not [key for key in tensors if "mine" in key]
    loaded = PeftModel.from_pretrained(AllKinds(), tmp_path / "mine", adapter_name="another")
    assert list(loaded.peft_config) == ["another"]
    assert torch.equal(loaded(IDS), model(IDS))


def test_a_merged_model_saves_its_adapter_unchanged(tmp_path):
    model = get_peft_model(AllKinds(), config())
    model.save_pretrained(tmp_path / "before")
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    before, merged = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "merged"))
    assert_same(merged, before)
