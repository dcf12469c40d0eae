"""hira_alpha: HiRA at LoRA's learning rate, by a scale of B that no checkpoint shows."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from stock_peft import stock_peft
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import hira
from hira import HiraConfig, HiraError, HiraModel
from hira.tuner import state_dicts
from hira.tuner.model import hira_layers

TARGETS = ["embedding", "first", "second", "third", "convolution"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.first, self.second, self.third = nn.Linear(8, 16), Conv1D(8, 16), nn.Linear(8, 8)
        self.convolution = nn.Conv1d(8, 6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.third(torch.tanh(self.second(torch.tanh(self.first(self.embedding(ids))))))
        return self.convolution(x.transpose(1, 2)).flatten(1)


IDS = torch.arange(10).view(2, 5)


def adapted(seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return get_peft_model(Net(), HiraConfig(r=2, target_modules=TARGETS, **options))


def trained(model: Any, steps: int = 3, **options: Any) -> Any:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], **{"lr": 1e-2, **options})
    for _ in range(steps):
        optimizer.zero_grad()
        model(IDS).square().mean().backward()
        optimizer.step()
    return model


def pairs_of_layers(first: Any, second: Any) -> Any:
    return zip(hira_layers(first), hira_layers(second), strict=True)


def scales(model: Any) -> list[float]:
    return [layer.alpha_scale["default"] for layer in hira_layers(model)]


def test_the_scale_is_the_nearest_power_of_two():
    model = adapted(hira_alpha=16)
    for layer in hira_layers(model):
        rms = layer.get_base_layer().weight.square().mean().sqrt().item()
        ratio = layer.alpha_scale["default"] / (16 / (2 * rms))
        assert 2**-0.5 <= ratio <= 2**0.5
        assert math.log2(layer.alpha_scale["default"]).is_integer()
    assert len(set(scales(model))) > 1
    assert set(scales(adapted())) == {1}


def test_ranks_of_a_pattern_have_their_own():
    plain, patterned = adapted(hira_alpha=16), adapted(hira_alpha=16, rank_pattern={"third": 8})
    ratios = [a / b for a, b in zip(scales(plain), scales(patterned), strict=True)]
    assert sorted(ratios) == [1, 1, 1, 1, 4]


def test_alphas_of_a_pattern():
    """Each module by the end of its name, as its rank."""
    plain, patterned = adapted(hira_alpha=16), adapted(hira_alpha=16, alpha_pattern={"third": 4, "^first": 128})
    ratios = {a.name: b.alpha_scale["default"] / a.alpha_scale["default"] for a, b in pairs_of_layers(plain, patterned)}
    assert ratios == {"embedding": 1, "first": 8, "second": 1, "third": 0.25, "convolution": 1}
    attention = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    config = HiraConfig(r=2, target_modules=["attention"], hira_alpha=16, alpha_pattern={"out_proj": 64})
    torch.manual_seed(0)
    found = [
        {layer.name: layer.alpha_scale["default"] for layer in hira_layers(get_peft_model(copy.deepcopy(attention), c))}
        for c in (replace(config, alpha_pattern=None), config)
    ]
    assert found[1] == {**found[0], "attention.out_proj": 4 * found[0]["attention.out_proj"]}


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_a_rank_stabilised_scale(rank):
    """It divides by the square root of the rank."""
    torch.manual_seed(0)
    base = Net()
    options = {"r": rank, "target_modules": TARGETS, "hira_alpha": 16}
    plain, stable = (get_peft_model(copy.deepcopy(base), HiraConfig(**options, use_rslora=on)) for on in (False, True))
    assert {b / a for a, b in zip(scales(plain), scales(stable), strict=True)} == {math.sqrt(rank)}


def test_patterns_and_stabilised_scales_are_loaded_as_they_were(tmp_path):
    model = trained(adapted(hira_alpha=16, alpha_pattern={"third": 64}, use_rslora=True))
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Net(), tmp_path, is_trainable=True)
    assert scales(again) == scales(model)
    assert torch.equal(again(IDS), model(IDS))
    with stock_peft(), pytest.warns(UserWarning, match="alpha_pattern"):
        torch.manual_seed(0)
        theirs = PeftModel.from_pretrained(Net(), tmp_path)
        torch.testing.assert_close(theirs(IDS), model(IDS), rtol=1e-5, atol=1e-6)


def test_another_rank_in_the_file_has_the_scale_of_that_rank(tmp_path):
    """PEFT up to 0.21 ignores `rank_pattern` and writes tensors of rank r."""
    options = {"hira_alpha": 16, "rank_pattern": {"third": 8}}
    trained(adapted(hira_alpha=16)).save_pretrained(tmp_path)
    HiraConfig(r=2, target_modules=TARGETS, **options).save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Net(), tmp_path, is_trainable=True)
    assert {layer.r["default"] for layer in hira_layers(again)} == {2}
    assert scales(again) == scales(adapted(hira_alpha=16))


def test_layers_of_older_pickles(tmp_path):
    """They lack what layers did not have then."""
    model = trained(adapted()).eval()
    y = model(IDS)
    layer = model.base_model.model.first
    state = vars(layer).copy()
    for name in (
        *("alpha_scale", "record", "equal_on_all_processes", "tied_to"),
        *("lora_r", "lora_scale", "keep_weight"),
    ):
        del vars(layer)[name]
    layer._modules = {name: module for name, module in layer._modules.items() if "lora" not in name}
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(IDS), y)
    again.add_adapter("second", HiraConfig(r=2, lora_r=2, target_modules=["first"]))
    again.merge_adapter()
    torch.testing.assert_close(again(IDS), y, rtol=1e-5, atol=1e-6)
    vars(layer)["merged_adapters"] = ["default"]  # how W0 was kept has changed since
    with pytest.raises(HiraError, match="merged"):
        pickle.loads(pickle.dumps(layer))
    vars(layer).update(state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_first_step_moves_the_weight_as_far_as_loras(dtype):
    """In the root mean square over the entries, within the rounding of the scale to a power of two."""
    moved = {}
    for name, config in (
        ("LoRA", LoraConfig(r=8, lora_alpha=16, target_modules=["1"])),
        ("HiRA", HiraConfig(r=8, hira_alpha=16, target_modules=["1"])),
    ):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 128)).to(dtype)
        model = get_peft_model(base, config)
        before = model.base_model.model[1].get_base_layer().weight.detach().clone().float()
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        model(torch.randn(32, 64, dtype=dtype)).square().sum().backward()
        optimizer.step()
        merged = model.float().merge_and_unload()
        moved[name] = (merged[1].weight - before).square().mean().sqrt().item()
    assert 0.65 < moved["HiRA"] / moved["LoRA"] < 1.5


def test_training_is_that_of_a_larger_rate_for_b():
    """Adam at rate e on B / s moves B as Adam at rate s e does, up to its epsilon."""
    model, plain = adapted(hira_alpha=16), adapted()
    trained(model, eps=1e-30)
    groups = []
    for layer, scale in zip(hira_layers(plain), scales(model), strict=True):
        A, B = (factors["default"] for factors in layer._factor_dicts)
        if isinstance(layer, hira.Embedding):  # there A starts at zero, and the scale is its
            A, B = B, A
        groups += [{"params": [A], "lr": 1e-2}, {"params": [B], "lr": 1e-2 * scale}]
    optimizer = torch.optim.Adam(groups, eps=1e-30)
    for _ in range(3):
        optimizer.zero_grad()
        plain(IDS).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(model(IDS), plain(IDS), rtol=1e-4, atol=1e-5)


def test_it_starts_as_without():
    assert torch.equal(adapted(hira_alpha=16)(IDS), adapted()(IDS))
    alike = zip(adapted(hira_alpha=16).state_dict().values(), adapted().state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in alike)


def test_a_checkpoint_needs_no_scale(tmp_path):
    model = trained(adapted(hira_alpha=16))
    y = model(IDS)
    model.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(Net(), tmp_path)
    ours.base_model.model.load_state_dict(base_state(model), strict=False)
    file = load_file(tmp_path / "adapter_model.safetensors")
    plain = adapted()
    set_peft_model_state_dict(plain, file)
    assert set(scales(plain)) == {1}
    assert torch.equal(plain(IDS), y)


def test_a_peft_that_does_not_ask_the_tuner(tmp_path, monkeypatch):
    """PEFT 0.20: it saves and loads without HiraModel, so that the functions around its own have to scale B."""
    model = trained(adapted(hira_alpha=16))
    model.save_pretrained(tmp_path / "wanted")
    wanted = load_file(tmp_path / "wanted" / "adapter_model.safetensors")
    monkeypatch.setattr(state_dicts, "_TUNER_CONVERTS", False)
    for name in ("_get_adapter_state_dict", "_remap_adapter_state_dict_for_load"):
        monkeypatch.delattr(HiraModel, name)
    for options in ({}, {"state_dict": model.state_dict()}):  # the second is how Trainer saves
        model.save_pretrained(tmp_path / "found", **options)
        found = load_file(tmp_path / "found" / "adapter_model.safetensors")
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Net(), tmp_path / "found")
    assert torch.equal(again(IDS), model(IDS))


def base_state(model: Any) -> dict[str, Tensor]:
    return {
        key.removeprefix("base_model.model."): value for key, value in model.state_dict().items() if "hira_" not in key
    }


def test_it_is_loaded_as_it_was(tmp_path):
    model = trained(adapted(hira_alpha=16))
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Net(), tmp_path, is_trainable=True)
    assert again.peft_config["default"].hira_alpha == 16
    assert scales(again) == scales(model)
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    assert torch.equal(again(IDS), model(IDS))


def test_training_goes_on_from_a_checkpoint(tmp_path):
    options = {"betas": (0.0, 0.9)}
    whole = trained(adapted(hira_alpha=16), 2, **options)
    half = adapted(hira_alpha=16)
    optimizer = torch.optim.Adam([p for p in half.parameters() if p.requires_grad], lr=1e-2, **options)
    half(IDS).square().mean().backward()
    optimizer.step()
    half.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Net(), tmp_path, is_trainable=True)
    resumed = torch.optim.Adam([p for p in again.parameters() if p.requires_grad], lr=1e-2, **options)
    resumed.load_state_dict(optimizer.state_dict())
    again(IDS).square().mean().backward()
    resumed.step()
    assert torch.equal(again(IDS), whole(IDS))


def test_stock_peft_computes_the_same(tmp_path):
    model = trained(adapted(hira_alpha=16)).eval()
    y = model(IDS)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    with stock_peft(), pytest.warns(UserWarning, match="hira_alpha"):
        theirs = PeftModel.from_pretrained(Net(), tmp_path)
        torch.testing.assert_close(theirs(IDS), y, rtol=1e-5, atol=1e-6)


def test_transformers_loads_the_file_as_it_is(tmp_path):
    """Its own load_adapter puts tensors into the layers without PEFT's function for that."""
    from transformers import LlamaConfig, LlamaModel

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}

    def llama() -> Any:
        torch.manual_seed(0)
        return LlamaModel(LlamaConfig(vocab_size=32, **sizes)).eval()

    config = HiraConfig(r=2, hira_alpha=16, target_modules=["q_proj", "v_proj"], init_weights=False)
    for wrapped in (True, False):
        model = llama()
        if wrapped:
            model = get_peft_model(model, config)
        else:
            model.add_adapter(config)
        assert any(layer.alpha_scale["default"] != 1 for layer in hira_layers(model))
        folder = tmp_path / str(wrapped)
        model.save_pretrained(folder)
        wanted = model(IDS).last_hidden_state
        again = llama()
        again.load_adapter(folder)
        torch.testing.assert_close(again(IDS).last_hidden_state, wanted)
        torch.testing.assert_close(PeftModel.from_pretrained(llama(), folder)(IDS).last_hidden_state, wanted)


def test_a_float64_model():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)).double(), HiraConfig(hira_alpha=16, target_modules=["0"]))
    assert scales(model) != [1]


def test_merging_and_deltas(tmp_path):
    model = trained(adapted(hira_alpha=16)).eval()
    y = model(IDS)
    for layer in hira_layers(model):
        if isinstance(layer, hira.Linear):
            weight = layer.get_base_layer().weight * (1 + layer.get_delta_weight("default"))
            layer.merge()
            torch.testing.assert_close(layer.get_base_layer().weight, weight)
            layer.unmerge()
    model.merge_adapter()
    torch.testing.assert_close(model(IDS), y, rtol=1e-5, atol=1e-6)
    model.unmerge_adapter()
    assert torch.equal(model(IDS), y)


def test_adapters_with_and_without_it_act_together():
    model = trained(adapted(hira_alpha=16))
    model.add_adapter("other", HiraConfig(r=3, target_modules=TARGETS, init_weights=False))
    model.base_model.set_adapter(["default", "other"])
    y = model(IDS)
    plain = adapted()
    set_peft_model_state_dict(plain, get_peft_model_state_dict(model, adapter_name="default"))
    plain.add_adapter("other", HiraConfig(r=3, target_modules=TARGETS, init_weights=False))
    set_peft_model_state_dict(plain, get_peft_model_state_dict(model, adapter_name="other"), "other")
    plain.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(plain(IDS), y)
    model.delete_adapter("default")
    assert all("default" not in layer.alpha_scale for layer in hira_layers(model))


def test_a_weight_of_zeros_has_none():
    base = nn.Sequential(nn.Linear(4, 4))
    nn.init.zeros_(base[0].weight)
    assert scales(get_peft_model(base, HiraConfig(r=2, hira_alpha=16, target_modules=["0"]))) == [1]


@pytest.mark.parametrize("alpha", [0, -1, math.inf, math.nan, "16", True])
def test_what_is_no_alpha(alpha):
    with pytest.raises(HiraError, match="hira_alpha"):
        HiraConfig(hira_alpha=alpha)


def test_a_weight_that_is_not_there_yet():
    with torch.device("meta"):
        base = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(HiraError, match="hira_alpha"):
        get_peft_model(base, HiraConfig(r=2, hira_alpha=16, target_modules=["0"]))


def test_a_weight_that_is_not_quantised_yet():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    for layer in (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt):
        options = {"has_fp16_weights": False} if layer is bitsandbytes.nn.Linear8bitLt else {}
        base = nn.Sequential(layer(64, 64, **options))
        with pytest.raises(HiraError, match=r"0: hira_alpha.*not quantised yet"):
            get_peft_model(base, HiraConfig(r=2, hira_alpha=16, target_modules=["0"]))
        assert type(base[0]) is layer


def test_a_weight_that_is_divided_over_processes(tmp_path):
    dist = pytest.importorskip("torch.distributed")
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        base = nn.Sequential(nn.Linear(8, 8))
        parallelize_module(base, dist.device_mesh.init_device_mesh("cpu", (1,)), {"0": ColwiseParallel()})
        with pytest.raises(HiraError, match=r"0: hira_alpha.*tensor parallelism"):
            get_peft_model(base, HiraConfig(r=2, hira_alpha=16, target_modules=["0"]))
    finally:
        dist.destroy_process_group()


def test_it_is_saved_where_it_is_set(tmp_path: Path):
    assert "hira_alpha" not in HiraConfig().to_dict()
    HiraConfig(hira_alpha=16).save_pretrained(tmp_path)
    assert HiraConfig.from_pretrained(tmp_path).hira_alpha == 16
