"""Adapters that meet a model of the right shapes that is not theirs, or that has them in its weights already."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_folders import bytes_of, pair, save_adapter, save_model
from safetensors.torch import load_file

from hira import HiraError, convert_adapter, inspect_adapter, merge_checkpoint, verify_folder
from hira.files.io.manifest import MANIFEST

COMMITS = ("a" * 40, "b" * 40)


def base_at(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    torch.manual_seed(seed)
    return save_model(folder, {"model.safetensors": {"q.weight": torch.randn(6, 4).to(dtype)}}, config)


def adapter_of(folder: Path, base: object, seed: int = 9, **config: Any) -> Path:
    torch.manual_seed(seed)
    return save_adapter(folder, pair("q", 6, 4), base_model_name_or_path=base and str(base), **config)


def snapshot(root: Path, name: str, commit: str = COMMITS[0], **config: Any) -> Path:
    """A model as it lies in the hub's cache."""
    return base_at(root / f"models--{name.replace('/', '--')}/snapshots/{commit}", **config)


def refused(message: str, base: Path, *adapters: Path, out: Path) -> None:
    """Merging, looking at and converting are refused; `any_base` lifts it, and says so."""
    with pytest.raises(HiraError, match=rf"(?s){message}.*--any-base \(any_base=True\)"):
        merge_checkpoint(base, adapters, out)
    with pytest.raises(HiraError, match=message):
        inspect_adapter(adapters[-1], base)
    with pytest.raises(HiraError, match=message):
        convert_adapter(adapters[-1], out, to="lora", rank=1, base=base)
    assert not out.exists()
    report = merge_checkpoint(base, adapters, out, any_base=True)
    (note,) = report.notes
    assert adapters[-1].name in note
    assert inspect_adapter(adapters[-1], base, any_base=True).notes == (note,)
    options = {"to": "lora", "rank": 1, "base": base, "any_base": True}
    assert convert_adapter(adapters[-1], out.with_name("lora"), **options).notes == (note,)


def test_merging_twice(tmp_path):
    base = base_at(tmp_path / "base")
    adapter = adapter_of(tmp_path / "mine", base)
    assert merge_checkpoint(base, adapter, tmp_path / "once").notes == ()
    assert verify_folder(tmp_path / "once") == []
    shutil.copytree(adapter, tmp_path / "renamed")
    for again in (adapter, tmp_path / "renamed"):
        refused(r"(renamed|mine) is in the weights of .*once already", tmp_path / "once", again, out=tmp_path / "twice")
        for name in ("twice", "lora"):
            shutil.rmtree(tmp_path / name)


def test_merging_another_adapter_into_a_merged_model(tmp_path):
    base = base_at(tmp_path / "base")
    first, second = adapter_of(tmp_path / "first", base), adapter_of(tmp_path / "second", base, seed=1)
    merge_checkpoint(base, first, tmp_path / "once")
    refused(
        r"wrote .*once from base with first.*second was trained on", tmp_path / "once", second, out=tmp_path / "two"
    )
    both = json.loads((tmp_path / "two" / MANIFEST).read_text())["merged"]
    assert both["base"] == "base" and [entry["name"] for entry in both["adapters"]] == ["first", "second"]
    # and of what is merged into that, the first adapter is still known
    with pytest.raises(HiraError, match=r"first is in the weights of .*two already"):
        merge_checkpoint(tmp_path / "two", first, tmp_path / "three")


@pytest.mark.parametrize("moved", [False, True])
def test_an_adapter_that_was_trained_on_a_merged_model(tmp_path, moved):
    base = base_at(tmp_path / "base")
    merge_checkpoint(base, adapter_of(tmp_path / "first", base), tmp_path / "stage1")
    second = adapter_of(tmp_path / "second", tmp_path / "stage1", seed=1)
    merged = tmp_path / "stage1"
    if moved:
        merged = (tmp_path / "elsewhere" / "stage1").resolve()
        merged.parent.mkdir()
        (tmp_path / "stage1").rename(merged)
    assert merge_checkpoint(merged, second, tmp_path / "stage2").notes == ()


def test_another_folder_that_is_here(tmp_path):
    mine, other = base_at(tmp_path / "mine"), base_at(tmp_path / "d" / "mine", seed=1)
    adapter = adapter_of(tmp_path / "adapter", mine)
    refused(r"trained on .*mine, and the weights of .*d/mine are others", other, adapter, out=tmp_path / "out")


def test_a_copy_of_the_base_model(tmp_path):
    base = base_at(tmp_path / "base")
    adapter = adapter_of(tmp_path / "adapter", base)
    shutil.copytree(base, tmp_path / "copy")
    assert merge_checkpoint(tmp_path / "copy", adapter, tmp_path / "out").notes == ()
    (tmp_path / "link").symlink_to(base)
    assert merge_checkpoint(tmp_path / "link", adapter, tmp_path / "out2").notes == ()


def test_another_repository_of_the_hub(tmp_path):
    base = snapshot(tmp_path, "org/Model-8B")
    adapter = adapter_of(tmp_path / "adapter", "org/Other-8B")
    refused(r"trained on org/Other-8B, and .* is org/Model-8B", base, adapter, out=tmp_path / "out")
    cached = "/cache/hub/models--org--Third/snapshots/" + COMMITS[1]
    third = adapter_of(tmp_path / "third", cached)
    with pytest.raises(HiraError, match=r"trained on org/Third, and .* is org/Model-8B"):
        merge_checkpoint(base, third, tmp_path / "out3")


@pytest.mark.parametrize(
    ("named", "place", "config"),
    [
        ("org/Model-8B", "cache", {}),
        ("ORG/model-8b", "cache", {}),
        ("/far/away/models--org--Model-8B/snapshots/" + COMMITS[1], "cache", {}),
        ("/far/away/Model-8B/", "cache", {}),
        ("C:\\models\\Model-8B", "cache", {}),
        ("org/Model-8B", "models/Model-8B", {}),
        ("/far/away/model-8b", "models/Model-8B", {}),
        ("org/Model-8B", "models/base", {"_name_or_path": "org/Model-8B"}),
    ],
)
def test_names_that_agree(tmp_path, named, place, config):
    base = snapshot(tmp_path, "org/Model-8B") if place == "cache" else base_at(tmp_path / place, **config)
    assert merge_checkpoint(base, adapter_of(tmp_path / "adapter", named), tmp_path / "out").notes == ()


@pytest.mark.parametrize(
    ("named", "place", "config", "because"),
    [
        (None, "base", {}, "names none"),
        ("", "base", {}, "names none"),
        ("org/Model-8B", "base", {}, "'org/Model-8B', and nothing here says"),
        ("org/Model-8B", "base", {"_name_or_path": "org/parent"}, "'org/Model-8B', and nothing here says"),
        ("/far/away/run1", "base", {}, "'/far/away/run1', and nothing here says"),
        ("/far/away/run1", "cache", {}, "'/far/away/run1', and nothing here says"),
        ("mirror/Model-8B", "cache", {}, "mirror/Model-8B, which is another repository than org/Model-8B"),
    ],
)
def test_what_is_not_known_is_a_note(tmp_path, named, place, config, because):
    base = snapshot(tmp_path, "org/Model-8B") if place == "cache" else base_at(tmp_path / place, **config)
    adapter = adapter_of(tmp_path / "adapter", named)
    (note,) = merge_checkpoint(base, adapter, tmp_path / "out").notes
    assert note.startswith(f"not checked whether {base.resolve()} is the base model of {adapter.resolve()}, because")
    assert because in note
    assert inspect_adapter(adapter, base).notes == (note,)


def test_a_copy_in_another_dtype_is_not_known(tmp_path):
    base, other = base_at(tmp_path / "base"), base_at(tmp_path / "half", dtype=torch.bfloat16)
    (note,) = merge_checkpoint(other, adapter_of(tmp_path / "adapter", base), tmp_path / "out").notes
    assert "nothing here says" in note


def test_another_revision_is_a_note(tmp_path):
    base = snapshot(tmp_path, "org/Model", COMMITS[0])
    adapter = adapter_of(tmp_path / "adapter", "org/Model", revision=COMMITS[1])
    (note,) = merge_checkpoint(base, adapter, tmp_path / "out").notes
    assert COMMITS[0] in note and COMMITS[1] in note
    for i, revision in enumerate((COMMITS[0], "main", None)):
        adapter = adapter_of(tmp_path / f"adapter{i}", "org/Model", revision=revision)
        assert merge_checkpoint(base, adapter, tmp_path / f"out{i}").notes == ()


def test_several_adapters_are_each_compared(tmp_path):
    base, other = base_at(tmp_path / "base"), base_at(tmp_path / "other", seed=1)
    right, wrong = adapter_of(tmp_path / "right", base), adapter_of(tmp_path / "wrong", other, seed=1)
    refused(r"wrong was trained on .*other", base, right, wrong, out=tmp_path / "out")


def test_a_damaged_manifest(tmp_path):
    base = base_at(tmp_path / "base")
    adapter = adapter_of(tmp_path / "adapter", base)
    for merged in ([], {"base": 1, "adapters": []}, {"base": "b", "adapters": [{"name": "a", "sha256": []}]}):
        (base / MANIFEST).write_text(json.dumps({"files": {}, "merged": merged}))
        with pytest.raises(HiraError, match=rf"{MANIFEST} must have a base and adapters"):
            merge_checkpoint(base, adapter, tmp_path / "out")
    (base / MANIFEST).write_text(json.dumps({"files": {}}))
    assert merge_checkpoint(base, adapter, tmp_path / "out").notes == ()


def test_the_values_do_not_depend_on_it(tmp_path):
    base, other = base_at(tmp_path / "base"), base_at(tmp_path / "other", seed=1)
    merge_checkpoint(other, adapter_of(tmp_path / "known", other), tmp_path / "out")
    merge_checkpoint(other, adapter_of(tmp_path / "wrong", base), tmp_path / "forced", any_base=True)
    name = "model.safetensors"
    assert bytes_of(tmp_path / "out")[name] == bytes_of(tmp_path / "forced")[name]
    assert not torch.equal(*(load_file(tmp_path / folder / name)["q.weight"] for folder in ("out", "other")))
