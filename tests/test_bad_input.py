"""Bad input: each is an error that names the thing, and leaves the model as it was."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from huggingface_hub.errors import HFValidationError
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from stock_peft import stock_peft
from torch import nn

import hira
from hira import HiraConfig, HiraError


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)
        self.head.weight.requires_grad_(False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(self.norm(x))


IDS = torch.tensor([[1, 5, 2], [1, 6, 0]])
FIRST = "base_model.model.blocks.0"


def config(**options) -> HiraConfig:
    return HiraConfig(**{"r": 2, "target_modules": ["0", "1", "embed"], "init_weights": False, **options})


def corrupted(**fields) -> HiraConfig:
    """A configuration made bad after it was checked."""
    bad = config()
    for name, value in fields.items():
        setattr(bad, name, value)
    return bad


def adapted() -> PeftModel:
    return get_peft_model(Body(), config(), adapter_name="first").eval()


def state(model: nn.Module) -> dict[str, Any]:
    """The module tree, the parameters with their flags, the adapters, and the attributes of every module."""
    return {
        "modules": [(name, id(module), type(module), module.training) for name, module in model.named_modules()],
        "parameters": [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        "adapters": sorted(getattr(model, "peft_config", {})),
        "active": getattr(model, "active_adapter", None),
        "hooks": [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()],
        "attributes": [sorted(module.__dict__) for module in model.modules()],
        "ranks": [dict(m.r) for m in model.modules() if isinstance(m, hira.HiraLayer)],
    }


@contextmanager
def refused(model: nn.Module, error: type[Exception], message: str) -> Iterator[None]:
    """The body raises an error with a message, and the model is after it as it was before it."""
    values = {name: value.clone() for name, value in model.state_dict().items()}
    y = model.eval()(IDS)
    before = state(model)
    with pytest.raises(error, match=message) as caught:
        yield
    assert type(caught.value) is error
    assert state(model) == before
    after = model.state_dict()
    assert list(after) == list(values)
    assert [name for name in values if not torch.equal(after[name], values[name])] == []
    assert torch.equal(model(IDS), y)


# Configurations

BAD_FIELDS = [
    ({"r": 0}, r"`r`.* 0\b"),
    ({"r": -3}, "`r`.* -3"),
    ({"r": 2.0}, r"`r`.* 2\.0"),
    ({"r": True}, "`r`.* True"),
    ({"r": "8"}, "`r`.* '8'"),
    ({"r": None}, "`r`.* None"),
    ({"rank_pattern": {"blocks.1": 0}}, r"rank_pattern\['blocks\.1'\].* 0\b"),
    ({"rank_pattern": {"blocks.1": 1.5}}, r"rank_pattern\['blocks\.1'\].* 1\.5"),
    ({"rank_pattern": ["blocks.1"]}, r"rank_pattern.* \['blocks\.1'\]"),
    ({"hira_dropout": 1.0}, r"hira_dropout.* 1\.0"),
    ({"hira_dropout": -0.1}, r"hira_dropout.* -0\.1"),
    ({"hira_dropout": float("nan")}, r"hira_dropout.* nan"),
    ({"hira_dropout": "0.1"}, r"hira_dropout.* '0\.1'"),
    ({"hira_dropout": None}, r"hira_dropout.* None"),
    ({"init_weights": "kaiming"}, "init_weights.* 'kaiming'"),
    ({"init_weights": 3}, "init_weights.* 3"),
    ({"target_modules": ".*", "layers_to_transform": [0]}, "layers_to_transform.*target_modules"),
    ({"target_modules": ".*", "layers_pattern": "h"}, "layers_pattern.*target_modules"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_FIELDS, ids=[str(fields) for fields, _ in BAD_FIELDS])
def test_bad_fields(fields, message):
    with pytest.raises(HiraError, match=message):
        HiraConfig(**fields)
    body, model = Body(), adapted()
    with refused(body, HiraError, message):
        get_peft_model(body, corrupted(**fields))
    with refused(model, HiraError, message):
        model.add_adapter("second", corrupted(**fields))


@pytest.mark.parametrize("fields", [{"r": 0}, {"hira_dropout": 1.5}, {"init_weights": "kaiming"}], ids=str)
def test_bad_fields_of_a_stock_config(fields):
    with stock_peft():
        bad = peft.HiraConfig(target_modules=["0"])
    for name, value in fields.items():
        setattr(bad, name, value)
    body = Body()
    with refused(body, HiraError, next(iter(fields))):
        get_peft_model(body, bad)


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        (["nothing"], peft.utils.error.NoMatchingPeftModuleError, "'nothing'"),
        ("no.*thing", peft.utils.error.NoMatchingPeftModuleError, r"no\.\*thing"),
        (["0", "norm"], HiraError, r"^norm: .*LayerNorm.* nn\.Linear"),
        (["blocks"], HiraError, r"^blocks: .*ModuleList"),
        (None, HiraError, "target_modules"),
    ],
    ids=str,
)
def test_modules_that_cannot_be_adapted(targets, error, message):
    body, model = Body(), adapted()
    with refused(body, error, message):
        get_peft_model(body, config(target_modules=targets))
    with refused(body, error, message):
        peft.inject_adapter_in_model(config(target_modules=targets), body)
    with refused(model, error, message):
        model.add_adapter("second", config(target_modules=targets))


def test_a_weight_that_is_not_dense():
    body = Body()
    body.blocks[1].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    before = state(body)
    with pytest.raises(HiraError, match=r"^blocks\.1: .*Linear.* torch\.int8"):
        get_peft_model(body, config())
    assert state(body) == before


# Names


def test_names_that_are_taken():
    model = adapted()
    with refused(model, ValueError, "'first'"):
        model.add_adapter("first", config())
    with refused(model, HiraError, "'first'.* embed"):
        peft.inject_adapter_in_model(config(), model.base_model.model, adapter_name="first")


def test_names_that_are_unknown(tmp_path):
    model = adapted()
    ours = "'nope'.*'first'"
    with refused(model, ValueError, "nope"):
        model.set_adapter("nope")
    with refused(model, HiraError, ours):
        model.base_model.set_adapter(["first", "nope"])
    with refused(model, ValueError, "nope"):
        model.delete_adapter("nope")
    with refused(model, HiraError, ours):
        model.merge_adapter(["first", "nope"])
    with refused(model, HiraError, ours):
        model.merge_and_unload(adapter_names=["nope"])
    with refused(model, ValueError, "selected_adapters"):
        model.save_pretrained(tmp_path, selected_adapters=["nope"])
    assert list(tmp_path.iterdir()) == []


def test_a_safe_merge_that_would_not_be_finite():
    model = adapted()
    model.base_model.model.blocks[1].hira_B["first"].data.fill_(float("inf"))
    before, y = state(model), model(IDS)
    message = r"first.* blocks\.1"
    for attempt in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(HiraError, match=message):
            attempt(safe_merge=True)
        assert state(model) == before
        torch.testing.assert_close(model(IDS), y, rtol=0, atol=0, equal_nan=True)
        assert not any(layer.merged for layer in model.modules() if isinstance(layer, hira.HiraLayer))


# Checkpoints


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    adapted().save_pretrained(tmp_path)
    return tmp_path / "first"


def rewrite(folder: Path, change) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def longer(tensors):
    tensors[f"{FIRST}.hira_A"] = torch.zeros(2, 5)


def other_rank(tensors):
    tensors[f"{FIRST}.hira_A"], tensors[f"{FIRST}.hira_B"] = torch.zeros(3, 4), torch.zeros(4, 3)


def missing(tensors):
    del tensors[f"{FIRST}.hira_B"]


def missing_module(tensors):
    for name in list(tensors):
        if "embed" in name:
            del tensors[name]


def extra(tensors):
    tensors["base_model.model.head.hira_A"] = torch.zeros(2, 4)


def lora(tensors):
    for name in list(tensors):
        tensors[name.replace("hira_", "lora_")] = tensors.pop(name)


BAD_TENSORS = [
    (longer, r"blocks\.0\.hira_A.* \(2, 5\)"),
    (other_rank, r"blocks\.0\.hira_A.* \(3, 4\).*hira_B.* \(4, 3\)"),
    (missing, r"blocks\.0\.hira_B.* missing"),
    (missing_module, r"embed\.hira_embedding_A.*embed\.hira_embedding_B"),
    (extra, r"head\.hira_A"),
    (lora, "missing.* 1 more"),
]
TENSORS = pytest.mark.parametrize(
    ("change", "message"), BAD_TENSORS, ids=[change.__name__ for change, _ in BAD_TENSORS]
)


@TENSORS
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "meta"])
def test_checkpoints_that_do_not_fit(folder, change, message, low_cpu_mem_usage):
    rewrite(folder, change)
    body, model = Body(), adapted()
    with refused(body, HiraError, f"'default'.*{message}"):
        PeftModel.from_pretrained(body, folder, low_cpu_mem_usage=low_cpu_mem_usage)
    with refused(model, HiraError, f"'second'.*{message}"):
        model.load_adapter(folder, "second", low_cpu_mem_usage=low_cpu_mem_usage)
    good = adapted()
    good.save_pretrained(folder.parent)
    assert torch.equal(PeftModel.from_pretrained(body, folder)(IDS), good(IDS))


@TENSORS
def test_state_dicts_that_do_not_fit(change, message):
    model = adapted()
    tensors = get_peft_model_state_dict(model, adapter_name="first")
    change(tensors)
    with refused(model, HiraError, f"'first'.*{message}"):
        set_peft_model_state_dict(model, tensors, adapter_name="first")


@pytest.mark.parametrize("keep", [0, 4, 100, -1], ids=["empty", "a few bytes", "in the header", "the last byte gone"])
def test_truncated_files(folder, keep):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    body, model = Body(), adapted()
    message = re.escape(str(path))
    with refused(body, HiraError, message):
        PeftModel.from_pretrained(body, folder)
    with refused(model, HiraError, message):
        model.load_adapter(folder, "second")


def test_a_folder_without_weights(folder):
    (folder / "adapter_model.safetensors").unlink()
    body = Body()
    with refused(body, HFValidationError, re.escape(str(folder))):  # PEFT asks the hub for it
        PeftModel.from_pretrained(body, str(folder))


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"r": 0}, HiraError, "`r`.* 0"),
        ({"init_weights": "pissa"}, HiraError, "init_weights.* 'pissa'"),
        ({"r": 5}, HiraError, r"'default'.* \(2, 7\)"),
        ({"target_modules": ["0"]}, HiraError, r"blocks\.1\.hira_A"),
        ({"target_modules": ["no"]}, peft.utils.error.NoMatchingPeftModuleError, "'no'"),
    ],
    ids=["rank", "start", "other rank", "fewer modules", "no module"],
)
def test_a_configuration_that_does_not_fit(folder, fields, error, message):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    body = Body()
    with refused(body, error, message):
        PeftModel.from_pretrained(body, folder)
