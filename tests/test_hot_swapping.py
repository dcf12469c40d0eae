"""Hot-swapping HiRA adapters by PEFT's functions and by transformers' load_adapter, compiled models included."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import tied_models
import torch
from every_kind import IDS, PARAMETERS, TARGETS, Net
from peft import PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from safetensors.torch import load_file, save_file
from small_models import llama
from torch import Tensor

import hira
from hira import HiraConfig, HiraError
from hira.tuner.model import hira_layers

pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")


def config(r: int = 2, **options: Any) -> HiraConfig:
    given = {"target_modules": TARGETS, "target_parameters": PARAMETERS, "init_weights": False}
    return HiraConfig(r=r, **{**given, **options})


def saved(folder: Path, cfg: HiraConfig, base: Any = None, seed: int = 1) -> tuple[Path, Any]:
    """A folder with an adapter, and the model that has it."""
    base = Net() if base is None else base
    torch.manual_seed(seed)
    model = get_peft_model(base, cfg).eval()
    model.save_pretrained(folder)
    return folder, model


def output(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS)


def states(model: Any) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("alphas", [(None, None), (16, None), (None, 16), (16, 64)], ids=str)
@pytest.mark.parametrize("ranks", [(2, 2), (4, 1), (1, 4)], ids=str)
def test_a_swapped_adapter_computes_as_a_loaded_one(ranks, alphas, tmp_path):
    folder, other = saved(tmp_path / "two", config(ranks[1], hira_alpha=alphas[1]))
    model = get_peft_model(Net(), config(ranks[0], hira_alpha=alphas[0])).eval()
    before = dict(model.named_parameters())
    scales = [dict(layer.alpha_scale) for layer in hira_layers(model)]
    hotswap_adapter(model, str(folder), adapter_name="default", torch_device="cpu")
    torch.testing.assert_close(output(model), output(other))
    assert [layer.alpha_scale for layer in hira_layers(model)] == scales
    assert all(model.get_parameter(name) is p for name, p in before.items()) == (ranks[1] <= ranks[0])
    assert {layer.r["default"] for layer in hira_layers(model)} == {max(ranks)}
    model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(Net(), tmp_path / "again").eval()
    torch.testing.assert_close(output(again), output(other))
    assert again.peft_config["default"].r == max(ranks)


def test_ranks_of_a_pattern(tmp_path):
    folder, other = saved(tmp_path, config(4, rank_pattern={"first": 1, "experts.up": 3}))
    model = get_peft_model(Net(), config(2, rank_pattern={"second": 5})).eval()
    hotswap_adapter(model, str(folder), adapter_name="default")
    torch.testing.assert_close(output(model), output(other))
    ranks = {layer.name.rpartition(".")[2]: layer.r["default"] for layer in hira_layers(model)}
    assert ranks["second"] == 5
    assert ranks["first"] == 2
    assert ranks["up"] == 3
    again = get_peft_model(Net(), model.peft_config["default"])
    assert [layer.r for layer in hira_layers(again)] == [layer.r for layer in hira_layers(model)]


def test_a_layer_that_the_other_lacks_computes_with_its_weight(tmp_path):
    folder, other = saved(tmp_path, config(target_modules=["first"]))
    model = get_peft_model(Net(), config()).eval()
    hotswap_adapter(model, str(folder), adapter_name="default")
    torch.testing.assert_close(output(model), output(other))


def test_other_adapters_stay(tmp_path):
    folder, other = saved(tmp_path, config(3))
    model = get_peft_model(Net(), config(3)).eval()
    model.add_adapter("second", config(2))
    model.set_adapter("second")
    y = output(model)
    model.merge_adapter()
    hotswap_adapter(model, str(folder), adapter_name="default")
    torch.testing.assert_close(output(model), y)
    model.unmerge_adapter()
    assert torch.equal(output(model), y)
    model.set_adapter("default")
    torch.testing.assert_close(output(model), output(other))


def test_a_merged_adapter_is_refused(tmp_path):
    folder, other = saved(tmp_path, config())
    model = get_peft_model(Net(), config()).eval()
    model.merge_adapter()
    y = output(model)
    with pytest.raises(HiraError, match="merged"):
        hotswap_adapter(model, str(folder), adapter_name="default")
    assert torch.equal(output(model), y)
    model.unmerge_adapter()
    hotswap_adapter(model, str(folder), adapter_name="default")
    model.merge_adapter()
    torch.testing.assert_close(output(model), output(other))


@pytest.mark.parametrize(
    ("own", "other", "mentioned"),
    [
        ({"target_modules": ["first"]}, {}, "attention"),
        ({"target_parameters": None}, {}, "target_parameters"),
        (
            {"target_parameters": None},
            {"target_parameters": None, "hira_dropout": 0.1, "target_modules": ["first"]},
            "drop",
        ),
        ({}, {"modules_to_save": ["norm"]}, "modules_to_save"),
        ({"modules_to_save": ["norm"]}, {}, "modules_to_save"),
    ],
)
def test_what_does_not_fit_changes_nothing(own, other, mentioned, tmp_path):
    folder, _ = saved(tmp_path, config(3, **other))
    model = get_peft_model(Net(), config(**own)).eval()
    before = states(model)
    with pytest.raises(HiraError, match=mentioned):
        hotswap_adapter(model, str(folder), adapter_name="default")
    assert all(torch.equal(value, before[key]) for key, value in states(model).items())


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("first.hira_A", lambda value: value[:, :-1]),
        ("first.hira_B", None),
        ("second.hira_B", lambda value: value[:, :1]),
        ("experts.hira_A", lambda value: value[:-1]),
        ("embedding.base_layer.weight", lambda value: value + 1),
    ],
)
def test_a_damaged_file_changes_nothing(key, change, tmp_path):
    saved(tmp_path, config())
    path, key = tmp_path / "adapter_model.safetensors", f"base_model.model.{key}"
    tensors = load_file(path)
    if key.endswith("base_layer.weight"):
        tensors[key] = Net().embedding.weight.detach().clone()
    value = tensors.pop(key)
    save_file(tensors | ({} if change is None else {key: change(value).contiguous()}), path)
    model = get_peft_model(Net(), config()).eval()
    before = states(model)
    with pytest.raises(HiraError, match=key.removeprefix("base_model.model.").rpartition(".")[0]):
        hotswap_adapter(model, str(folder := tmp_path), adapter_name="default")
    assert all(torch.equal(value, before[key]) for key, value in states(model).items()), folder


def test_the_base_weight_that_peft_saves_with_an_embedding(tmp_path):
    base = llama()
    cfg = HiraConfig(r=2, target_modules=["embed_tokens"], init_weights=False)
    folder, other = saved(tmp_path, cfg, copy.deepcopy(base))
    assert any("base_layer" in key for key in load_file(folder / "adapter_model.safetensors"))
    model = get_peft_model(copy.deepcopy(base), cfg).eval()
    hotswap_adapter(model, str(folder), adapter_name="default")
    assert torch.equal(output(model).logits, output(other).logits)


def test_adapters_of_another_kind_are_refused(tmp_path):
    get_peft_model(Net(), peft.LoraConfig(target_modules=["first"])).save_pretrained(tmp_path / "lora")
    model = get_peft_model(Net(), config()).eval()
    with pytest.raises(ValueError, match="Incompatible PEFT types"):
        hotswap_adapter(model, str(tmp_path / "lora"), adapter_name="default")
    folder, _ = saved(tmp_path / "hira", config())
    with pytest.raises(HiraError, match="'absent'"):
        hotswap_adapter(model, str(folder), adapter_name="absent")


def test_tied_layers(tmp_path):
    cfg = HiraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True)
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        models.append(get_peft_model(llama(tie_word_embeddings=True), copy.deepcopy(cfg)).eval())
        with torch.no_grad():
            for parameter in (p for name, p in models[-1].named_parameters() if "hira_" in name):
                parameter.normal_()
    models[1].save_pretrained(tmp_path)
    hotswap_adapter(models[0], str(tmp_path), adapter_name="default")
    assert torch.equal(output(models[0]).logits, output(models[1]).logits)
    prepare_model_for_compiled_hotswap(models[0], target_rank=4)
    torch.testing.assert_close(output(models[0]).logits, output(models[1]).logits)
    assert {layer.r["default"] for layer in hira_layers(models[0])} == {4}


# Kept weights


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_kept_weights_are_formed_anew(mode, tmp_path):
    folder, other = saved(tmp_path, config())
    model = get_peft_model(Net(), config()).eval()
    with hira.inference_cache.keep(), mode():
        for ids in (IDS, IDS):
            y = model(ids)
        assert hira.inference_cache.nbytes > 0
        hotswap_adapter(model, str(folder), adapter_name="default")
        assert not torch.equal(model(IDS), y)
        torch.testing.assert_close(model(IDS), other(IDS))


# Compiled models


def decoder() -> Any:
    torch.manual_seed(0)
    return tied_models.llama().eval()


def compiled(model: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="eager", dynamic=False)


def test_a_compiled_model_is_not_compiled_again(tmp_path):
    targets = {"target_modules": ["q_proj", "down_proj", "embed_tokens"], "target_parameters": None}
    folders = [
        saved(tmp_path / str(r), config(r, hira_alpha=alpha, **targets), decoder(), seed=r)
        for r, alpha in ((2, None), (3, 32), (1, 8))
    ]
    model = PeftModel.from_pretrained(decoder(), folders[0][0]).eval()
    prepare_model_for_compiled_hotswap(model, target_rank=3, config=model.peft_config)
    assert model.peft_config["default"].r == 3
    model = compiled(model)
    torch.testing.assert_close(output(model).logits, output(folders[0][1]).logits)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for folder, other in (*folders[1:], folders[0]):
            hotswap_adapter(model, str(folder), adapter_name="default")
            torch.testing.assert_close(output(model).logits, output(other).logits, rtol=1e-4, atol=1e-5)


def test_a_larger_rank_is_compiled_again(tmp_path):
    """The test above can fail."""
    targets = {"target_modules": ["q_proj"], "target_parameters": None}
    folder, other = saved(tmp_path, config(3, **targets), decoder())
    model = compiled(get_peft_model(decoder(), config(2, **targets)).eval())
    output(model)
    hotswap_adapter(model, str(folder), adapter_name="default")
    with torch._dynamo.config.patch(error_on_recompile=True), pytest.raises(torch._dynamo.exc.RecompileError):
        output(model)
    torch.testing.assert_close(output(model).logits, output(other).logits, rtol=1e-4, atol=1e-5)


def test_padding_changes_nothing_but_the_rank():
    model = get_peft_model(Net(), config(rank_pattern={"first": 4}, hira_alpha=8)).eval()
    y, deltas = output(model), [layer.get_additive_delta("default") for layer in hira_layers(model)]
    with pytest.raises(HiraError, match="first"):
        prepare_model_for_compiled_hotswap(model, target_rank=3)
    assert {layer.r["default"] for layer in hira_layers(model)} == {2, 4}
    prepare_model_for_compiled_hotswap(model, target_rank=5)
    torch.testing.assert_close(output(model), y)
    for layer, delta in zip(hira_layers(model), deltas, strict=True):
        torch.testing.assert_close(layer.get_additive_delta("default"), delta)
    assert model.peft_config["default"].r == 5
    assert not model.peft_config["default"].rank_pattern
    with pytest.raises(ValueError, match="before"):
        prepare_model_for_compiled_hotswap(compiled(model), target_rank=6)
    with pytest.raises(ValueError, match="No adapter layers"):
        prepare_model_for_compiled_hotswap(Net(), target_rank=6)


# transformers' own


@pytest.mark.parametrize("alpha", [None, 16])
def test_transformers_load_adapter(alpha, tmp_path):
    targets = {"target_modules": ["q_proj", "down_proj"], "target_parameters": None}
    folders = [saved(tmp_path / str(r), config(r, hira_alpha=alpha, **targets), decoder(), seed=r) for r in (2, 1, 4)]
    model = decoder()
    model.enable_peft_hotswap(target_rank=4)
    model.load_adapter(folders[0][0], adapter_name="mine")
    torch.testing.assert_close(output(model).logits, output(folders[0][1]).logits)
    before = {name: p for name, p in model.named_parameters() if "hira_" in name}
    run = compiled(model)
    output(run)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for folder, other in (*folders[1:], folders[0]):
            info = model.load_adapter(folder, adapter_name="mine")
            assert not info.missing_keys
            torch.testing.assert_close(output(run).logits, output(other).logits, rtol=1e-4, atol=1e-5)
    assert all(model.get_parameter(name) is parameter for name, parameter in before.items())
    assert list(model.peft_config) == ["mine"]
    model.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(
        output(PeftModel.from_pretrained(decoder(), tmp_path / "again")).logits, output(folders[0][1]).logits
    )


def test_transformers_hotswap_where_it_is_asked_for(tmp_path):
    targets = {"target_modules": ["q_proj"], "target_parameters": None}
    folder, other = saved(tmp_path, config(2, **targets), decoder())
    model = decoder()
    with pytest.raises(ValueError, match="hotswap"):
        model.load_adapter(folder, hotswap=True)
    model.add_adapter(config(2, hira_alpha=16, **targets))
    with pytest.raises(ValueError, match="already exists"):
        model.load_adapter(folder, adapter_name="default")
    model.load_adapter(folder, adapter_name="default", hotswap=True, is_trainable=True)
    torch.testing.assert_close(output(model.eval()).logits, output(other).logits)
    assert any(p.requires_grad for name, p in model.named_parameters() if "hira_" in name)
    model.load_adapter(
        adapter_name="default",
        hotswap=True,
        peft_config=other.peft_config["default"],
        adapter_state_dict=load_file(folder / "adapter_model.safetensors"),
    )
    assert not any(p.requires_grad for name, p in model.named_parameters() if "hira_" in name)


# LoRA's


def test_lora_is_swapped_as_before(tmp_path):
    models = []
    for seed, r in ((1, 2), (2, 3)):
        torch.manual_seed(seed)
        cfg = peft.LoraConfig(r=r, target_modules=["first"], init_lora_weights=False)
        models.append(get_peft_model(Net(), cfg).eval())
    models[0].save_pretrained(tmp_path)
    prepare_model_for_compiled_hotswap(models[1], target_rank=4)
    hotswap_adapter(models[1], str(tmp_path), adapter_name="default")
    torch.testing.assert_close(output(models[0]), output(models[1]))
