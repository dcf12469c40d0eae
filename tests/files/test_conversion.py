"""Conversions: the LoRA in stock PEFT, the paper's layers beside ours, folded adapters in PEFT's own HiRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from oracle import error
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from stock_peft import stock_peft
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hira.errors import HiraError
from hira.files.convert import conversion
from hira.files.io.adapter_folder import Adapter, adapter_of
from hira.files.model import layer_matrices as factors

PREFIX = "base_model.model."
MINE = Path("mine")
TARGETS = ["embed", "conv1", "conv2", "linear", "square", "transposed"]


class AllKinds(nn.Module):
    """One layer of each kind, wide and tall ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8)
        self.conv1 = nn.Conv1d(8, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 40, (2, 3), stride=(2, 3), padding=(1, 0))
        self.linear = nn.Linear(320, 5)
        self.square = nn.Linear(5, 5)
        self.transposed = Conv1D(7, 5)
        nn.init.normal_(self.transposed.weight)
        self.head = nn.Linear(7, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv1(self.embed(ids).transpose(1, 2))
        x = self.conv2(x[:, None]).flatten(1)
        return self.head(self.transposed(torch.tanh(self.square(self.linear(x)))))


IDS = torch.tensor([[1, 5, 9, 3, 0, 2], [1, 6, 7, 8, 4, 10]])


def saved(folder: Path, **options: Any) -> tuple[dict[str, Any], dict[str, Tensor], Tensor]:
    """An adapter that does much, as files have it, and the output of its model."""
    options = {"r": 3, "target_modules": TARGETS, "modules_to_save": ["head"], "init_weights": False, **options}
    model = get_peft_model(AllKinds(), peft.HiraConfig(**options)).eval()
    model.save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors"), model(IDS).detach()


def to_lora(config: dict[str, Any], tensors: dict[str, Tensor], weight_of: Any, rank: int) -> Any:
    return conversion.to_lora(adapter_of(MINE, config, tensors), weight_of, rank)


def fold(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return conversion.fold(adapter_of(MINE, config, tensors))


def from_original(config: dict[str, Any], tensors: dict[str, Tensor]) -> Adapter:
    return conversion.from_original(MINE, config, tensors)


def loaded(config: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> Any:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return PeftModel.from_pretrained(AllKinds(), folder).eval()


def weights() -> dict[str, Tensor]:
    return {name: getattr(AllKinds(), name).weight.detach() for name in TARGETS}


def update(config: dict[str, Any], tensors: dict[str, Tensor], name: str) -> Tensor:
    """W0 * BA as the weight is stored, in float64."""
    middle = "hira_embedding_" if name == "embed" else "hira_"
    A, B = (tensors[f"{PREFIX}{name}.{middle}{letter}"].double() for letter in "AB")
    delta = torch.einsum("ok,k...->o...", B.flatten(1), A)
    return weights()[name].double() * (delta.t() if name in ("embed", "transposed") else delta)


@pytest.mark.parametrize("rank", [1, 3, 64])
def test_the_lora_loads_in_stock_peft_and_its_error_is_the_reported_one(rank, tmp_path, monkeypatch):
    monkeypatch.setattr(factors, "BLOCK", 32)
    config, tensors, _ = saved(tmp_path)
    lora_config, lora, report = to_lora(config, tensors, weights().get, rank)
    with stock_peft():
        model = loaded(lora_config, lora, tmp_path / "lora")
        layers = {name: getattr(model.base_model.model, name) for name in TARGETS}
        found = {name: layer.get_delta_weight("default").detach().double() for name, layer in layers.items()}
        merged = model.merge_and_unload()
    lost = total = 0.0
    for layer in report.layers:
        exact = update(config, tensors, layer.name)
        assert error(found[layer.name], exact) == pytest.approx(layer.relative_error, rel=1e-4, abs=3e-7)
        stored = getattr(merged, layer.name).weight.detach() - weights()[layer.name]
        assert error(stored, exact) == pytest.approx(layer.relative_error, rel=1e-4, abs=1e-5)
        values = torch.linalg.svdvals(exact.flatten(1))
        best = float(values[rank:].norm() / values.norm())
        assert layer.relative_error == pytest.approx(best, rel=1e-5, abs=3e-7)
        lost, total = lost + float((found[layer.name] - exact).square().sum()), total + float(exact.square().sum())
    assert report.relative_error == pytest.approx((lost / total) ** 0.5, rel=1e-4, abs=3e-7)
    assert (report.relative_error > 0.1) == (rank < 64)
    assert ("cannot hold" if rank < 64 else "holds all of this update but for rounding") in report.statement
    assert f"{report.relative_error:.2%}" in report.statement
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_lora_of_full_rank_computes_the_same(tmp_path):
    config, tensors, y = saved(tmp_path)
    lora_config, lora, _ = to_lora(config, tensors, weights().get, 64)
    with stock_peft():
        model = loaded(lora_config, lora, tmp_path / "lora")
        assert error(model(IDS), y) < 1e-4
        with model.disable_adapter():
            assert error(model(IDS), y) > 0.01


def test_an_untrained_adapter_is_a_lora_of_zeros(tmp_path):
    config, tensors, _ = saved(tmp_path, init_weights=True)
    _, lora, report = to_lora(config, tensors, weights().get, 2)
    assert report.relative_error == 0
    assert all(bool(value.isfinite().all()) for value in lora.values())


def test_what_cannot_become_a_lora(tmp_path, monkeypatch):
    config, tensors, _ = saved(tmp_path)
    with pytest.raises(HiraError, match="positive integer, but is 0"):
        to_lora(config, tensors, weights().get, 0)
    with pytest.raises(HiraError, match="no weight for module 'embed'"):
        to_lora(config, tensors, {name: w for name, w in weights().items() if name != "embed"}.get, 2)
    monkeypatch.setattr(conversion, "MAX_DIM", 7)
    with pytest.raises(HiraError, match="'embed' is 11 x 8"):
        to_lora(config, tensors, weights().get, 2)


ORIGINAL = {
    "peft_type": "LORA",
    "r_ab": 3,
    "lora_alpha": 16,
    "scale_ab": 2.0,
    "lora_dropout": 0.3,
    "bias": "none",
    "fan_in_fan_out": False,
    "target_modules": ["linear", " square "],
    "task_type": None,
}


def original_tensors() -> dict[str, Tensor]:
    shapes = {"linear.lora_A": (3, 320), "linear.lora_B": (5, 3), "square.lora_A": (3, 5), "square.lora_B": (5, 3)}
    return {PREFIX + key: torch.randn(shape) for key, shape in shapes.items()}


@pytest.mark.parametrize("stock", [False, True])
def test_an_original_checkpoint_computes_what_it_did(stock, tmp_path):
    tensors = original_tensors()
    adapter = from_original(ORIGINAL, tensors)
    config, renamed = adapter.config, adapter.tensors
    assert config["target_modules"] == ["linear", "square"]
    assert (config["peft_type"], config["r"], config["hira_dropout"]) == ("HIRA", 3, 0.0)
    if stock:
        with stock_peft():
            model = loaded(config, renamed, tmp_path / "a")
    else:
        model = loaded(config, renamed, tmp_path / "a")
    for name, width in (("linear", 320), ("square", 5)):
        x, layer = torch.randn(4, width), getattr(model.base_model.model, name)
        base = getattr(AllKinds(), name).double()
        A, B = (tensors[f"{PREFIX}{name}.lora_{letter}"].double() for letter in "AB")
        exact = F.linear(x.double(), base.weight + base.weight * (B @ A), base.bias)
        assert error(layer(x), exact) < 1e-6


@pytest.mark.parametrize(
    ("found", "named"),
    [
        (["linear", "square"], ["linear", "square"]),
        (["near", " are"], ["near", "are", "linear", "square"]),
        (["linear", "uare"], ["linear", "uare", "square"]),
        (None, ["linear", "square"]),
        (" .*(linear|square)", ".*(linear|square)"),
    ],
)
def test_modules_that_were_named_by_their_ends_are_named_whole(found, named):
    assert from_original(ORIGINAL | {"target_modules": found}, original_tensors()).config["target_modules"] == named


@pytest.mark.parametrize(
    ("options", "keys", "message"),
    [
        ({}, {"linear.lora_R": (3, 3)}, "'base_model.model.linear.lora_R': it was trained with another method"),
        ({}, {"rand_R": (3, 3)}, "another method"),
        ({"rand_R": True}, {}, "rand_R in its configuration"),
        ({"r": 8}, {}, "it is a LoRA of rank 8"),
        ({"r_ab": None}, {}, "r_ab None"),
        ({"peft_type": "HIRA"}, {}, "peft_type 'HIRA'"),
        ({"bias": "all"}, {}, "trained biases"),
        ({}, {"linear.lora_A.weight": (3, 5)}, "'base_model.model.linear.lora_A.weight'"),
        ({}, {"other.weight": (3, 5)}, "modules_to_save"),
        ({"r_ab": 4}, {}, r"'linear' has A \(3, 320\) and B \(5, 3\), but r_ab is 4"),
    ],
)
def test_what_is_no_original_checkpoint(options, keys, message):
    tensors = {**original_tensors(), **{PREFIX + key: torch.ones(shape) for key, shape in keys.items()}}
    with pytest.raises(HiraError, match=message):
        from_original({**ORIGINAL, **options}, tensors)


def test_folded_adapters_compute_the_same_in_stock_peft(tmp_path):
    pattern = {"linear": 5, "embed": 2}
    config, tensors, y = saved(tmp_path, rank_pattern=pattern, weight_gradient="int8", init_weights=False)
    assert {len(tensors[PREFIX + "linear.hira_A"]), config["weight_gradient"]} == {5, "int8"}
    folded, written = fold(config, tensors)
    assert (folded["r"], folded["rank_pattern"]) == (5, {})
    assert "weight_gradient" not in folded
    with stock_peft():
        assert error(loaded(folded, written, tmp_path / "folded")(IDS), y) < 1e-5
        with pytest.raises(RuntimeError, match="size mismatch"):
            loaded({**config, "weight_gradient": "exact"}, tensors, tmp_path / "as it was")


def test_what_needs_no_folding_stays(tmp_path):
    config, tensors, _ = saved(tmp_path)
    folded, written = fold(config, tensors)
    assert folded == config
    assert written.keys() == tensors.keys()
    assert all(written[key] is tensors[key] for key in tensors)


def test_what_cannot_be_folded():
    pair = {PREFIX + "m.hira_A": torch.ones(4, 3), PREFIX + "m.hira_B": torch.ones(2, 4)}
    with pytest.raises(HiraError, match="target_parameters"):
        fold({"target_parameters": ["up"]}, pair)
    inner = {key.replace("m.hira", "attn.base_layer.out_proj.hira"): value for key, value in pair.items()}
    with pytest.raises(HiraError, match="MultiheadAttention"):
        fold({"r": 4}, inner)
