"""A merged model's tensors one by one, as a serving engine takes them, beside the files that `hira merge` writes."""

from __future__ import annotations

import json
import shutil

import architectures
import merge_cases
import pytest
import tied_models
import torch
from merging import assert_same_tensors, hira_config, made, tensors_of
from plain_folders import pair, save_adapter, save_model
from safetensors.torch import load_file, save_file

from hira import HiraError
from hira.files.merge.merged_model import merged_model
from hira.files.merge.plan import Options
from hira.files.merge.tensors import Part, PlannedTensor

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def planned(folders):
    return merged_model(folders.base, folders.adapters, [1.0] * len(folders.adapters), Options())


@pytest.mark.parametrize(
    ("make", "configs"),
    [
        (architectures.llama, [hira_config(*ALL, modules_to_save=["lm_head"]), hira_config("q_proj", lora_r=2)]),
        (tied_models.llama, [hira_config("embed_tokens", "q_proj")]),
        (tied_models.llama, [hira_config("q_proj", modules_to_save=["embed_tokens"])]),
        (merge_cases.mixtral, [hira_config("q_proj", target_parameters=merge_cases.EXPERTS)] * 2),
        (merge_cases.gpt_oss, [hira_config("q_proj", target_parameters=merge_cases.EXPERTS)]),
    ],
    ids=["two adapters, one with LoRA", "tied", "tied and saved", "experts", "stacked experts"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_tensors_are_those_of_the_merged_files(make, configs, dtype, tmp_path):
    folders = made(tmp_path, make().to(dtype), configs, shard=3000)
    base = tensors_of(folders.base)
    found = list(planned(folders).tensors(base.items()))
    report, out = folders.merge()
    assert_same_tensors(dict(found), tensors_of(out))
    assert [name for name, _ in found] == [*base, *report.added]
    unchanged = base.keys() - {*report.merged, *report.replaced}
    assert unchanged
    assert all(tensor is base[name] for name, tensor in found if name in unchanged)


def test_names_get_the_prefix_that_the_merged_files_have(tmp_path):
    """A base in the names of the model without its head, where a head is added."""
    folders = made(tmp_path, tied_models.gpt2(), [hira_config("wte", "c_attn")])

    def change(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    folders.rewrite(change)
    found = dict(planned(folders).tensors(tensors_of(folders.base).items()))
    _, out = folders.merge()
    assert_same_tensors(found, tensors_of(out))


def test_some_of_the_tensors_give_some(tmp_path):
    """As where each of several processes takes its own experts."""
    folders = made(tmp_path, merge_cases.mixtral(), [hira_config("q_proj", target_parameters=merge_cases.EXPERTS)])
    _, out = folders.merge()
    some = {name: tensor for name, tensor in tensors_of(folders.base).items() if ".experts.1." in name}
    assert some
    wanted = tensors_of(out)
    assert_same_tensors(dict(planned(folders).tensors(some.items())), {name: wanted[name] for name in some})


def test_what_is_in_memory_is_not_read_again(tmp_path):
    """Twice W0 gives twice W', to the bit; a tensor of another dtype is no W0, and the file has it."""
    folders = made(tmp_path, architectures.llama(), [hira_config("q_proj")])
    base, merged = tensors_of(folders.base), planned(folders)
    wanted = dict(merged.tensors(base.items()))
    doubled = dict(merged.tensors((name, 2 * tensor) for name, tensor in base.items()))
    assert_same_tensors(doubled, {name: 2 * tensor for name, tensor in wanted.items()})
    converted = dict(merged.tensors((name, tensor.double()) for name, tensor in base.items()))
    assert_same_tensors(
        {name: converted[name] for name in merged.plan.changed}, {name: wanted[name] for name in merged.plan.changed}
    )
    assert not any(header.loaded for header in merged.folder.shards.values())


def test_a_tensor_that_was_not_checked_is_refused(tmp_path):
    folders = made(tmp_path, architectures.llama(), [hira_config("q_proj")])
    with pytest.raises(HiraError, match=r"layers\.0\.attention\.wq\.weight is not among"):
        dict(planned(folders).tensors({"layers.0.attention.wq.weight": torch.ones(2, 2)}.items()))


def test_one_tensor_is_in_memory_at_a_time(tmp_path, monkeypatch):
    """What makes the next one is asked for only when the one before was taken."""
    save_model(tmp_path / "base", {"model.safetensors": {f"{name}.weight": torch.randn(8, 8) for name in "abc"}}, {})
    save_adapter(tmp_path / "adapter", {k: v for name in "abc" for k, v in pair(name, 8, 8).items()})
    merged = merged_model(tmp_path / "base", [tmp_path / "adapter"], [1.0], Options())
    asked: list[str] = []

    def noted(name: str, planned: PlannedTensor) -> PlannedTensor:
        def parts() -> list[Part]:
            asked.append(name)
            return list(planned.parts())

        return planned._replace(parts=parts)

    for name, tensor in list(merged.plan.changed.items()):
        monkeypatch.setitem(merged.plan.changed, name, noted(name, tensor))
    taken = []
    for name, _ in merged.tensors(tensors_of(tmp_path / "base").items()):
        taken.append(name)
        assert asked == taken
    assert len(taken) == 3


def _nan(adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, adapter / "adapter_model.safetensors")


def _lora(adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "LORA"}))


def _of_another_model(adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    other = adapter.parent / "other"
    shutil.copytree(adapter.parent.parent / "base", other)
    tensors = load_file(other / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    config |= {"base_model_name_or_path": str(other)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (_nan, r"tensor 'base_model\.model\..*hira_A.* has a NaN"),
        (_lora, r"peft_type 'LORA'"),
        (_of_another_model, r"was trained on .*other, and the weights of .*base are others"),
        (lambda adapter: (adapter / "adapter_model.safetensors").unlink(), r"has no adapter_model\.safetensors"),
        (lambda adapter: shutil.rmtree(adapter), r"a0"),
    ],
    ids=["nan", "lora", "another model", "a missing file", "no folder"],
)
def test_wrong_adapters_are_refused_before_the_first_tensor(spoil, named, tmp_path):
    folders = made(tmp_path, architectures.llama(), [hira_config("q_proj")])
    spoil(folders.adapters[0])
    with pytest.raises(HiraError, match=named):
        planned(folders)
