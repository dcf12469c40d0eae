"""Merges of what is damaged, malicious or of another model: a HiraError, and the old output as it was."""

from __future__ import annotations

import json
import os
import re
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_folders import P, bytes_of, everything, pair, save_adapter, save_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hira import HiraError, merge_checkpoint
from hira.cli.app import app
from hira.files.io.model_folder import INDEX
from hira.files.io.output_folder import Output
from hira.ops.effective_weight import form

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter/adapter_config.json"


def tensors(seed=0):
    torch.manual_seed(seed)
    return {
        FIRST: {"layers.0.up.weight": torch.randn(6, 4), "layers.0.norm": torch.ones(4)},
        SECOND: {"layers.1.up.weight": torch.randn(6, 4).bfloat16(), "ids": torch.arange(5)},
    }


def factors():
    return pair("layers.0.up", 6, 4) | pair("layers.1.up", 6, 4)


@pytest.fixture
def root(tmp_path):
    """A model, an adapter on it, and an older output that verifies."""
    save_model(tmp_path / "base", tensors())
    save_adapter(tmp_path / "adapter", factors())
    with Output(tmp_path / "out") as out:
        out.write("old", b"old")
    return tmp_path


def changed(folder, name, change):
    """Save the tensors of a file again, changed."""
    found = load_file(folder / name)
    change(found)
    save_file(found, folder / name, {"format": "pt"})


def edited(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def in_index(root, **names):
    content = json.loads((root / "base" / INDEX).read_text())
    content["weight_map"] |= names
    (root / "base" / INDEX).write_text(json.dumps(content))


def in_header(root, old, new):
    path = root / "base" / SECOND
    data = path.read_bytes()
    assert data.count(old) == 1 and len(old) == len(new)
    path.write_bytes(data.replace(old, new))


def linked_out(root):
    (root / "elsewhere").write_text("secret")
    (root / "base" / "notes.txt").symlink_to("../elsewhere")


def weights_linked_out(root):
    (root / "elsewhere").write_text("secret " * 99)
    (root / "base" / SECOND).unlink()
    (root / "base" / SECOND).symlink_to("../elsewhere")


def pickled(root):
    folder = root / "adapter"
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def with_value(folder, file, tensor, value):
    return lambda root: changed(root / folder, file, lambda found: found[tensor].view(-1)[3:4].fill_(value))


def extra_file(name):
    return lambda root: open(os.fsencode(root / "base") + b"/" + name, "w").close()


NAN, INF = float("nan"), float("inf")
UP = P + "layers.1.up."
# what is done to the folders, and the message; those that name a file and a tensor where there is one
FAULTS = {
    "truncated": (lambda r: os.truncate(r / "base" / SECOND, 250), rf"{SECOND} is cut off"),
    "no header": (lambda r: os.truncate(r / "base" / SECOND, 9), rf"{SECOND} is cut off"),
    "empty": (lambda r: os.truncate(r / "base" / SECOND, 0), rf"{SECOND} (is cut off|cannot be read)"),
    "absent": (lambda r: (r / "base" / SECOND).unlink(), rf"{SECOND} is missing"),
    "lying size": (lambda r: in_header(r, b"[6,4]", b"[6,5]"), rf"{SECOND} is cut off, damaged"),
    "lying dtype": (lambda r: in_header(r, b'"BF16"', b'"BF32"'), rf"{SECOND} is cut off, damaged .*BF32"),
    "lying length": (lambda r: in_header(r, b'"shape":[5]', b'"shape":[9]'), rf"{SECOND} is cut off, damaged"),
    "overlap": (lambda r: in_header(r, b"[40,88]", b"[39,87]"), rf"{SECOND} is cut off, damaged"),
    "duplicated": (
        lambda r: changed(r / "base", SECOND, lambda found: found.update({"layers.0.norm": torch.ones(4)})),
        rf"'layers.0.norm' is in {SECOND}, but",
    ),
    "index: absolute": (lambda r: in_index(r, ids=f"{r}/base/{SECOND}"), "tensor 'ids' in .*plain name"),
    "index: above": (lambda r: in_index(r, ids=f"../base/{SECOND}"), "tensor 'ids' in .*plain name"),
    "index: parent": (lambda r: in_index(r, ids=".."), r"tensor 'ids' in .*'\.\.'"),
    "index: NUL": (lambda r: in_index(r, ids="x\0.safetensors"), "tensor 'ids' in .*plain name"),
    "index: lone surrogate": (lambda r: in_index(r, ids="\ud800.safetensors"), f"{INDEX} is not JSON"),
    "index: more": (lambda r: in_index(r, more=SECOND), f"names 1 tensors .* lack, such as 'more' of {SECOND}"),
    "link out": (linked_out, r"notes\.txt is a link to .*elsewhere, outside"),
    "weights that link to a secret": (weights_linked_out, "elsewhere is .* not a safetensors file"),
    "colon": (extra_file(b"a:b"), "'a:b'"),
    "not UTF-8": (extra_file(b"x\xff"), r"'x\\udcff'"),
    "deep config": (lambda r: (r / "base/config.json").write_text('{"a":' * 900 + "1" + "}" * 900), "config.json"),
    "NaN in W0": (with_value("base", SECOND, "layers.1.up.weight", NAN), "layers.1.up.weight of .*base is not finite"),
    "infinite W0": (with_value("base", FIRST, "layers.0.up.weight", INF), "layers.0.up.weight of .*base is not finite"),
    "NaN in A": (with_value("adapter", WEIGHTS, UP + "hira_A", NAN), f"'{UP}hira_A' of the adapter .* has a NaN"),
    "infinite B": (with_value("adapter", WEIGHTS, UP + "hira_B", -INF), f"'{UP}hira_B' of the adapter .*infinity"),
    "NaN in modules_to_save": (
        lambda r: changed(r / "adapter", WEIGHTS, lambda found: found.update({P + "head": torch.tensor([0, NAN])})),
        f"'{P}head' of the adapter",
    ),
    "another model": (
        lambda r: (shutil.rmtree(r / "adapter"), save_adapter(r / "adapter", pair("h.0.q", 6, 4))),
        r"base has no parameters for h.0.q of the adapter .*another model",
    ),
    "other sizes": (
        lambda r: (shutil.rmtree(r / "adapter"), save_adapter(r / "adapter", pair("layers.0.up", 6, 5))),
        r"layers.0.up in the adapter .*do not fit .*base: layers.0.up.weight \(6, 4\)",
    ),
    "without B": (lambda r: changed(r / "adapter", WEIGHTS, lambda found: found.pop(UP + "hira_B")), "lacks the other"),
    "LoRA": (lambda r: edited(r / CONFIG, peft_type="LORA"), "adapter_config.json has .*'LORA'"),
    "no JSON": (lambda r: (r / CONFIG).write_text("{'r': 2}"), "_config.json is not JSON"),
    "cut adapter": (lambda r: os.truncate(r / "adapter" / WEIGHTS, 200), f"{WEIGHTS} is cut off"),
    "no adapter": (lambda r: (r / "adapter" / WEIGHTS).unlink(), f"has no {WEIGHTS}"),
    "pickle": (pickled, "--allow-pickle"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(root, fault):
    spoil, message = FAULTS[fault]
    spoil(root)
    before, old = everything(root / "base") | everything(root / "adapter"), everything(root / "out")
    with pytest.raises(HiraError, match=message):
        merge_checkpoint(root / "base", root / "adapter", root / "out", overwrite=True)
    assert everything(root / "out") == old and bytes_of(root / "out")["old"] == b"old"
    result = CliRunner().invoke(
        app, ["merge", str(root / "base"), str(root / "adapter"), "-o", str(root / "out"), "--overwrite"]
    )
    assert (result.exit_code, result.stdout) == (1, "")
    last = result.stderr[result.stderr.rindex("hira: ") :]  # progress may come before
    assert re.search(message, last.replace("\n", " ")) and "Traceback" not in result.stderr
    assert everything(root / "out") == old
    assert everything(root / "base") | everything(root / "adapter") == before
    # with one file of weights finished it is kept for the next try, else nothing is left
    assert {name for name in os.listdir(root) if name.startswith(".")} <= {".out.hira-staging"}


OPTIONS = {
    "no adapter": ({"adapters": []}, "no adapter"),
    "NaN weight": ({"weights": [NAN]}, "weights must be"),
    "two weights": ({"weights": [1, 1]}, "weights must be .*1 adapters"),
    "text weight": ({"weights": ["x"]}, "weights must be"),
    "huge weight": ({"weights": [10**400]}, "weights must be"),
    "overflow": ({"weights": [1e308]}, "layers.0.up.weight of .*base is not finite in torch.float32"),
    "integer dtype": ({"dtype": torch.int8}, "dtype must be one of"),
    "unknown dtype": ({"dtype": "float8"}, "dtype must be one of"),
    "no dtype": ({"dtype": 16}, "dtype must be one of"),
    "rounding": ({"rounding": "up"}, "rounding must be"),
    "dither to float32": ({"rounding": "dither", "dtype": "float32"}, "layers.0.up.weight cannot be rounded"),
    **{
        f"size {size}"[:20]: ({"max_shard_size": size}, "max_shard_size must be")
        for size in (0, -1, "", "5XB", "1e5", True, "nan", INF, "9" * 400, [])
    },
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options(root, case):
    options, message = OPTIONS[case]
    before = everything(root)
    with pytest.raises(HiraError, match=message):
        merge_checkpoint(
            root / "base", **{"adapters": root / "adapter", "out": root / "out", "overwrite": True} | options
        )
    assert everything(root) == before


def test_what_overflows_float16(root):
    changed(root / "base", FIRST, lambda found: found["layers.0.up.weight"].fill_(1e30))
    before = everything(root)
    with pytest.raises(HiraError, match=r"layers.0.up.weight of .*base is not finite in torch.float16"):
        merge_checkpoint(root / "base", root / "adapter", root / "out", overwrite=True, dtype="float16")
    assert everything(root) == before


def test_an_unchanged_tensor_that_overflows_float16(root):
    changed(root / "base", FIRST, lambda found: found["layers.0.norm"].fill_(1e30))
    before = everything(root)
    with pytest.raises(HiraError, match=r"layers.0.norm"):
        merge_checkpoint(root / "base", root / "adapter", root / "out", overwrite=True, dtype="float16")
    assert everything(root) == before


@pytest.mark.parametrize("ends", [3, "layers.0.up.weight", [3], [None], [["up"]], {"a": 1}, [""], True])
def test_target_parameters_of_a_wrong_type(root, ends):
    """They change nothing for an adapter whose modules are found without them."""
    merge_checkpoint(root / "base", root / "adapter", root / "plain")
    edited(root / CONFIG, target_parameters=ends)
    merge_checkpoint(root / "base", root / "adapter", root / "out", overwrite=True)
    assert bytes_of(root / "out") == bytes_of(root / "plain")


def test_a_pickle_that_is_allowed(root):
    merge_checkpoint(root / "base", root / "adapter", root / "plain")
    pickled(root)
    merge_checkpoint(root / "base", root / "adapter", root / "out", overwrite=True, allow_pickle=True)
    assert bytes_of(root / "out") == bytes_of(root / "plain")
    torch.save({P + "layers.0.up.hira_A": os.system}, root / "adapter/adapter_model.bin")
    with pytest.raises(HiraError, match=r"adapter_model.bin cannot be read"):
        merge_checkpoint(root / "base", root / "adapter", root / "out", overwrite=True, allow_pickle=True)
    assert bytes_of(root / "out") == bytes_of(root / "plain")


@pytest.mark.parametrize(("shard", "copied"), [(FIRST, False), (SECOND, False), (SECOND, True)])
@pytest.mark.parametrize("size", [250, 999, None])
def test_a_shard_that_changes_during_the_merge(root, shard, copied, size):
    """It is cut, grows or goes, whether it is copied whole or formed anew."""
    if copied:
        changed(root / "adapter", WEIGHTS, lambda found: [found.pop(f"{UP}hira_{x}") for x in "AB"])
    path, old = root / "base" / shard, everything(root / "out")
    refusal = rf"base/{shard} .*(now has|cannot be read: No such|cut off while it was read)"

    def progress(done, total):
        if path.exists():
            path.unlink() if size is None else os.truncate(path, size)

    merge_checkpoint(root / "base", root / "adapter", root / "undisturbed")
    if shard == FIRST:  # much of it, or all, was read before the first bytes were written
        try:
            merge_checkpoint(root / "base", root / "adapter", root / "out", overwrite=True, progress=progress)
        except HiraError as error:
            assert re.search(refusal, str(error))
        else:
            old = everything(root / "undisturbed")
    else:
        with pytest.raises(HiraError, match=refusal):
            merge_checkpoint(root / "base", root / "adapter", root / "out", overwrite=True, progress=progress)
    assert everything(root / "out") == old


TARGETS = {
    "base": ("base", "which is read"),
    "in base": ("base/sub/out", "which is read"),
    "holds base": (".", "which is read"),
    "adapter": ("adapter", "which is read"),
    "in adapter": ("adapter/out", "which is read"),
    "link to base": ("link", "which is read"),
    "through a link": ("link/out", "which is read"),
    "file": ("file", "is a file"),
    "in a file": ("file/out", "file, which is not a folder"),
    "link to itself": ("loop", "link to itself"),
    "NUL": ("a\0b", "is not a path"),
    "long": ("n" * 300, "cannot be written: File name too long"),
    "rather long": ("n" * 250, "cannot be written: File name too long"),
    "the root": ("/", "holds"),
    "unknown home": ("~nobody-of-that-name/out", "is not a path"),
    "mount point": ("/proc", "mount point"),
    "here": (os.curdir, "which is read|that you are in"),
}


@pytest.mark.parametrize("case", TARGETS)
def test_targets_that_are_refused(root, case, monkeypatch):
    name, message = TARGETS[case]
    (root / "link").symlink_to("base")
    (root / "loop").symlink_to("loop")
    (root / "file").touch()
    monkeypatch.chdir(root)
    before = everything(root)
    with pytest.raises(HiraError, match=message):
        merge_checkpoint("base", "adapter", name, overwrite=True)
    assert everything(root) == before


def test_a_target_that_is_not_empty(root):
    before = everything(root)
    for dry_run in (True, False):
        with pytest.raises(HiraError, match=r"out is not empty; .*--overwrite"):
            merge_checkpoint(root / "base", root / "adapter", root / "out", dry_run=dry_run)
    merge_checkpoint(root / "base", root / "adapter", root / "out", dry_run=True, overwrite=True)
    assert everything(root) == before
    merge_checkpoint(root / "base", root / "adapter", root / "out", overwrite=True)
    assert "old" not in bytes_of(root / "out") and sorted(os.listdir(root)) == ["adapter", "base", "out"]


LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 8, "hidden_size": 4}
LLAMA |= {"intermediate_size": 6, "num_hidden_layers": 1, "num_attention_heads": 1, "tie_word_embeddings": False}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model of no architecture and one of transformers, each with an adapter on a weight in its second file."""
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "plain/base", tensors())
    save_adapter(folder / "plain/adapter", pair("layers.1.up", 6, 4) | {"more": torch.ones(2)})
    layer = "model.layers.0.mlp"
    shards = {
        FIRST: {"model.embed_tokens.weight": torch.randn(8, 4), "lm_head.weight": torch.randn(8, 4)},
        SECOND: {f"{layer}.up_proj.weight": torch.randn(6, 4), f"{layer}.down_proj.weight": torch.randn(4, 6)},
    }
    save_model(folder / "llama/base", shards, LLAMA)
    save_adapter(folder / "llama/adapter", pair(f"{layer}.up_proj", 6, 4))
    return folder


@settings(max_examples=400)
@given(
    st.sampled_from(["plain", "llama"]),
    st.sampled_from([*(f"base/{name}" for name in (FIRST, SECOND, INDEX)), f"adapter/{WEIGHTS}", CONFIG]),
    st.integers(0, 10**6),
    st.integers(0, 7),
)  # fmt: skip
def test_a_flipped_bit_gives_an_error_or_what_the_file_says(models, tmp_path_factory, model, file, at, bit):
    root = tmp_path_factory.mktemp("flipped")
    for name in ("base", "adapter"):
        shutil.copytree(models / model / name, root / name)
    data = bytearray((root / file).read_bytes())
    end = 8 + int.from_bytes(data[:8], "little") if file.endswith("safetensors") else len(data)
    data[at % end] ^= 1 << bit
    (root / file).write_bytes(data)
    before = everything(root)
    try:
        merge_checkpoint(root / "base", root / "adapter", root / "out")
    except HiraError as error:
        assert str(root) in str(error) and everything(root) == before
        return
    found = {name: load_file(root / "out" / name) for name in (FIRST, SECOND)}
    wanted = {name: load_file(root / "base" / name) for name in (FIRST, SECOND)}
    others = {}
    for name, tensor in load_file(root / "adapter" / WEIGHTS).items():
        name = name.removeprefix(P)
        if name.endswith(".hira_A"):
            A, B = tensor, load_file(root / "adapter" / WEIGHTS)[P + name[:-1] + "B"]
            (shard,) = [shard for shard in wanted.values() if f"{name[:-7]}.weight" in shard]
            W0 = shard[f"{name[:-7]}.weight"]
            shard[f"{name[:-7]}.weight"] = form(W0, A, B, 0, W0.dtype)
        elif not name.endswith(".hira_B"):
            others[name] = tensor
    wanted[SECOND] |= others
    bytes_of(root / "out")
    for name in (FIRST, SECOND):
        assert found[name].keys() == wanted[name].keys()
        assert all(same(found[name][key], tensor) for key, tensor in wanted[name].items())


def same(some, other):
    bits = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (some, other)]
    return some.dtype == other.dtype and some.shape == other.shape and torch.equal(*bits)
