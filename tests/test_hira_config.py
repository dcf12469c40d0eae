"""HiraConfig: what it accepts, what it refuses and why, and its JSON, which is that of PEFT's HiraConfig."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import math
import re
import tempfile
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import peft
import pytest
import torch
from peft.utils import PeftType
from safetensors.torch import save_file
from stock_peft import stock_peft

import hira
from hira import HiraConfig, HiraError
from hira.config.hira_config import check_adapter_file, check_config, check_init_weights, check_rank, rank_of

names = st.text("abcxyz._0123456789", min_size=1, max_size=8)
lists = st.lists(names, min_size=1, max_size=3, unique=True)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "r": st.integers(1, 1024),
        "target_modules": st.one_of(st.none(), lists, st.just("all-linear")),
        "exclude_modules": st.one_of(st.none(), lists, names),
        "hira_dropout": st.floats(0, 1, exclude_max=True) | st.just(0),
        "fan_in_fan_out": st.booleans(),
        "modules_to_save": st.none() | lists,
        "init_weights": st.sampled_from([True, False, None, "gaussian"]),
        "rank_pattern": st.none() | st.dictionaries(names, st.integers(1, 64), max_size=3),
        "base_model_name_or_path": st.none() | names,
        "inference_mode": st.booleans(),
        "revision": st.none() | names,
    },
)
# the fields that PEFT's HiraConfig lacks, and values that are not the defaults
OURS = {
    "weight_gradient": "int8",
    "target_parameters": ["experts.up"],
    "hira_alpha": 16,
    "alpha_pattern": {"q": 8},
    "use_rslora": True,
    "trainable_token_indices": {"embed_tokens": [1, 3]},
    "ensure_weight_tying": True,
    "layer_replication": [[0, 4], [2, 5]],
}
LAYERS = {"target_modules": ["q"], "layers_to_transform": [0, 3], "layers_pattern": "h"}


def fields(config: Any) -> dict[str, Any]:
    return config.to_dict()


def written(config: Any, folder: Path) -> dict[str, Any]:
    """adapter_config.json, with the lists that are written from sets in order."""
    config.save_pretrained(folder)
    found = json.loads((folder / "adapter_config.json").read_text())
    for name in ("target_modules", "exclude_modules"):
        if isinstance(found[name], list):
            found[name].sort()
    return found


# Values


def test_the_fields_and_defaults_are_those_of_peft():
    with stock_peft():
        stock = peft.HiraConfig
    assert peft.HiraConfig is HiraConfig is not stock
    names = [field.name for field in dataclasses.fields(HiraConfig)]
    assert names == [*(f.name for f in dataclasses.fields(stock)), *OURS]
    assert fields(HiraConfig()) == fields(stock())
    assert HiraConfig().peft_type is PeftType.HIRA
    assert all(field.metadata.get("help") for field in dataclasses.fields(HiraConfig) if field.name in LAYERS)


def test_names_become_sets_and_expressions_stay():
    config = HiraConfig(target_modules=["q", "v", "q"], exclude_modules=["lm_head"])
    assert (config.target_modules, config.exclude_modules) == ({"q", "v"}, {"lm_head"})
    config = HiraConfig(target_modules=r".*\.q", exclude_modules=r".*\.0\.q")
    assert (config.target_modules, config.exclude_modules) == (r".*\.q", r".*\.0\.q")
    assert HiraConfig(target_modules="all-linear").target_modules == "all-linear"


@pytest.mark.parametrize("dropout", [0, 0.0, 0.5, math.nextafter(1, 0)])
@pytest.mark.parametrize("init_weights", [True, False, None, "gaussian"])
def test_good_values(dropout, init_weights):
    config = HiraConfig(r=1, hira_dropout=dropout, init_weights=init_weights, rank_pattern=None, **LAYERS)
    assert (config.r, config.hira_dropout, config.init_weights) == (1, dropout, init_weights)
    check_config(config)
    assert copy.deepcopy(config) == config


# Refusals


RANKS = [0, -1, True, False, "8", 8.0, None, [8], math.nan]


@pytest.mark.parametrize("r", RANKS, ids=repr)
def test_bad_ranks(r):
    found = re.escape(repr(r))
    with pytest.raises(HiraError, match=rf"`r`.* {found}"):
        HiraConfig(r=r)
    with pytest.raises(HiraError, match=rf"rank_pattern\['layers\.0\.q'\].* {found}"):
        HiraConfig(rank_pattern={"fine": 2, "layers.0.q": r})
    with pytest.raises(HiraError, match="the rank"):
        check_rank(r, "the rank")


@pytest.mark.parametrize("dropout", [1, 1.0, 1.5, -0.1, True, False, "0.1", None, math.nan, math.inf, 0j], ids=repr)
def test_bad_dropout(dropout):
    with pytest.raises(HiraError, match=rf"hira_dropout.* {re.escape(repr(dropout))}"):
        HiraConfig(hira_dropout=dropout)


@pytest.mark.parametrize("init_weights", ["", "Gaussian", "pissa", "true", 0, 1, 1.0, ["gaussian"]], ids=repr)
def test_bad_starts(init_weights):
    for refused in (lambda: HiraConfig(init_weights=init_weights), lambda: check_init_weights(init_weights)):
        with pytest.raises(HiraError, match=rf"init_weights.* {re.escape(repr(init_weights))}"):
            refused()


def test_the_rank_of_a_module():
    config = HiraConfig(r=3, rank_pattern={"q": 1, r"layers\.[01]\.v": 2})
    assert [rank_of(config, key) for key in ("m.q", "layers.1.v", "layers.2.v")] == [1, 2, 3]
    assert [rank_of(config, key, 5) for key in ("m.q", "m.v")] == [1, 5]
    config.rank_pattern = None
    assert rank_of(config, "m.q") == 3


@pytest.mark.parametrize("pattern", [["q"], "q", 4, [("q", 4)], True], ids=repr)
def test_bad_rank_patterns(pattern):
    with pytest.raises(HiraError, match=rf"rank_pattern.* {re.escape(repr(pattern))}"):
        HiraConfig(rank_pattern=pattern)


@pytest.mark.parametrize(("name", "value"), [("layers_to_transform", [0]), ("layers_pattern", "h")])
def test_layers_with_an_expression(name, value):
    message = f"{name}.*target_modules"
    with pytest.raises(HiraError, match=message):
        HiraConfig(target_modules=".*q", **{name: value})
    assert HiraConfig(target_modules=["q"], layers_to_transform=[0]).layers_to_transform == [0]


def test_errors_are_value_errors():
    """As those that PEFT raises, so that code written for it catches them."""
    with pytest.raises(ValueError, match="`r`"):
        HiraConfig(r=0)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("r", 0, "`r`.* 0"),
        ("hira_dropout", 2.0, r"hira_dropout.* 2\.0"),
        ("init_weights", "olora", "init_weights.* 'olora'"),
        ("rank_pattern", {"q": 0}, r"rank_pattern\['q'\].* 0"),
    ],
)
def test_a_stock_config_is_checked_too(name, value, message):
    with stock_peft():
        config = peft.HiraConfig()
    check_config(config)
    setattr(config, name, value)
    with pytest.raises(HiraError, match=message):
        check_config(config)


# JSON


@hypothesis.given(OPTIONS)
def test_the_file_is_the_same_and_loads_in_the_other(options):
    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(temporary, name) for name in ("ours", "stock")]
        ours = HiraConfig(**options)
        with stock_peft():
            stock = peft.HiraConfig(**options)
            assert written(ours, folders[0]) == written(stock, folders[1])
            loaded = peft.PeftConfig.from_pretrained(folders[0])
            assert type(loaded) is peft.HiraConfig
            again = peft.HiraConfig.from_pretrained(folders[1])
            assert fields(loaded) == fields(again)
        for folder in folders:
            for cls in (peft.PeftConfig, HiraConfig):
                mine = cls.from_pretrained(folder)
                assert type(mine) is HiraConfig
                assert fields(mine) == fields(loaded)
        assert fields(mine) == {**fields(ours), "inference_mode": mine.inference_mode}


def test_every_field_is_written(tmp_path):
    options = {"hira_dropout": 0.25, "rank_pattern": {"q": 2}, "exclude_modules": ["v"], "modules_to_save": ["head"]}
    found = written(HiraConfig(r=5, init_weights="gaussian", fan_in_fan_out=True, **options, **LAYERS), tmp_path)
    expected = {"peft_type": "HIRA", "r": 5, "init_weights": "gaussian", "fan_in_fan_out": True, **options, **LAYERS}
    assert {name: found[name] for name in expected} == expected


def test_a_field_of_a_later_version_is_left_out(tmp_path):
    HiraConfig(r=3).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hira_scale": 2}))
    with pytest.warns(UserWarning, match="hira_scale"):
        assert HiraConfig.from_pretrained(tmp_path).r == 3


def test_a_file_with_a_bad_value_is_refused(tmp_path):
    HiraConfig(r=3).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 0}))
    for cls in (peft.PeftConfig, HiraConfig):
        with pytest.raises(HiraError, match=r"`r`.* 0"):
            cls.from_pretrained(tmp_path)


def test_a_stock_config_object_works():
    with stock_peft():
        config = peft.HiraConfig(r=3, target_modules=["0"], hira_dropout=0.5, rank_pattern={"0": 2})
    assert not isinstance(config, HiraConfig)
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 5)), config)
    layer = model.base_model.model[0]
    assert type(layer) is hira.Linear
    assert layer.r == {"default": 2}
    assert layer.hira_dropout["default"].p == 0.5


# The adapter's file


@pytest.fixture
def adapter(tmp_path) -> Path:
    HiraConfig(r=3).save_pretrained(tmp_path / "sub")
    save_file({"a": torch.ones(40)}, tmp_path / "sub" / "adapter_model.safetensors")
    return tmp_path / "sub" / "adapter_model.safetensors"


@pytest.mark.parametrize("keep", [0, 7, 8, 30, -1])
def test_a_truncated_file_is_named(adapter, keep):
    adapter.write_bytes(adapter.read_bytes()[:keep])
    message = re.escape(str(adapter))
    for load in (
        lambda: check_adapter_file(adapter),
        lambda: HiraConfig.from_pretrained(adapter.parent),
        lambda: HiraConfig.from_pretrained(str(adapter.parent.parent), subfolder="sub"),
    ):
        with pytest.raises(HiraError, match=message):
            load()


def test_a_good_file_and_none(adapter):
    assert HiraConfig.from_pretrained(adapter.parent).r == 3
    assert HiraConfig.from_pretrained(str(adapter.parent.parent), subfolder="sub").r == 3
    adapter.unlink()
    check_adapter_file(adapter)
    assert HiraConfig.from_pretrained(adapter.parent).r == 3


# Fields that PEFT has not


def test_fields_that_peft_lacks_are_saved_where_they_are_set(tmp_path):
    assert not OURS.keys() & HiraConfig().to_dict().keys()
    found = written(HiraConfig(**OURS), tmp_path)
    assert {name: found[name] for name in OURS} == OURS
    assert fields(HiraConfig.from_pretrained(str(tmp_path))) == fields(HiraConfig(**OURS))
    with stock_peft(), pytest.warns(UserWarning) as warned:
        stock = peft.HiraConfig.from_pretrained(str(tmp_path))
    assert all(any(name in str(each.message) for each in warned) and not hasattr(stock, name) for name in OURS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_rslora": True}, "use_rslora.*hira_alpha"),
        ({"alpha_pattern": {"q": 8}}, "alpha_pattern.*hira_alpha"),
        ({"hira_alpha": 8, "use_rslora": 1}, "use_rslora.* 1"),
        ({"hira_alpha": 8, "alpha_pattern": {"q": 0}}, r"alpha_pattern\['q'\].* 0"),
        ({"hira_alpha": 8, "alpha_pattern": ["q"]}, "alpha_pattern"),
        ({"trainable_token_indices": 3}, "trainable_token_indices.* 3"),
        ({"trainable_token_indices": ["a"]}, "trainable_token_indices"),
        ({"trainable_token_indices": {"wte": [-1]}}, r"trainable_token_indices\['wte'\].* \[-1\]"),
        ({"layer_replication": []}, "layer_replication"),
        ({"layer_replication": [[2, 2]]}, "layer_replication"),
        ({"layer_replication": [[0, 1, 2]]}, "layer_replication"),
        ({"layer_replication": [0, 2]}, "layer_replication"),
    ],
)
def test_bad_values_of_theirs(options, message):
    with pytest.raises(HiraError, match=message):
        HiraConfig(**options)


def test_an_unknown_weight_gradient_is_refused():
    with pytest.raises(HiraError, match=r"weight_gradient.* 'fp8'"):
        HiraConfig(weight_gradient="fp8")


# Fields of LoRA, and misspelt ones


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("lora_alpha", 16, "hira_alpha"),
        ("lora_dropout", 0.1, "hira_dropout"),
        ("lora_r", 8, r"\br\b"),
        ("init_lora_weights", True, "init_weights"),
        ("bias", "none", "biases"),
        ("use_dora", True, "DoRA"),
        ("loftq_config", {}, "HiRA"),
        ("target_module", ["q_proj"], "'target_modules'"),
        ("flavour", "mint", "hira_dropout"),
    ],
)
def test_an_unknown_field_is_named_with_what_to_do_instead(field, value, message):
    with pytest.raises(HiraError, match=rf"'{field}'.*{message}") as caught:
        HiraConfig(r=4, **{field: value})
    assert isinstance(caught.value, TypeError)  # as of any other class


def test_fields_that_a_file_has_and_hira_has_not_are_dropped_with_a_warning(tmp_path):
    fields = {**written(HiraConfig(r=3), tmp_path), "lora_alpha": 16, "of_the_future": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    for load in (HiraConfig.from_pretrained, peft.PeftConfig.from_pretrained):
        with pytest.warns(UserWarning, match=r"\['lora_alpha', 'of_the_future'\]"):
            assert load(str(tmp_path)) == HiraConfig(r=3)


def test_the_signature_is_that_of_the_fields():
    parameters = list(inspect.signature(HiraConfig).parameters)
    assert parameters == [field.name for field in dataclasses.fields(HiraConfig) if field.init]
