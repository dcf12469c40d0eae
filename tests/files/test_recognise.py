"""Folders of another kind than was asked for: the message says what they are, and what to pass."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from plain_folders import pair, save_adapter, save_model
from safetensors.torch import save_file

from hira import HiraError, convert_adapter, inspect_adapter, merge_checkpoint, verify_folder
from hira.files.io.model_folder import read_folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_model(tmp_path / "base", {"model.safetensors": {"q.weight": torch.ones(6, 4)}}, {})


def adapter_at(folder: Path, **config: object) -> Path:
    return save_adapter(folder, pair("q", 6, 4), **config)


def refused_as_adapter(base: Path, folder: Path, message: str) -> None:
    """Whoever takes an adapter says the same."""
    out = base.with_name("out")
    for call in (
        lambda: merge_checkpoint(base, folder, out),
        lambda: inspect_adapter(folder),
        lambda: convert_adapter(folder, out, fold=True),
        lambda: convert_adapter(folder, out, source="original"),
    ):
        with pytest.raises(HiraError, match=message):
            call()
    assert not out.exists()


def test_the_folder_to_which_a_named_adapter_was_saved(base, tmp_path):
    for name in ("mine", "other"):
        adapter_at(tmp_path / "saved" / name)
    (tmp_path / "saved/README.md").touch()
    refused_as_adapter(
        base, tmp_path / "saved", r"hold adapters: mine, other\. Pass one of them, such as .*saved/other"
    )


def test_the_folder_of_a_run(base, tmp_path):
    for step in (500, 1000, 1500, 60, 70, 80, 90):
        adapter_at(tmp_path / f"run/checkpoint-{step}")
    refused_as_adapter(
        base, tmp_path / "run", r"checkpoint-60, checkpoint-70, .*, checkpoint-1500\. .* as .*run/checkpoint-1500"
    )
    (tmp_path / "run/checkpoint-500/optimizer.pt").touch()  # one of them is as good as any adapter
    assert inspect_adapter(tmp_path / "run/checkpoint-500").parameters == 20


def test_the_folder_of_a_run_with_named_adapters(base, tmp_path):
    adapter_at(tmp_path / "run/checkpoint-5/mine")
    refused_as_adapter(base, tmp_path / "run", r"hold adapters: checkpoint-5/mine\.")
    refused_as_adapter(base, tmp_path / "run/checkpoint-5", r"hold adapters: mine\.")


def test_models(base, tmp_path):
    refused_as_adapter(base, base, r"base is a model's folder, where an adapter's was expected")
    merge_checkpoint(base, adapter_at(tmp_path / "mine"), tmp_path / "merged")
    refused_as_adapter(base, tmp_path / "merged", r"merged is a model's folder")
    (tmp_path / "old").mkdir()
    (tmp_path / "old/pytorch_model.bin").touch()
    refused_as_adapter(base, tmp_path / "old", r"old is a model's folder")


def test_what_is_incomplete_or_empty(base, tmp_path):
    adapter = adapter_at(tmp_path / "mine")
    (adapter / "adapter_config.json").unlink()
    refused_as_adapter(base, adapter, r"adapter_config.json is missing in .*mine; pass the folder to which")
    (tmp_path / "empty").mkdir()
    refused_as_adapter(base, tmp_path / "empty", r"adapter_config.json is missing in .*empty; pass the folder to which")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_files(base, tmp_path, name):
    adapter = adapter_at(tmp_path / "mine")
    refused_as_adapter(base, adapter / name, rf"mine/{name}' is not a folder but a file; pass its folder, .*mine\.")
    with pytest.raises(HiraError, match=r"the model .*model.safetensors' is not a folder but a file; pass .*base\."):
        merge_checkpoint(base / "model.safetensors", adapter, tmp_path / "out")
    torch.save({}, adapter / "adapter_model.bin")
    refused_as_adapter(base, adapter / "adapter_model.bin", r"is not a folder but a file; pass its folder, .*mine\.")


LORA = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}
ORIGINAL = {"peft_type": "LORA", "r_ab": 2, "target_modules": ["q"]}


def config_of(folder: Path, **config: object) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {
        "base_model.model.q.lora_A.weight": torch.ones(8, 4),
        "base_model.model.q.lora_B.weight": torch.ones(6, 8),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_a_lora_is_sent_to_peft(base, tmp_path):
    refused_as_adapter(base, config_of(tmp_path / "lora", **LORA), r"it is a LoRA of rank 8\..* merge_and_unload\(\)")


def test_an_adapter_of_the_papers_repository_is_sent_to_convert(base, tmp_path):
    folder = config_of(tmp_path / "original", **ORIGINAL)
    for call in (
        lambda: merge_checkpoint(base, folder, tmp_path / "out"),
        lambda: inspect_adapter(folder),
        lambda: convert_adapter(folder, tmp_path / "out", fold=True),
    ):
        with pytest.raises(HiraError, match=r"paper's repository: `hira convert --from original`"):
            call()


def test_an_adapter_that_needs_no_conversion(tmp_path):
    with pytest.raises(HiraError, match=r"one of PEFT's already; leave out --from original"):
        convert_adapter(adapter_at(tmp_path / "mine"), tmp_path / "out", source="original")


@pytest.mark.parametrize("config", [{"peft_type": "IA3"}, {}, {"peft_type": ["LORA"]}])
def test_other_methods(base, tmp_path, config):
    refused_as_adapter(base, config_of(tmp_path / "other", **config), r"peft_type .*, where 'HIRA' was expected")


def test_an_adapter_in_the_place_of_a_model(base, tmp_path):
    for name, config in (("mine", {"base_model_name_or_path": "org/x"}), ("bare", {})):
        adapter = adapter_at(tmp_path / name, **config)
        for call in (
            lambda adapter=adapter: merge_checkpoint(adapter, base, tmp_path / "out"),
            lambda adapter=adapter: inspect_adapter(adapter, adapter),
        ):
            with pytest.raises(HiraError, match=rf"{name} is an adapter's folder.*: hira merge BASE .*{name} -o OUT"):
                call()
    (tmp_path / "mine/adapter_model.safetensors").rename(tmp_path / "mine/adapter_model.bin")
    with pytest.raises(HiraError, match=r"is an adapter's folder"):  # not a model of pickles
        read_folder(tmp_path / "mine")


def test_models_elsewhere_or_in_other_formats(base, tmp_path):
    (tmp_path / "run").mkdir()
    base.rename(tmp_path / "run/checkpoint-10")
    with pytest.raises(HiraError, match=r"these folders in it hold models: checkpoint-10\."):
        read_folder(tmp_path / "run")
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf/model.Q4.gguf").touch()
    with pytest.raises(HiraError, match=r"gguf has neither .*Pass the folder of a model in safetensors"):
        read_folder(tmp_path / "gguf")


def test_verifying_what_is_not_there(base, tmp_path):
    with pytest.raises(HiraError, match=r"the folder .*absent' is not a folder here; check the path, or download it"):
        verify_folder(tmp_path / "absent")
    with pytest.raises(HiraError, match=r"is not a folder but a file"):
        verify_folder(base / "config.json")
    with pytest.raises(HiraError, match=r"has no hira-manifest.json"):
        verify_folder(base)
