"""Adapters on disk: what PEFT writes is read, and what it would not write is refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import save_file
from torch import nn

from hira import HiraConfig
from hira.errors import HiraError
from hira.files.io import strict_json
from hira.files.io.adapter_folder import read_adapter

P = "base_model.model."


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.linear, self.conv = nn.Embedding(10, 8), nn.Linear(8, 6), nn.Conv2d(2, 4, 3)
        self.attention, self.head = nn.MultiheadAttention(8, 2), nn.Linear(6, 2)


def folder_of(tmp_path, tensors=None, **config):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "HIRA", "r": 2} | config))
    if tensors is not None:
        save_file(tensors, tmp_path / "adapter_model.safetensors")
    return tmp_path


def pair(module="linear", A=(2, 8), B=(6, 2), dtype=torch.float32, names=("hira_A", "hira_B")):
    return {f"{P}{module}.{name}": torch.zeros(shape, dtype=dtype) for name, shape in zip(names, (A, B), strict=True)}


def test_what_peft_writes(tmp_path):
    targets = ["embed", "linear", "conv", "attention"]
    model = get_peft_model(Model(), HiraConfig(r=2, target_modules=targets, modules_to_save=["head"]))
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    adapter.check_finite()
    assert {name: (factors.kind, factors.shapes) for name, factors in adapter.modules.items()} == {
        "embed": ("embedding", ((2, 10), (8, 2))),
        "linear": ("matrix", ((2, 8), (6, 2))),
        "conv": ("convolution", ((2, 2, 3, 3), (4, 2, 1, 1))),
        "attention": ("matrix", ((2, 8), (24, 2))),
        "attention.base_layer.out_proj": ("matrix", ((2, 8), (8, 2))),
    }
    assert adapter.others == {f"head.{name}": f"{P}head.{name}" for name in ("weight", "bias")}
    assert adapter.config["peft_type"] == "HIRA"
    layer = model.base_model.model.linear
    A, B = adapter.modules["linear"].pair()
    assert torch.equal(A, layer.hira_A["default"]) and torch.equal(B, layer.hira_B["default"])
    assert adapter.modules["linear"].rank == 2


def test_nested_wrappers_keep_their_names(tmp_path):
    tensors = pair("experts", A=(8, 5), B=(7, 8)) | pair("experts.base_layer", A=(12, 5), B=(7, 12))
    adapter = read_adapter(folder_of(tmp_path, tensors))
    assert {name: factors.rank for name, factors in adapter.modules.items()} == {"experts": 8, "experts.base_layer": 12}


BAD = {
    "prefix": ({"linear.hira_A": torch.ones(1)}, "'linear.hira_A' .*starts with 'base_model.model.'"),
    "alone": ({f"{P}linear.hira_A": torch.ones(2, 8)}, "linear.hira_A' .*lacks the other factor, '.*linear.hira_B'"),
    "alone_B": ({f"{P}linear.hira_B": torch.ones(2, 8)}, "linear.hira_B' .*lacks the other factor, '.*linear.hira_A'"),
    "mixed": (pair(names=("hira_A", "hira_embedding_B")), "lacks the other factor"),
    "both": (pair() | pair(names=("hira_embedding_A", "hira_embedding_B")), "of an embedding and others too"),
    "lora": (pair(names=("lora_A.weight", "lora_B.weight")), "is not one of HiRA's"),
    "weight": (pair(names=("hira_A.weight", "hira_B.weight")), "is not one of HiRA's"),
    "unknown": (pair() | {f"{P}linear.hira_C": torch.ones(1)}, "hira_C' .*is not one of HiRA's"),
    "no_module": ({f"{P}hira_A": torch.ones(1)}, "is not one of HiRA's"),
    "rank": (pair(B=(6, 3)), r"A is \(2, 8\) and B is \(6, 3\)"),
    "rank_zero": (pair(A=(0, 8), B=(6, 0)), "one rank r > 0"),
    "vector": (pair(A=(2,), B=(2,)), "one rank r > 0"),
    "kernel": (pair(A=(2, 2, 3), B=(4, 2, 3)), "one rank r > 0"),
    "embedding": (pair(A=(2, 2, 3), B=(4, 2, 1), names=("hira_embedding_A", "hira_embedding_B")), "one rank r > 0"),
    "integers": (pair(dtype=torch.int8), "is of torch.int8"),
    "float8": (pair(dtype=torch.float8_e4m3fn), "is of torch.float8_e4m3fn"),
    "nothing": ({}, "has no factors of HiRA"),
    "only_saved": ({f"{P}head.weight": torch.ones(1)}, "has no factors of HiRA"),
}


@pytest.mark.parametrize("case", BAD)
def test_tensors_that_are_refused(tmp_path, case):
    tensors, message = BAD[case]
    with pytest.raises(HiraError, match=message) as caught:
        read_adapter(folder_of(tmp_path, tensors))
    assert str(tmp_path) in str(caught.value)


def test_configurations_that_are_refused(tmp_path, monkeypatch):
    with pytest.raises(HiraError, match=r"adapter_config\.json is missing"):
        read_adapter(tmp_path)
    for peft_type in ("LORA", None, ["HIRA"]):
        with pytest.raises(HiraError, match="'HIRA' was expected"):
            read_adapter(folder_of(tmp_path, pair(), peft_type=peft_type))
    not_finite = {
        '{"a": 1e999}': "adapter_config.json has 1e999, which is no finite number",
        '{"a": {"b": [0, -Infinity]}}': "has -Infinity, which",
        '{"a": [[NaN], 1e999]}': "has NaN, which",
    }
    bad = {"[]": "holds a list", "{": "not JSON", '{"a": 1, "a": 1}': "twice", **not_finite}
    for text, message in bad.items():
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(HiraError, match=message):
            read_adapter(tmp_path)
    monkeypatch.setattr(strict_json, "MAX_BYTES", 1000)
    (tmp_path / "adapter_config.json").write_text('{"a": "%s"}' % ("x" * 1000))
    with pytest.raises(HiraError, match="more than 1000 bytes"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_are_checked_when_asked(tmp_path, value):
    tensors = pair()
    tensors[f"{P}linear.hira_B"][3, 1] = value
    adapter = read_adapter(folder_of(tmp_path, tensors))
    with pytest.raises(HiraError, match=r"linear\.hira_B' .* has a NaN or an infinity"):
        adapter.check_finite()


def test_pickles_are_read_only_when_allowed(tmp_path):
    folder_of(tmp_path)
    with pytest.raises(HiraError, match=r"has no adapter_model\.safetensors"):
        read_adapter(tmp_path)
    path = tmp_path / "adapter_model.bin"
    torch.save(pair(), path)
    with pytest.raises(HiraError, match=r"a pickle, .*--allow-pickle"):
        read_adapter(tmp_path)
    assert read_adapter(tmp_path, allow_pickle=True).modules["linear"].shapes == ((2, 8), (6, 2))
    for content in ([1], {"a": 3}, {1: torch.ones(1)}):
        torch.save(content, path)
        with pytest.raises(HiraError, match="must hold dense tensors by name"):
            read_adapter(tmp_path, allow_pickle=True)
    torch.save({"a": Model()}, path)  # would run code
    with pytest.raises(HiraError, match="cannot be read as a file of tensors"):
        read_adapter(tmp_path, allow_pickle=True)
    path.write_bytes(b"noise")
    with pytest.raises(HiraError, match="cannot be read as a file of tensors"):
        read_adapter(tmp_path, allow_pickle=True)
