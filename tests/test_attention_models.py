"""HiRA on nn.MultiheadAttention in a model: merging, targets, checkpoints, other tuners, and a vision transformer."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from attending import (
    BATCH,
    EXACT,
    FIRST,
    HEADS,
    LENGTH,
    OWN,
    WIDTH,
    Attending,
    adapted,
    assert_same,
    config,
    expected,
    self_attention,
)
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from stock_peft import stock_peft
from torch import Tensor, nn
from torch.nn.utils import parametrize
from vision_transformer import VisionTransformer

import hira
from hira import HiraConfig, HiraError


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merging_is_exact_and_undone_bit_for_bit(dtype):
    model, layer, plain = adapted(dtype)
    base = layer.base_layer
    before = base.in_proj_weight, base.out_proj.base_layer.weight
    formed = layer.in_proj_weight.detach(), layer.out_proj.weight.detach()
    query = torch.randn(LENGTH, BATCH, WIDTH, dtype=dtype)
    outputs = model(query, query, query)
    model.merge_adapter(safe_merge=True)
    assert torch.equal(base.in_proj_weight, formed[0])
    assert torch.equal(base.out_proj.base_layer.weight, formed[1])
    assert base.in_proj_weight.dtype == dtype
    assert torch.equal(layer.in_proj_weight, formed[0])
    assert torch.equal(model(query, query, query)[0], outputs[0])
    model.unmerge_adapter()
    assert base.in_proj_weight is before[0]
    assert base.out_proj.base_layer.weight is before[1]
    assert torch.equal(before[0], plain.in_proj_weight)
    assert torch.equal(before[1], plain.out_proj.weight)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(query, query, query)[0], plain(query, query, query)[0])


def test_several_adapters_merge_to_their_sum():
    model, layer, plain = adapted()
    model.add_adapter("other", config(r=1))
    args = self_attention(LENGTH, BATCH, WIDTH)
    wanted = expected(layer, plain, args, {}, ("default", "other"))
    for name in ("default", "other"):
        model.merge_adapter([name])
    assert_same(model(*args), wanted)
    model.unmerge_adapter()
    assert_same(model(*args), expected(layer, plain, args, {}))
    merged = model.merge_and_unload(adapter_names=["default", "other"])
    assert_same(merged(*args), wanted)


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("first", [False, True], ids=["", "merged before"])
def test_unloading_gives_the_attention_back(merge, first):
    model, layer, plain = adapted()
    base, keys = layer.base_layer, list(plain.state_dict())
    args = self_attention(LENGTH, BATCH, WIDTH)
    wanted = expected(layer, plain, args, {}) if merge or first else plain(*args)
    formed = layer.in_proj_weight.detach()
    if first:
        model.merge_adapter()
    unloaded = model.merge_and_unload(safe_merge=True) if merge else model.unload()
    assert unloaded.attn is base
    assert type(base) is nn.MultiheadAttention
    assert type(base.out_proj) is type(plain.out_proj)
    assert list(base.state_dict()) == keys
    assert_same(unloaded(*args), wanted)
    assert torch.equal(base.in_proj_weight, formed) == (merge or first)


@pytest.mark.parametrize("part", ["in_proj", "out_proj"])
def test_a_broken_adapter_is_not_merged(part):
    model, layer, plain = adapted()
    broken = layer if part == "in_proj" else layer.out_proj
    with torch.no_grad():
        broken.hira_A["default"][0, 0] = torch.nan
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(HiraError, match="NaNs"):
            merge(safe_merge=True)
    with pytest.raises(HiraError, match="NaNs"):
        layer.unload_and_optionally_merge_module(True, True, None)
    assert not layer.merged
    assert not layer.out_proj.merged
    assert torch.equal(layer.storage.stored, plain.in_proj_weight)
    assert torch.equal(layer.out_proj.storage.stored, plain.out_proj.weight)


def ranks(model: Any) -> dict[str, int]:
    return {key: len(value) for key, value in get_peft_model_state_dict(model).items() if key.endswith("hira_A")}


OWN_KEY, OUT_KEY = "base_model.model.attn.hira_A", "base_model.model.attn.base_layer.out_proj.hira_A"


def test_keys_are_those_of_lora():
    model, _, _ = adapted()
    lora = get_peft_model(Attending(), peft.LoraConfig(target_modules=["attn"]))
    keys = {re.sub(r"lora_([AB])\.weight", r"hira_\1", key) for key in get_peft_model_state_dict(lora)}
    state = get_peft_model_state_dict(model)
    assert state.keys() == keys
    assert {key: tuple(value.shape) for key, value in state.items()} == {
        OWN_KEY: (3, WIDTH),
        OWN_KEY.replace("_A", "_B"): (3 * WIDTH, 3),
        OUT_KEY: (3, WIDTH),
        OUT_KEY.replace("_A", "_B"): (WIDTH, 3),
    }


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"target_modules": ["attn"]}, (3, 3)),
        ({"target_modules": ["attn", "out_proj"]}, (3, 3)),
        ({"target_modules": ["attn"], "rank_pattern": {"attn": 2}}, (2, 2)),
        ({"target_modules": ["attn"], "rank_pattern": {"out_proj": 1}}, (3, 1)),
        ({"target_modules": ["attn", "out_proj"], "rank_pattern": {"out_proj": 1, "attn": 2}}, (2, 1)),
        ({"target_modules": ["attn"], "exclude_modules": ["out_proj"]}, (3, None)),
        ({"target_modules": ["attn"], "exclude_modules": r".*out_proj"}, (3, None)),
        ({"target_modules": "attn"}, (3, 3)),
    ],
    ids=str,
)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saving_and_loading(options, wanted, low_cpu_mem_usage, tmp_path):
    base = Attending().double()
    fresh = copy.deepcopy(base), copy.deepcopy(base)
    model = get_peft_model(base, HiraConfig(r=3, init_weights=False, **options))
    keys = {key: rank for key, rank in zip((OWN_KEY, OUT_KEY), wanted, strict=True) if rank is not None}
    assert ranks(model) == keys
    args = self_attention(LENGTH, BATCH, WIDTH)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh[0], tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert_same(loaded(*args), model(*args))
    second = get_peft_model(fresh[1], config("attn", r=2), "first")
    second.load_adapter(tmp_path, "second", low_cpu_mem_usage=low_cpu_mem_usage)
    second.set_adapter("second")
    assert_same(second(*args), model(*args))


def test_naming_the_output_as_well_adapts_it_once():
    states = []
    base = Attending()
    for targets in (["attn"], ["attn", "out_proj"], ["out_proj", "attn"]):
        torch.manual_seed(1)
        states.append(get_peft_model_state_dict(get_peft_model(copy.deepcopy(base), config(*targets))))
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[key], states[0][key]) for key in state)


def test_injecting_by_the_names_in_a_checkpoint():
    model, _, _ = adapted(torch.float32)
    state = {k.removeprefix("base_model.model."): v for k, v in get_peft_model_state_dict(model).items()}
    base = Attending()
    injected = peft.inject_adapter_in_model(config(), base, state_dict=state)
    assert isinstance(injected.attn, hira.MultiheadAttention)
    assert isinstance(injected.attn.out_proj, hira.Linear)
    result = peft.set_peft_model_state_dict(base, state)
    assert not result.unexpected_keys
    assert torch.equal(base.attn.hira_A["default"], state["attn.hira_A"])
    assert torch.equal(base.attn.out_proj.hira_B["default"], state["attn.base_layer.out_proj.hira_B"])


def test_a_checkpoint_without_the_output_does_not_fit(tmp_path):
    base = Attending()
    get_peft_model(copy.deepcopy(base), config(exclude_modules=["out_proj"])).save_pretrained(tmp_path)
    model = get_peft_model(base, config("attn"))
    before = list(model.state_dict())
    whole = HiraConfig.from_pretrained(tmp_path)
    whole.exclude_modules = None
    whole.save_pretrained(tmp_path)
    with pytest.raises(HiraError, match=r"attn\.base_layer\.out_proj\.hira_A\.other"):
        model.load_adapter(tmp_path, "other")
    assert list(model.state_dict()) == before


def test_the_output_first_and_attention_with_another_adapter():
    model, layer, plain = adapted(targets=("out_proj",))
    assert isinstance(layer, nn.MultiheadAttention)
    output = layer.out_proj
    args = self_attention(LENGTH, BATCH, WIDTH)
    alone = model(*args)
    model.add_adapter("other", config("attn", r=1))
    layer = model.base_model.model.attn
    assert isinstance(layer, hira.MultiheadAttention)
    assert layer.out_proj is output
    assert output.r == {"default": 3, "other": 1}
    assert_same(model(*args), alone)
    model.set_adapter("other")
    assert_same(model(*args), expected(layer, plain, args, {}, ("other",)))


def test_a_computed_weight():
    base = Attending().double()
    plain = copy.deepcopy(base.attn)
    parametrize.register_parametrization(base.attn, "in_proj_weight", nn.Tanh())
    model = get_peft_model(base, config())
    args = self_attention(*FIRST)
    assert_same(model(*args), expected(model.base_model.model.attn, plain, args, {}))
    with pytest.raises(HiraError, match=r"^attn: .*in_proj_weight"):
        model.merge_adapter()


def integer_output(base: nn.Module) -> nn.Module:
    base.attn.out_proj.weight = nn.Parameter(base.attn.out_proj.weight.to(torch.int8), requires_grad=False)
    return base


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "dropout": (Attending, {"hira_dropout": 0.1}, "attn.*hira_dropout"),
    "three weights": (lambda: Attending(kdim=4), {}, "attn.*out_proj"),
    "integers": (lambda: integer_output(Attending()), {}, r"torch\.int8"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals_change_nothing(make, options, message):
    base = make()
    before = [(name, type(module)) for name, module in base.named_modules()]
    with pytest.raises(HiraError, match=f"(?s){message}"):
        get_peft_model(base, config(**options))
    assert [(name, type(module)) for name, module in base.named_modules()] == before


def test_dropout_of_a_second_adapter_is_refused():
    model, layer, _ = adapted()
    with pytest.raises(HiraError, match="hira_dropout"):
        model.add_adapter("other", config(hira_dropout=0.5))
    assert layer.r == layer.out_proj.r == {"default": 3}
    assert list(model.peft_config) == ["default"]


def test_attention_of_another_tuner_is_refused():
    lora = get_peft_model(Attending(), peft.LoraConfig(target_modules=["attn"])).base_model.model
    with pytest.raises(HiraError, match="another tuner"):
        hira.layers.dispatch.dispatch(lora.attn, "default", hira_config=config())


def test_a_mixed_batch():
    model, layer, _ = adapted(**OWN)
    model.eval()
    args = self_attention(*FIRST)
    assert_same(model(*args, adapter_names=["default"] * BATCH), model(*args))
    with pytest.raises(HiraError, match=r"\battn\b"):
        model(*args, adapter_names=["__base__", "default"])
    message = "__base__.*attn.*default"
    with pytest.raises(HiraError, match=message):
        layer(*args, adapter_names=["__base__"] * BATCH)
    layer.merge()
    with pytest.raises(HiraError, match=r"'default'.* merged"):
        layer(*args, adapter_names=["default"] * BATCH)


def test_beside_lora_in_a_mixed_model():
    base = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.TransformerEncoderLayer(WIDTH, HEADS, 16, dropout=0.0)).double()
    model = get_peft_model(base, config("self_attn"), mixed=True)
    model.add_adapter("lora", peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    model.set_adapter(["default", "lora"])
    query = torch.randn(LENGTH, BATCH, WIDTH).double()
    wanted = model(query)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(query), wanted, **EXACT)
    assert type(merged[1].self_attn.out_proj) is not hira.Linear


def quadrants(n: int) -> tuple[Tensor, Tensor]:
    """Noise with a bright spot; the class is the quadrant that it is in."""
    classes = torch.arange(n) % 4
    images = 0.1 * torch.randn(n, 1, 16, 16)
    places = torch.randint(1, 6, (2, n))
    for i, quadrant in enumerate(classes.tolist()):
        row, column = (int(places[k, i]) + 8 * (quadrant >> k & 1) for k in (0, 1))
        images[i, 0, row : row + 2, column : column + 2] += 3
    return images, classes


def test_a_vision_transformer_trains_saves_loads_and_merges(tmp_path):
    base = VisionTransformer()
    fresh = copy.deepcopy(base)
    options = {"target_modules": ["attn"], "modules_to_save": ["head"], "init_weights": True}
    model = get_peft_model(base, HiraConfig(r=8, **options))
    images, classes = quadrants(64)
    untrained = model(images).detach()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(images), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    for name, parameter in base.named_parameters():
        if "attn" in name and "hira_" not in name:
            plain = name.replace("base_layer.", "")
            assert torch.equal(parameter, fresh.get_parameter(plain))
    logits = model.eval()(images).detach()
    assert not torch.allclose(logits, untrained, atol=0.1)
    with model.disable_adapter():
        torch.testing.assert_close(model(images), untrained, rtol=1e-4, atol=1e-5)

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(fresh), tmp_path, is_trainable=True).eval()
    assert torch.equal(loaded(images), logits)
    with torch.no_grad():  # PyTorch's fast path
        torch.testing.assert_close(loaded(images), logits, rtol=1e-4, atol=1e-4)

    formed = [block.attn.in_proj_weight.detach() for block in loaded.base_model.model.blocks]
    merged = loaded.merge_and_unload(safe_merge=True)
    assert all(torch.equal(block.attn.in_proj_weight, W) for block, W in zip(merged.blocks, formed, strict=True))
    fresh.load_state_dict(merged.state_dict())
    torch.testing.assert_close(fresh.eval()(images), logits, rtol=1e-4, atol=1e-4)


def test_peft_alone_refuses_attention():
    """What this file is about is not in PEFT's HiRA."""
    with stock_peft(), pytest.raises(ValueError, match="is not supported"):
        get_peft_model(Attending(), peft.HiraConfig(r=2, target_modules=["attn"]))


def test_weights_that_zero_3_has_partitioned_are_refused():
    model, layer, _ = adapted()
    layer.get_base_layer().in_proj_weight.ds_id = 0  # by which DeepSpeed knows its parameters
    with pytest.raises(HiraError, match=r"in_proj_weight of MultiheadAttention.*ZeRO-3"):
        model(*self_attention(*FIRST))
