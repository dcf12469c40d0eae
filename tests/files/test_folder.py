"""Model folders: indices are not believed, and links lead nowhere but to the hub cache's blobs."""

from __future__ import annotations

import json
import os
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from hira.errors import HiraError
from hira.files.io.model_folder import INDEX, SINGLE, read_folder
from hira.files.io.safetensors_file import read_tensor

SHARDS = {"model-1.safetensors": {"a": torch.ones(2), "b": torch.zeros(3)}, "model-2.safetensors": {"c": torch.ones(1)}}
MAP = {name: shard for shard, tensors in SHARDS.items() for name in tensors}


def sharded(folder, weight_map=MAP, **more):
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in SHARDS.items():
        save_file(tensors, folder / name)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 24}, "weight_map": weight_map} | more))
    (folder / "config.json").write_text("{}")
    return folder


def test_a_sharded_model(tmp_path):
    folder = read_folder(sharded(tmp_path))
    assert list(folder.shards) == list(SHARDS)
    assert folder.tensors.keys() == MAP.keys()
    header, entry = folder.tensors["c"]
    assert header.path.name == "model-2.safetensors" and entry.shape == (1,)
    assert torch.equal(read_tensor(header, "c"), torch.ones(1))
    assert (folder.index, folder.metadata, folder.other_files) == (INDEX, {"total_size": 24}, ["config.json"])


def test_a_single_file_goes_before_an_index_and_other_weights_are_left(tmp_path):
    sharded(tmp_path)
    save_file({"w": torch.ones(2)}, tmp_path / SINGLE)
    for name in ("pytorch_model.bin", "tokenizer.json", "modeling.py", "sub/chat.jinja", ".git/HEAD", "sub/x.gguf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    folder = read_folder(tmp_path)
    assert (folder.index, folder.metadata, list(folder.tensors)) == (None, {}, ["w"])
    assert folder.other_files == ["config.json", "modeling.py", "tokenizer.json", "sub/chat.jinja"]
    assert folder.skipped == {
        "pytorch_model.bin": "a pickle",
        **dict.fromkeys([*SHARDS, "sub/x.gguf"], "another copy of the weights"),
    }


PATHS = ["/etc/passwd", "../x.safetensors", "a/b.safetensors", "a\\b.safetensors", "C:x.safetensors", "", ".", ".."]
NO_NAMES = ["x\0.safetensors", "x\n.safetensors", "n" * 300, 3, None, ["x"], "pytorch_model.bin", "absent.safetensors"]


@pytest.mark.parametrize("name", PATHS + NO_NAMES, ids=lambda name: repr(name)[:20])
def test_malicious_indices(tmp_path, name):
    sharded(tmp_path, MAP | {"c": name})
    with pytest.raises(HiraError, match=r"tensor 'c' in|absent.safetensors is missing"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "model-1.safetensors", "c": "model-2.safetensors"}, "tensor 'b' of .* is not in"),
        (MAP | {"d": "model-1.safetensors"}, "1 tensors that their shards lack, such as 'd'"),
        (MAP | {"a": "model-2.safetensors"}, "tensor 'a' is in model-1.safetensors, but"),
        ({}, "must have a weight_map"),
        ([], "must have a weight_map"),
    ],
)
def test_indices_that_do_not_agree_with_the_shards(tmp_path, weight_map, message):
    with pytest.raises(HiraError, match=message):
        read_folder(sharded(tmp_path, weight_map))


def test_a_tensor_in_two_shards(tmp_path):
    sharded(tmp_path)
    save_file({"c": torch.ones(1), "a": torch.ones(2)}, tmp_path / "model-2.safetensors")
    with pytest.raises(HiraError, match=r"tensor 'a' is in model-2.safetensors, but"):
        read_folder(tmp_path)


def test_a_key_twice_in_the_index(tmp_path):
    sharded(tmp_path)
    text = (tmp_path / INDEX).read_text()
    (tmp_path / INDEX).write_text(text.replace('"a":', '"b": "model-2.safetensors", "a":'))
    with pytest.raises(HiraError, match=r"key 'b' twice"):
        read_folder(tmp_path)


def test_a_million_entries(tmp_path):
    """Time that grew with the square of the entries would take hours."""
    sharded(tmp_path, MAP | {f"t{i}": "model-1.safetensors" for i in range(10**6)})
    start = time.process_time()
    with pytest.raises(HiraError, match="1000000 tensors that their shards lack"):
        read_folder(tmp_path)
    assert time.process_time() - start < 30


def hub(tmp_path, name="models--x"):
    """A snapshot whose files are links to blobs, as the hub's cache has them."""
    snapshot, blobs = tmp_path / name / "snapshots" / "rev", tmp_path / name / "blobs"
    sharded(snapshot)
    blobs.mkdir()
    for i, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / f"{i:040x}")
        path.symlink_to(f"../../blobs/{i:040x}")
    return snapshot


def test_links_of_the_hub_cache(tmp_path):
    folder = read_folder(hub(tmp_path))
    assert folder.tensors.keys() == MAP.keys()
    assert folder.file("config.json").read_text() == "{}"
    (tmp_path / "here").symlink_to(tmp_path / "models--x/snapshots/rev")
    assert read_folder(tmp_path / "here").path == folder.path


@pytest.mark.parametrize("moved", ["cache", "blobs", "each blob"])
def test_a_hub_cache_on_another_disk(tmp_path, moved):
    snapshot, disk = hub(tmp_path), tmp_path / "disk"
    blobs = snapshot.parents[1] / "blobs"
    disk.mkdir()
    for path in {"cache": [blobs.parent], "blobs": [blobs], "each blob": sorted(blobs.iterdir())}[moved]:
        path.rename(disk / path.name)
        path.symlink_to(disk / path.name)
    folder = read_folder(snapshot)
    assert folder.tensors.keys() == MAP.keys()
    assert folder.file("config.json").read_text() == "{}"


@pytest.mark.parametrize("secret", ["id_rsa", "0" * 40])
def test_blobs_that_link_to_a_private_file(tmp_path, secret):
    """As in a cache that was packed up elsewhere."""
    snapshot = hub(tmp_path)
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "id_rsa").write_text("secret")
    blob = snapshot.parents[1] / "blobs" / secret
    blob.unlink(missing_ok=True)
    blob.symlink_to(tmp_path / "private" / "id_rsa")
    (snapshot / "extra").symlink_to(f"../../blobs/{secret}")
    with pytest.raises(HiraError, match=r"is a link to .*id_rsa, outside its folder"):
        read_folder(snapshot)


@pytest.mark.parametrize("whole", [False, True], ids=["a shard", "a single file"])
def test_weights_that_are_links_to_another_disk(tmp_path, whole):
    folder, disk = tmp_path / "model", tmp_path / "disk"
    sharded(folder)
    disk.mkdir()
    name = "model-1.safetensors"
    if whole:
        (folder / INDEX).unlink()
        (folder / name).rename(folder / "model.safetensors")
        name = "model.safetensors"
    expected = read_folder(folder)
    (folder / name).rename(disk / "elsewhere")
    (folder / name).symlink_to(disk / "elsewhere")
    found = read_folder(folder)
    assert found.tensors.keys() == expected.tensors.keys()
    assert found.shards[name].path == (disk / "elsewhere").resolve()
    for content in (b"-----BEGIN OPENSSH PRIVATE KEY-----" * 9, b"{}", b""):  # what a link could be meant to copy
        (disk / "elsewhere").write_bytes(content)
        with pytest.raises(HiraError, match="elsewhere"):
            read_folder(folder)


@pytest.mark.parametrize("name", [INDEX, "config.json", "more/config.json"])
def test_links_to_elsewhere(tmp_path, name):
    snapshot = hub(tmp_path)
    other = hub(tmp_path, "models--other")
    target = (other / os.path.basename(name)).resolve()
    (snapshot / name).unlink(missing_ok=True)
    (snapshot / name).parent.mkdir(exist_ok=True)
    (snapshot / name).symlink_to(target)
    with pytest.raises(HiraError, match=r"is a link to .* outside its folder"):
        read_folder(snapshot)


def test_links_to_folders_loops_and_pipes(tmp_path):
    sharded(tmp_path / "model")
    for make in (
        lambda path: path.symlink_to(tmp_path),
        lambda path: path.symlink_to(path),
        lambda path: path.symlink_to("absent"),
        os.mkfifo,
    ):
        make(tmp_path / "model/extra")
        with pytest.raises(HiraError, match=r"extra is (a link|missing|not a plain file)"):
            read_folder(tmp_path / "model")
        (tmp_path / "model/extra").unlink()


def test_nothing_to_read(tmp_path):
    with pytest.raises(HiraError, match=r"has neither model\.safetensors nor"):
        read_folder(tmp_path)
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(HiraError, match="is an adapter's folder"):
        read_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(HiraError, match=r"pickles only, such as pytorch_model.bin"):
        read_folder(tmp_path)
    for path in (tmp_path / "absent", tmp_path / "pytorch_model.bin", "a\0b"):
        with pytest.raises(HiraError, match="is not a folder"):
            read_folder(path)


names = st.sampled_from([*SHARDS, "absent.safetensors", "../model-1.safetensors", ""]) | st.text(max_size=5)
values = st.recursive(st.none() | st.integers() | names, lambda inner: st.lists(inner, max_size=2), max_leaves=3)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from("abcd"), names | values), st.integers(0, 400), st.binary(max_size=3))
def test_any_index_gives_an_error_or_the_tensors(tmp_path_factory, weight_map, at, noise):
    folder = sharded(tmp_path_factory.mktemp("model"), MAP | weight_map)
    data = (folder / INDEX).read_bytes()
    (folder / INDEX).write_bytes(data[:at] + noise + data[at + len(noise) :])
    try:
        found = read_folder(folder)
    except HiraError:
        return
    assert {name: header.path.name for name, (header, _) in found.tensors.items()} == MAP
    assert save({name: read_tensor(found.tensors[name][0], name) for name in "ab"}) == save(
        SHARDS["model-1.safetensors"]
    )
