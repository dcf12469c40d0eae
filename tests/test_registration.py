"""Registration: whose classes PEFT uses, under which names, and the way back to PEFT's own."""

from __future__ import annotations

import subprocess
import sys

import peft
import pytest
from peft import get_peft_model
from peft.utils import PeftType
from stock_peft import stock_peft
from torch import nn

import hira
from hira.peft_integration import registration

DOCUMENTED = {
    "config": ["HiraConfig"],
    "layer": ["HiraLayer", "Linear", "Embedding", "Conv1d", "Conv2d", "ConvNd"],
    "model": ["HiraModel"],
    "bnb": ["Linear8bitLt", "Linear4bit", "dispatch_bnb_8bit", "dispatch_bnb_4bit"],
    "dispatch": ["dispatch_default"],
}


with stock_peft():
    STOCK_MODEL = peft.HiraModel
    STOCK_LAYERS = [peft.tuners.hira.Linear, peft.tuners.hira.Embedding, peft.tuners.hira.Conv2d]


NAMES = [(module, name) for module, names in DOCUMENTED.items() for name in names]


def touched() -> dict[str, object]:
    """Everything a registration could reach: the registries, PEFT's modules and classes, the module table."""
    spaces = {
        "PEFT_TYPE_TO_CONFIG_MAPPING": peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING,
        "PEFT_TYPE_TO_TUNER_MAPPING": peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING,
        "PEFT_TYPE_TO_MIXED_MODEL_MAPPING": peft.mapping.PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
        "PEFT_TYPE_TO_PREFIX_MAPPING": peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING,
        "stock HiraModel": vars(STOCK_MODEL),
        **{f"stock {layer.__name__}": vars(layer) for layer in STOCK_LAYERS},
        "PeftModel": vars(peft.PeftModel),
        "PeftMixedModel": vars(peft.PeftMixedModel),
        "sys.modules": {name: module for name, module in sys.modules.items() if name.startswith("peft")},
    }
    for name, module in sorted(spaces["sys.modules"].items()):
        spaces[name] = vars(module)
    return {f"{space}: {name}": value for space, names in spaces.items() for name, value in dict(names).items()}


def changes(before: dict[str, object], after: dict[str, object]) -> set[str]:
    nothing = object()
    return {name for name in before | after if before.get(name, nothing) is not after.get(name, nothing)}


def test_importing_registers_and_needs_no_optional_package():
    """In a process of its own, where bitsandbytes, triton and trl cannot be found."""
    program = """
import importlib.util, sys
OPTIONAL = {"bitsandbytes", "triton", "trl", "datasets", "matplotlib"}
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name.partition(".")[0] in OPTIONAL else find_spec(name, *a)
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"bitsandbytes", "trl"}:
            raise AssertionError(f"{name} was imported")
import torch, peft  # torch looks for triton itself
before = set(sys.modules)
sys.meta_path.insert(0, Refuse())
stock = peft.HiraConfig
import hira
assert hira.is_registered()
assert peft.HiraConfig is hira.HiraConfig is not stock
print(sorted(OPTIONAL & ({name.partition(".")[0] for name in set(sys.modules) - before})))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_unregister_gives_stock_back_any_number_of_times():
    hira.unregister()
    stock = touched()
    for _ in range(3):
        hira.register()
        assert hira.is_registered()
        assert changes(stock, touched()), "registering changed nothing"
        hira.unregister()
        assert not hira.is_registered()
        assert changes(stock, touched()) == set()
    assert (
        peft.HiraConfig.__module__ == peft.HiraModel.__module__.replace("model", "config") == "peft.tuners.hira.config"
    )


def test_register_and_unregister_may_be_repeated():
    hira.unregister()
    stock = touched()
    hira.unregister()
    assert changes(stock, touched()) == set()
    hira.register()
    ours = touched()
    hira.register()
    assert changes(ours, touched()) == set()
    hira.unregister()
    assert changes(stock, touched()) == set()


def test_a_registration_that_fails_half_way_is_undone(monkeypatch):
    hira.unregister()
    stock = touched()
    all_of_them = list(registration._replacements())

    def broken():
        yield from all_of_them[: len(all_of_them) // 2]
        raise RuntimeError("half way")

    monkeypatch.setattr(registration, "_replacements", broken)
    with pytest.raises(RuntimeError, match="half way"):
        hira.register()
    assert not hira.is_registered()
    assert changes(stock, touched()) == set()


def test_the_registries_hold_our_classes():
    assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.HIRA] is hira.HiraConfig
    assert peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[PeftType.HIRA] is hira.HiraModel
    assert peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.HIRA] == "hira_"
    assert peft.get_peft_config({"peft_type": "HIRA", "r": 3}) == hira.HiraConfig(r=3)


@pytest.mark.parametrize(("module", "name"), NAMES, ids=[f"{module}.{name}" for module, name in NAMES])
def test_documented_names_are_ours_under_peft_too(module, name):
    ours = getattr(hira, name)
    found: dict[str, object] = {}
    exec(f"from peft.tuners.hira.{module} import {name} as deep\nfrom peft.tuners.hira import {name} as flat", found)
    assert found["deep"] is ours
    assert found["flat"] is ours
    assert getattr(getattr(peft.tuners.hira, module), name) is ours


def test_top_level_names_are_ours():
    for place in (peft, peft.tuners, peft.tuners.hira):
        assert place.HiraConfig is hira.HiraConfig
        assert place.HiraModel is hira.HiraModel
    assert {name for _, name in NAMES} <= set(dir(peft.tuners.hira))


def test_a_name_that_does_not_exist_raises():
    """PEFT's own package gives None for any name, Conv1d among them (row 15 of the peer's faults)."""
    with pytest.raises(AttributeError, match="'Conv9d'"):
        peft.tuners.hira.Conv9d  # noqa: B018
    with pytest.raises(ImportError, match="'Conv9d'"):
        exec("from peft.tuners.hira import Conv9d")
    with pytest.raises(AttributeError, match="'Conv9d'"):
        peft.tuners.hira.layer.Conv9d  # noqa: B018
    with stock_peft():
        assert peft.tuners.hira.Conv9d is None
        assert peft.tuners.hira.Conv1d is None


def test_the_modules_can_be_found():
    import importlib.util

    for name in ("peft.tuners.hira", "peft.tuners.hira.layer"):
        assert importlib.util.find_spec(name).name == name


def test_an_adapter_is_added_by_code_without_a_module():
    model = get_peft_model(nn.Sequential(nn.Linear(3, 3)), peft.LoraConfig(target_modules=["0"]))
    exec("model.add_adapter('another', model.peft_config['default'])", {"model": model})
    assert "another" in model.peft_config


def test_any_module_may_be_imported_first():
    """As a pickle does that holds a configuration or a layer, in processes that imported neither hira nor PEFT yet."""
    program = """
import importlib, os, sys
import accelerate, torch, transformers.generation.utils
assert not {"hira", "peft"} & set(sys.modules)
for module in ("hira.config.hira_config", "hira.layers.base", "hira.tuner.model"):
    child = os.fork()
    if child == 0:
        importlib.import_module(module)
        import hira, peft
        os._exit(0 if hira.is_registered() and peft.HiraConfig is hira.HiraConfig else 1)
    print(module, os.waitpid(child, 0)[1], flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert [line.split()[-1] for line in done.stdout.splitlines()] == ["0"] * 3, done.stdout + done.stderr
