"""Names on the hub in the place of folders: what is asked of the hub, and what its cache gives without a network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError
from plain_folders import bytes_of, pair, save_adapter, save_model

from hira import HiraError, convert_adapter, inspect_adapter, merge_checkpoint, verify_folder
from hira.files.io.hub import hub_id

COMMIT = "c" * 40
FILES = {"a-1.safetensors": {"q.weight": torch.ones(6, 4)}, "b-2.safetensors": {"norm": torch.ones(3)}}


@pytest.fixture
def remote(tmp_path: Path) -> dict[str, Path]:
    """What the hub holds, with much that is not needed."""
    model = save_model(tmp_path / "remote/model", FILES, {"hidden_size": 4})
    for name in ("tokenizer.json", "merges.txt", "spiece.model", "LICENSE"):
        (model / name).write_text("{}")
    for name in ("pytorch_model.bin", "consolidated.safetensors", "model.gguf", "onnx/model.onnx"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_bytes(bytes(1000))
    adapter = save_adapter(tmp_path / "remote/adapter", pair("q", 6, 4), base_model_name_or_path="org/model")
    for name in ("optimizer.pt", "adapter_model.bin", "README.md"):
        (adapter / name).write_bytes(bytes(1000))
    named = tmp_path / "remote/named"
    shutil.copytree(adapter, named / "mine")
    (named / "mine" / "adapter_model.safetensors").unlink()
    pickled = save_adapter(tmp_path / "remote/pickled", pair("q", 6, 4))
    (pickled / "adapter_model.safetensors").unlink()
    torch.save({f"base_model.model.{name}": x for name, x in pair("q", 6, 4).items()}, pickled / "adapter_model.bin")
    return {f"org/{name}": tmp_path / "remote" / name for name in ("model", "adapter", "named", "pickled")}


@pytest.fixture
def calls(remote: dict[str, Path], tmp_path: Path, monkeypatch) -> list[tuple[str, str | None]]:
    """The hub, which puts the files that are asked for where its cache would have them."""
    found: list[tuple[str, str | None]] = []

    def snapshot_download(repo_id, *, revision=None, allow_patterns=None, ignore_patterns=None, **others):
        found.append((repo_id, revision))
        assert others.keys() == {"library_name", "library_version"}
        if repo_id not in remote:
            raise LocalEntryNotFoundError("Cannot reach\nthe hub.")
        target = tmp_path / "hub" / f"models--{repo_id.replace('/', '--')}" / "snapshots" / COMMIT
        target.mkdir(parents=True, exist_ok=True)
        for path in (path for path in remote[repo_id].rglob("*") if path.is_file()):
            name = path.relative_to(remote[repo_id]).as_posix()
            wanted = allow_patterns is None or any(fnmatch(name, pattern) for pattern in allow_patterns)
            if wanted and not any(fnmatch(name, pattern) for pattern in ignore_patterns or ()):
                (target / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target / name)
        return str(target)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return found


def downloaded(tmp_path: Path, name: str) -> set[str]:
    root = tmp_path / "hub" / f"models--org--{name}" / "snapshots" / COMMIT
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def test_merging_by_names(remote, calls, tmp_path):
    report = merge_checkpoint("org/model", Path("org/adapter@v1.0"), tmp_path / "out")
    assert report.merged == ("q.weight",) and report.notes == ()
    assert {("org/model", None), ("org/adapter", "v1.0")} == {*calls}
    own = {"model.safetensors.index.json", *FILES}
    others = {"config.json", "tokenizer.json", "merges.txt", "spiece.model", "LICENSE"}
    assert downloaded(tmp_path, "model") == own | others
    assert downloaded(tmp_path, "adapter") == {"adapter_config.json", "adapter_model.safetensors"}
    merge_checkpoint(remote["org/model"], remote["org/adapter"], tmp_path / "local", any_base=True)
    names = [*FILES, "model.safetensors.index.json", "merges.txt"]
    assert [bytes_of(tmp_path / "out")[name] for name in names] == [bytes_of(tmp_path / "local")[n] for n in names]
    assert "base_model: org/model" in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out/hira-manifest.json").read_text())["merged"]["base"] == "org/model"


def test_a_model_of_one_file(remote, calls, tmp_path):
    shutil.rmtree(remote["org/model"])
    save_model(remote["org/model"], {"model.safetensors": FILES["a-1.safetensors"]}, {})
    (remote["org/model"] / "model.fp16.safetensors").write_bytes(bytes(10))
    merge_checkpoint("org/model", "org/adapter", tmp_path / "out")
    assert downloaded(tmp_path, "model") == {"model.safetensors", "config.json"}


def test_looking_and_converting_by_names(remote, calls, tmp_path):
    (layer,) = inspect_adapter("org/adapter", "org/model@main").layers
    assert layer.weight_norm == pytest.approx(24**0.5) and ("org/model", "main") in calls
    convert_adapter("org/adapter", tmp_path / "lora", to="lora", rank=1, base="org/model")
    assert verify_folder(tmp_path / "lora") == []


def test_adapters_elsewhere_in_a_repository(calls, tmp_path):
    with pytest.raises(HiraError, match=r"these folders in it hold adapters: mine"):
        inspect_adapter("org/named")
    with pytest.raises(HiraError, match="--allow-pickle"):
        inspect_adapter("org/pickled")
    assert inspect_adapter("org/pickled", allow_pickle=True).parameters == 20


def test_nothing_is_downloaded_for_an_output_that_is_refused(calls, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    with pytest.raises(HiraError, match="is not empty"):
        merge_checkpoint("org/model", "org/adapter", tmp_path / "out")
    with pytest.raises(HiraError, match="is not empty"):
        convert_adapter("org/adapter", tmp_path / "out", fold=True)
    assert calls == []


def test_folders_that_are_here_and_paths_ask_nothing_of_the_hub(remote, calls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "remote")
    monkeypatch.chdir("..")
    assert inspect_adapter("remote/adapter").parameters == 20  # of two parts, as a name has
    for path in ("./remote/absent", "absent", "a/b/c", "/absent/x", "~/absent", "remote/absent/", "../absent", "a//b"):
        with pytest.raises(HiraError, match=r"is not a folder here; check the path, or pass a name on the hub"):
            inspect_adapter(path)
    assert calls == []


def test_what_the_hub_does_not_give(calls, tmp_path, monkeypatch):
    with pytest.raises(HiraError, match=r"adapter 'adapters/mine@x' is not a folder here, and adapters/mine could not"):
        inspect_adapter("adapters/mine@x")
    with pytest.raises(HiraError, match=r"model 'no/model' .*LocalEntryNotFoundError: Cannot reach the hub\.\)"):
        merge_checkpoint("no/model", "org/adapter", tmp_path / "out")

    def gated(*args, **options):
        raise GatedRepoError.__new__(GatedRepoError, "gated")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", gated)
    with pytest.raises(HiraError, match=r"GatedRepoError.*hf auth login"):
        inspect_adapter("org/adapter")
    assert not (tmp_path / "out").exists()


def test_names_of_repositories():
    cases = {
        "org/name": "org/name",
        "org/name@rev": "org/name",
        "/x/models--org--a--b/snapshots/abc": "org/a--b",
        "/x/models--org--name/snapshots/abc/": "org/name",
        "name": None,
        "/org/name": None,
        "./org/name": None,
        "a/b/c": None,
    }
    assert {name: hub_id(name) for name in cases} == cases


def test_the_cache_without_a_network(remote, tmp_path):
    """The hub's own library, switched off-line, with a cache as it makes it; and a name that the cache lacks."""
    for name, commit in (("model", COMMIT), ("adapter", "d" * 40)):
        place = tmp_path / "home/hub" / f"models--org--{name}"
        (place / "refs").mkdir(parents=True)
        (place / "refs/main").write_text(commit)
        (place / "blobs").mkdir()
        for i, path in enumerate(sorted(path for path in remote[f"org/{name}"].rglob("*") if path.is_file())):
            link = place / "snapshots" / commit / path.relative_to(remote[f"org/{name}"])
            link.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place / "blobs" / f"{i:040x}")
            link.symlink_to(os.path.relpath(place / "blobs" / f"{i:040x}", link.parent))
    code = f"""
import os, hira
from hira import HiraError
report = hira.merge_checkpoint("org/model", "org/adapter@{"d" * 40}", "out")
assert report.merged == ("q.weight",) and report.notes == (), report
assert hira.inspect_adapter("org/adapter", "org/model@main").layers[0].weight_norm
for name in ("org/absent", "org/model@other"):
    try:
        hira.merge_checkpoint(name, "org/adapter", "none")
    except HiraError as error:
        assert name in str(error) and "HF_HUB_OFFLINE" in str(error), error
    else:
        raise AssertionError(name)
assert not os.path.exists("none")
print("done")
"""
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert run.stdout == "done\n", run.stderr
    assert verify_folder(tmp_path / "out") == []
