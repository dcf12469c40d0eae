"""How a merged model is written: dtypes, rounding, sizes of files, what comes along, and what is reported."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from merge_cases import CASES
from merging import Folders, assert_same_tensors, config_of, hira_config, layout_of, made, tensors_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from hira import HiraError
from hira.files.io.manifest import MANIFEST, verify
from hira.files.merge.merge_checkpoint import merge_checkpoint

HALVES = [torch.bfloat16, torch.float16]
# what a model's files may have beside parameters in one dtype
ODD = {
    "extra.integers": torch.arange(6).reshape(2, 3),
    "extra.bytes": torch.arange(256, dtype=torch.uint8),
    "extra.mask": torch.tensor([True, False]),
    "extra.float8": torch.ones(5).to(torch.float8_e4m3fn),
    "extra.empty": torch.zeros(0, 4),
    "extra.double": torch.tensor(1 / 3, dtype=torch.float64),
}


def case(name: str, tmp_path: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Folders:
    torch.manual_seed(0)
    configs = [CASES[name].config(), CASES[name].config(r=3)]
    return made(tmp_path, CASES[name].build().to(dtype), configs, **options)


def cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    kept = {torch.float8_e4m3fn}
    return {
        name: tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype not in kept else tensor
        for name, tensor in tensors.items()
    }


# Dtypes and rounding


@pytest.mark.parametrize("rounding", [None, "nearest"])
@pytest.mark.parametrize("dtype", [torch.float64, *HALVES], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "whisper", "mixtral"])
def test_another_dtype_is_a_rounding_of_what_is_merged(name, dtype, rounding, tmp_path):
    folders = case(name, tmp_path, shard=3000)
    report, out = folders.merge(dtype=dtype, rounding=rounding)
    assert_same_tensors(tensors_of(out), cast(tensors_of(folders.memory), dtype))
    assert config_of(out)["dtype"] == str(dtype).removeprefix("torch.")
    assert layout_of(out).keys() == layout_of(folders.base).keys()
    assert sum(report.shards.values()) == sum(t.nbytes for t in tensors_of(out).values())


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("name", ["gpt2", "whisper", "mixtral", "gpt_oss"])
def test_half_precision_rounds_once_and_as_asked_for(name, half, tmp_path):
    """The same W0 in both dtypes: W' of the one is that of the other, rounded."""
    folders = case(name, tmp_path / "half", half)
    whole = folders._replace(base=tmp_path / "whole" / "base")
    shutil.copytree(folders.base, whole.base)
    whole.rewrite(lambda tensors: tensors.update({key: tensor.float() for key, tensor in tensors.items()}))
    exact = tensors_of(whole.merge()[1])
    memory = tensors_of(folders.memory)

    as_layers = tensors_of(folders.merge()[1])
    assert_same_tensors(as_layers, memory)
    assert_same_tensors(tensors_of(folders.merge(rounding="dither", overwrite=True)[1]), memory)
    assert_same_tensors(tensors_of(folders.merge(rounding="nearest", overwrite=True)[1]), cast(exact, half))
    assert_same_tensors(tensors_of(folders.merge(dtype=torch.float32, overwrite=True)[1]), exact)
    if half == torch.bfloat16:
        assert any(not torch.equal(as_layers[key], exact[key].to(half)) for key in exact)
    report, out = whole.merge(dtype=half, rounding="dither", overwrite=True)
    dithered = tensors_of(out)
    assert_same_tensors(dithered, memory)
    for key in report.merged:  # to one of the two nearest, or a denormal
        ulp = exact[key].abs() * torch.finfo(half).eps + torch.finfo(half).tiny
        assert ((dithered[key].float() - exact[key]).abs() <= ulp).all()


def test_what_is_no_real_number_is_left_alone(tmp_path):
    folders = case("llama", tmp_path)
    folders.rewrite(lambda tensors: tensors.update(ODD))
    report, out = folders.merge(dtype="bfloat16")
    assert_same_tensors(tensors_of(out), cast({**tensors_of(folders.memory), **ODD}, torch.bfloat16))
    assert report.tensors == len(tensors_of(out))
    _, out = folders.merge(overwrite=True)
    assert_same_tensors(tensors_of(out), {**tensors_of(folders.memory), **ODD})


def test_the_configuration_follows_the_dtype(tmp_path):
    folders = case("llama", tmp_path)
    parts = {"text_config": {"torch_dtype": "float32", "deep": {"dtype": "float32"}}, "vision_config": {"dtype": None}}
    folders.configure(architectures=None, dtype=None, torch_dtype="float32", tie_word_embeddings=False, **parts)
    _, out = folders.merge(dtype="bfloat16")
    wanted = {"text_config": {"torch_dtype": "bfloat16", "deep": {"dtype": "bfloat16"}}}
    assert config_of(out) == {**config_of(folders.base), **wanted, "torch_dtype": "bfloat16"}
    folders.configure(torch_dtype=None, text_config=None)
    assert config_of(folders.merge(dtype="float16", overwrite=True)[1])["dtype"] == "float16"


@pytest.mark.parametrize(
    ("dtype", "options", "message"),
    [
        (torch.float32, {"rounding": "dither"}, "with a dither from torch.float32 to torch.float32"),
        (torch.float64, {"rounding": "dither", "dtype": "bfloat16"}, "dither from torch.float64 to torch.bfloat16"),
        (torch.bfloat16, {"rounding": "dither", "dtype": "float32"}, "dither from torch.bfloat16 to torch.float32"),
        (torch.float32, {"rounding": "up"}, "rounding must be 'nearest' or 'dither', not 'up'"),
        (torch.float32, {"dtype": "int8"}, "dtype must be one of float64, float32, bfloat16, float16, not 'int8'"),
        (torch.float32, {"dtype": torch.float8_e4m3fn}, "dtype must be one of .*, not torch.float8_e4m3fn"),
        (torch.float32, {"max_shard_size": "5 parsecs"}, "max_shard_size must be .* not '5 parsecs'"),
        (torch.float32, {"max_shard_size": 0}, "max_shard_size must be .* not 0"),
        (torch.float32, {"max_shard_size": "-1GB"}, "max_shard_size must be .* not '-1GB'"),
    ],
    ids=str,
)
def test_options_that_are_refused(dtype, options, message, tmp_path):
    folders = case("llama", tmp_path, dtype)
    with pytest.raises(HiraError, match=message):
        folders.merge(**options)
    assert not (tmp_path / "out").exists()


def test_the_numbers_beside_quantised_weights_keep_their_dtype(tmp_path):
    folders = case("llama", tmp_path)
    folders.configure(quantization_config={"quant_method": "fp8"})
    with pytest.raises(HiraError, match=r"quantised \(quantization_config\).*leave out the dtype"):
        folders.merge(dtype="bfloat16")
    folders.merge()


def test_an_update_that_is_too_large_for_the_dtype(tmp_path):
    folders = case("llama", tmp_path)
    with pytest.raises(
        HiraError, match=r"of model\.\S+ of \S+ is not finite in torch.float16.*too large for the dtype"
    ):
        folders.merge(weights=(1e7, 1), dtype="float16")
    assert not (tmp_path / "out").exists()
    folders.merge(weights=(1e7, 1))


# Sizes of files


@pytest.mark.parametrize(
    ("size", "limit"),
    [("5KB", 5000), ("3 kib", 3072), (2500, 2500), ("2500", 2500), (1, 1), ("0.0000011GB", 1100), ("1GB", 10**9)],
    ids=str,
)
@pytest.mark.parametrize("shard", [None, 3000])
def test_files_of_another_size(shard, size, limit, tmp_path):
    folders = case("gpt2", tmp_path, shard=shard)
    report, out = folders.merge(max_shard_size=size)
    found = tensors_of(out)  # checks the index
    assert_same_tensors(found, tensors_of(folders.memory))
    layout = layout_of(out)
    sizes = {file: [found[name].nbytes for name in contents.tensors] for file, contents in layout.items()}
    assert report.shards == {file: sum(nbytes) for file, nbytes in sizes.items()}
    assert all(sum(nbytes) <= limit or len(nbytes) == 1 for nbytes in sizes.values())
    files = sorted(layout)
    assert files == (
        ["model.safetensors"]
        if limit > 10**6
        else [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    )
    assert (len(files) == 1) == (limit > 10**6)
    assert all(contents.metadata == {"format": "pt"} for contents in layout.values())
    totals = [sum(sizes[file]) for file in files]
    assert all(first + second > limit for first, second in itertools.pairwise(totals))
    assert not verify(out)


def test_the_index_says_of_the_model_what_it_said(tmp_path):
    folders = case("gpt2", tmp_path, shard=3000)  # whose head is added
    path = folders.base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["metadata"]["note"] = "kept"
    path.write_text(json.dumps(index))
    base, (_, out) = tensors_of(folders.base), folders.merge()
    metadata = json.loads((out / path.name).read_text())["metadata"]
    assert metadata["note"] == "kept"
    assert (
        metadata["total_parameters"] == index["metadata"]["total_parameters"] + base["transformer.wte.weight"].numel()
    )


# What comes along


def test_the_folder_as_a_whole(tmp_path):
    folders = case("llama", tmp_path, shard=3000)
    others = {
        "tokenizer.json": b"{}",
        "generation_config.json": b'{"temperature": 0.5}',
        "modeling_mystery.py": b"import torch\n",
        "assets/deep/picture.png": bytes(range(256)),
        "chat_template.jinja": "{{ \N{GREEK SMALL LETTER MU} }}".encode(),
        ".gitattributes": b"* text\n",
    }
    left_out = {
        "pytorch_model.bin": "a pickle",
        "assets/training_args.PT": "a pickle",
        "model-q4.gguf": "another copy of the weights",
        "other.safetensors": "another copy of the weights",
        "onnx/model.onnx": "another copy of the weights",
    }
    for name in [*others, *left_out]:
        (folders.base / name).parent.mkdir(parents=True, exist_ok=True)
        (folders.base / name).write_bytes(others.get(name, b"old"))
    (folders.base / "README.md").write_text("the old card")
    before = {path: path.read_bytes() for path in folders.base.rglob("*") if path.is_file()}
    report, out = folders.merge(weights=(0.1234567, 1), max_shard_size="1MB", dtype="bfloat16", rounding="nearest")

    assert report.skipped == left_out
    assert {name: (out / name).read_bytes() for name in others} == others
    assert (out / "README.base.md").read_text() == "the old card"
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    written = {"README.md", "README.base.md", "config.json", "model.safetensors", MANIFEST}
    assert found == {*others, *written}
    assert verify(out) == []
    assert {path: path.read_bytes() for path in folders.base.rglob("*") if path.is_file()} == before

    card = (out / "README.md").read_text()
    assert re.search(r"\| base model \| \W*base\W* \|", card)
    for name, facts in (("a0", r"rank \W*2\W.*times 0\.1234567\b"), ("a1", r"rank \W*3\W")):
        assert re.search(rf"\| adapter \W*{name}\W* \| .*{facts}.*\|", card)
    for name in ("hira", "torch", "peft", "transformers"):
        assert f"{name} {version(name)}" in card
    command = "hira merge base a0 a1 -o OUT --weight 0.1234567 --weight 1.0 --dtype bfloat16 --rounding nearest "
    assert command + "--max-shard-size 1000000" in card


def test_files_that_do_not_change_are_the_same_bytes(tmp_path):
    folders = made(tmp_path, architectures.llama(), [hira_config("layers.0.self_attn.q_proj")], shard=3000)
    for path in folders.base.glob("*.safetensors"):
        save_file(load_file(path), path, {"format": "pt", "made by": "a test \N{GREEK SMALL LETTER MU}"})
    report, out = folders.merge()
    (name,) = report.merged
    files = sorted(path.name for path in folders.base.iterdir())
    different = [file for file in files if (out / file).read_bytes() != (folders.base / file).read_bytes()]
    (file,) = [file for file, contents in layout_of(folders.base).items() if name in contents.tensors]
    assert different == [file]
    assert layout_of(out) == layout_of(folders.base)


def test_a_dry_run_writes_nothing_and_reports_the_same(tmp_path):
    folders = case("gpt2", tmp_path, shard=3000)
    (folders.base / "pytorch_model.bin").write_bytes(b"old")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} | {tmp_path: tmp_path.stat().st_mtime_ns}
    called = []
    dry, out = folders.merge(dry_run=True, progress=lambda *bytes_: called.append(bytes_))
    assert before == {path: path.stat().st_mtime_ns for path in [tmp_path, *tmp_path.rglob("*")]}
    assert not called
    wet, _ = folders.merge()
    assert (dry.dry_run, wet.dry_run) == (True, False)
    for field in ("out", "merged", "replaced", "added", "tensors", "shards", "skipped", "notes", "nbytes", "resumed"):
        assert getattr(dry, field) == getattr(wet, field), field
    assert wet.out == out
    assert wet.tensors == len(tensors_of(out))
    assert wet.shards == {
        file: sum(tensors_of(out)[name].nbytes for name in contents.tensors)
        for file, contents in layout_of(out).items()
    }
    assert wet.resumed == ()
    assert wet.seconds > 0
    sizes = sum(path.stat().st_size for path in out.iterdir())
    assert sum(wet.shards.values()) <= wet.nbytes <= sizes
    assert wet.free_bytes > 0
    assert abs(wet.free_bytes - shutil.disk_usage(tmp_path).free) < 2**30
    with pytest.raises(HiraError, match="not empty"):
        folders.merge(dry_run=True)


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "4KB"}, {"dtype": "bfloat16"}], ids=str)
@pytest.mark.parametrize("targets", [["layers.0.self_attn.q_proj"], ["q_proj", "down_proj", "embed_tokens"]], ids=str)
def test_progress_ends_at_the_total(targets, options, tmp_path):
    """Whether all files change, or all but one are copied."""
    folders = made(tmp_path, architectures.llama(), [hira_config(*targets)], shard=3000)
    called: list[tuple[int, int]] = []
    report, _ = folders.merge(progress=lambda done, total: called.append((done, total)), **options)
    assert {total for _, total in called} == {sum(report.shards.values())}
    done = [count for count, _ in called]
    assert done == sorted(done)
    assert done[-1] == sum(report.shards.values())
    assert len(called) >= len(report.shards)


def test_one_adapter_by_its_path_and_from_another_folder(tmp_path, monkeypatch):
    folders = made(tmp_path, architectures.llama(), [hira_config("q_proj")])
    monkeypatch.chdir(tmp_path)
    report = merge_checkpoint("base", os.path.join("adapters", "a0"), Path("out"))
    assert report.out == tmp_path / "out"
    assert_same_tensors(tensors_of(tmp_path / "out"), tensors_of(folders.memory))
