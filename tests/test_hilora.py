"""HiRA with LoRA, W' = W0 * (1 + BA) + L2 L1, on every kind of layer, in memory and in files."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from every_kind import IDS, LAYERS, PARAMETERS, TARGETS, Net
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from small_models import llama
from stock_peft import stock_peft
from torch import Tensor, nn
from torch.func import functional_call
from transformers import BitsAndBytesConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import hira
from hira import HiraConfig, HiraError
from hira.files.convert.convert_adapter import convert_adapter
from hira.files.inspect.inspect_adapter import inspect_adapter
from hira.files.inspect.report_table import in_words
from hira.files.merge.merge_checkpoint import merge_checkpoint
from hira.ops import reference
from hira.tuner.model import hira_layers

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def config(r: int = 2, lora_r: int = 3, **options: Any) -> HiraConfig:
    defaults = {"target_modules": TARGETS, "target_parameters": PARAMETERS, "init_weights": False}
    return HiraConfig(r=r, lora_r=lora_r, **{**defaults, **options})


def adapted(*configs: HiraConfig, dtype: torch.dtype = torch.float64) -> Any:
    """A net with an adapter for each configuration, named 0, 1, ..., all of them active."""
    torch.manual_seed(0)
    first, *others = configs or (config(),)
    model = get_peft_model(Net(), first, adapter_name="0")
    for i, other in enumerate(others, start=1):
        model.add_adapter(str(i), other)
    model.base_model.set_adapter([str(i) for i in range(len(configs) or 1)])
    return model.to(dtype).eval()


def delta(layer: hira.HiraLayer, first: Tensor, second: Tensor) -> Tensor:
    """The product of two factors as the base layer stores its weight."""
    if isinstance(layer, hira.ParamWrapper):
        E = len(layer.storage.stored)
        A, B = first.view(E, -1, first.shape[1]), second.view(len(second), -1, E)
        return torch.stack([B[:, :, e] @ A[e] for e in range(E)])
    product = reference.delta(first, second)
    turned = isinstance(layer, hira.Embedding) or isinstance(layer.get_base_layer(), Conv1D)
    return product.t() if turned else product


def weights(model: Any) -> dict[str, Tensor]:
    """The reference's W' of all adapters that are active, by the name of the weight in the plain net."""
    found = {}
    for key, layer in model.named_modules():
        if not isinstance(layer, hira.HiraLayer):
            continue
        name = layer.storage.name
        W0 = getattr(layer.get_base_layer(), name)
        modulation, added = 1, 0
        for adapter in layer.active_adapters:
            A, B, *lora = (factors[adapter] for factors in layer.factor_dicts(adapter))
            modulation = modulation + delta(layer, A, B)
            added = added + (delta(layer, *lora) if lora else 0)
        key = key.removeprefix("base_model.model.").replace(".base_layer", "")
        found[f"{key}.{name}"] = W0 * modulation + added
    assert len(found) == LAYERS
    return found


def plain(model: Any) -> Tensor:
    return functional_call(Net().double(), {**base_state(model), **weights(model)}, (IDS,))


def base_state(model: Any) -> dict[str, Tensor]:
    state = {key: value for key, value in model.state_dict().items() if "hira_" not in key}
    return {key.removeprefix("base_model.model.").replace(".base_layer", ""): value for key, value in state.items()}


def trainable(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("ranks", [[(2, 3)], [(2, 3), (1, 0)], [(1, 0), (2, 3), (3, 1)]], ids=str)
def test_outputs_and_gradients_are_those_of_the_equation(ranks):
    model = adapted(*(config(*each) for each in ranks))
    y, wanted = model(IDS), plain(model)
    torch.testing.assert_close(y, wanted, **EXACT)
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, trainable(model), dy)
    for mine, right in zip(found, torch.autograd.grad(wanted, trainable(model), dy), strict=True):
        torch.testing.assert_close(mine, right, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merging_is_exact_and_undone(dtype):
    model = adapted(config(), config(1, 0), config(3, 1), dtype=dtype)
    before, y = copy.deepcopy(model.state_dict()), model(IDS)
    model.merge_adapter(safe_merge=True)
    if dtype == torch.float64:
        for name, weight in weights_stored(model).items():
            torch.testing.assert_close(weight, weights(adapted_again(model))[name], **EXACT)
    tolerance = {"rtol": 1e-2, "atol": 1e-1} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(model(IDS), y, **tolerance)
    model.unmerge_adapter()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def weights_stored(model: Any) -> dict[str, Tensor]:
    """What the base layers hold, by name."""
    return {
        f"{key.removeprefix('base_model.model.').replace('.base_layer', '')}.{layer.storage.name}": layer.storage.stored
        for key, layer in model.named_modules()
        if isinstance(layer, hira.HiraLayer)
    }


def adapted_again(model: Any) -> Any:
    """A copy that is not merged."""
    again = copy.deepcopy(model)
    again.unmerge_adapter()
    return again


def test_without_lora_it_is_hira_bit_for_bit(tmp_path):
    plain, none = (
        adapted(config(lora_r=0)),
        adapted(HiraConfig(r=2, target_modules=TARGETS, init_weights=False, target_parameters=PARAMETERS)),
    )
    assert torch.equal(plain(IDS), none(IDS))
    plain.save_pretrained(tmp_path / "a"), none.save_pretrained(tmp_path / "b")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        files = [next(tmp_path.joinpath(folder).rglob(name)).read_bytes() for folder in "ab"]
        assert files[0] == files[1] or json.loads(files[0]) == json.loads(files[1])


def test_it_starts_as_the_base_model_and_all_of_it_trains():
    torch.manual_seed(0)
    base = Net()
    y = base(IDS)
    model = get_peft_model(base, config(init_weights=True))
    assert torch.equal(model(IDS), y)
    optimizer = torch.optim.Adam(trainable(model), lr=1e-2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        model(IDS).square().mean().backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != ("hira_" in name), name
    assert sum("hira_lora_" in name for name in before) == 2 * LAYERS


def test_dropout_drops_the_input_of_the_whole_update():
    model = adapted(config(target_modules=["first"], target_parameters=None, hira_dropout=0.5))
    layer = model.base_model.model.first
    base, x = layer.get_base_layer(), torch.randn(3, 8, dtype=torch.float64)
    model.train()
    torch.manual_seed(1)
    y = model.base_model.model.first(x)
    torch.manual_seed(1)
    dropped = layer.hira_dropout["0"](x)
    A, B, L1, L2 = (factors["0"] for factors in layer.factor_dicts("0"))
    torch.testing.assert_close(y, base(x) + dropped @ (base.weight * (B @ A) + L2 @ L1).t(), **EXACT)


def test_scales_act_on_both_parts():
    model = adapted()
    one = {key: value - model.get_parameter(parameter_of(model, key)) for key, value in weights(model).items()}
    for layer in hira_layers(model):
        layer.set_scale("0", 3.0)
        key = next(key for key in one if layer.storage.stored is model.get_parameter(parameter_of(model, key)))
        torch.testing.assert_close(layer.get_additive_delta("0"), 3 * one[key], **EXACT)


def parameter_of(model: Any, key: str) -> str:
    """The full name of a base layer's weight."""
    parameters = [name for name, _ in model.named_parameters()]
    return next(n for n in parameters if n.removeprefix("base_model.model.").replace(".base_layer", "") == key)


@pytest.mark.parametrize("merged", [False, True])
def test_folders_hold_it(tmp_path, merged):
    model = adapted(config(hira_alpha=16))
    y = model(IDS)
    if merged:
        model.merge_adapter()
    model.save_pretrained(tmp_path)
    folder = tmp_path / "0"
    saved = json.loads((folder / "adapter_config.json").read_text())
    assert (saved["peft_type"], saved["r"], saved["lora_r"]) == ("HILORA", 2, 3)
    keys = load_file(folder / "adapter_model.safetensors")
    assert sum(key.endswith((".hira_lora_A", ".hira_lora_B")) for key in keys) == 2 * LAYERS
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Net().double(), folder, autocast_adapter_dtype=False).eval()
    again.base_model.model.load_state_dict(wrapped(model, again), strict=False)
    torch.testing.assert_close(again(IDS), y)
    assert again.peft_config["default"].lora_r == 3
    assert any(layer.lora_scale["default"] != 1 for layer in hira_layers(again))


def wrapped(model: Any, like: Any) -> dict[str, Tensor]:
    state = {f"base_model.model.{key}": value for key, value in base_state(model).items()}
    names = {key.replace(".base_layer", ""): key for key in like.state_dict() if "hira_" not in key}
    return {names[key].removeprefix("base_model.model."): value for key, value in state.items()}


def test_stock_peft_refuses_the_folder(tmp_path):
    adapted().save_pretrained(tmp_path)
    with stock_peft(), pytest.raises(KeyError, match="HILORA"):
        PeftModel.from_pretrained(Net(), tmp_path / "0")


def llama_adapted(*configs: HiraConfig, **options: Any) -> Any:
    torch.manual_seed(0)
    model = llama(**options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    for i, each in enumerate(configs):
        model = get_peft_model(model, each, adapter_name="0") if i == 0 else model
        if i:
            model.add_adapter(str(i), each)
    return model.eval()


def of_llama(r: int = 2, lora_r: int = 3, **options: Any) -> HiraConfig:
    targets = {"target_modules": ["q_proj", "down_proj", "embed_tokens"]}
    return HiraConfig(r=r, lora_r=lora_r, init_weights=False, **{**targets, **options})


def test_transformers_loads_the_folder_itself(tmp_path):
    model = llama_adapted(of_llama(hira_alpha=16))
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = model(IDS).logits
        plain = llama_adapted()
        plain.load_adapter(tmp_path / "0")
        torch.testing.assert_close(plain(IDS).logits, wanted, rtol=1e-4, atol=1e-5)


def test_rows_of_a_batch_have_an_adapter_each():
    model = llama_adapted(of_llama(), of_llama(4, 0), of_llama(1, 2))
    names = ["1", "0", "__base__", "2"]
    for ids in (torch.randint(3, 40, (4, 5)), torch.randint(3, 40, (4, 1))):
        with torch.no_grad():
            found = model(ids, adapter_names=names).logits
            for row, name in enumerate(names):
                if name == "__base__":
                    with model.disable_adapter():
                        wanted = model(ids[row : row + 1]).logits
                else:
                    model.set_adapter(name)
                    wanted = model(ids[row : row + 1]).logits
                torch.testing.assert_close(found[row : row + 1], wanted, rtol=1e-4, atol=1e-5)


def test_generation_keeps_the_weight_of_both_parts():
    model = llama_adapted(of_llama())
    ids = torch.randint(3, 40, (1, 4))
    kept = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    model.merge_adapter()
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=6, do_sample=False), kept)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_bases(bits, tmp_path):
    torch.manual_seed(0)
    model = llama()
    model.save_pretrained(tmp_path / "base")
    options = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32} if bits == 4 else {"load_in_8bit": True}
    quantised = LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=BitsAndBytesConfig(**options))
    targets = {"target_modules": ["q_proj", "down_proj"]}
    model = get_peft_model(quantised, of_llama(**targets)).eval()
    layer = next(layer for layer in hira_layers(model))
    x = torch.randn(3, layer.in_features)
    A, B, L1, L2 = (factors["default"] for factors in layer.factor_dicts("default"))
    with torch.no_grad():
        W0 = layer.storage.read()
        wanted = layer.get_base_layer()(x) + x @ (W0 * (B @ A) + L2 @ L1).t()
        torch.testing.assert_close(layer(x), wanted.to(layer(x).dtype), rtol=1e-3, atol=1e-4)
    x.requires_grad_()
    layer(x).square().sum().backward()
    assert all(bool(factors["default"].grad.any()) for factors in layer.factor_dicts("default"))


def test_adapters_are_copied_started_again_pickled_and_deleted():
    model = adapted(config(), config(1, 0))
    for layer in hira_layers(model):
        if not isinstance(layer, hira.ParamWrapper):
            layer.copy_adapter("0", "1")
            assert (layer.r["1"], layer.lora_r["1"]) == (2, 3)
            for factors in layer.factor_dicts("0"):
                assert torch.equal(factors["0"], factors["1"])
            layer.copy_adapter("0", "1")
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(IDS), model(IDS))
    for layer in hira_layers(model):
        layer.reset_hira_parameters("0", True)
    model.set_adapter("0")
    with model.disable_adapter():
        y = model(IDS)
    torch.testing.assert_close(model(IDS), y)
    model.delete_adapter("0")
    assert not any(".0" in name for name, _ in model.named_parameters() if "hira_lora" in name)


@pytest.mark.parametrize("value", [-1, 1.5, True, "8", None])
def test_a_bad_rank_is_refused(value):
    with pytest.raises(HiraError, match="lora_r"):
        HiraConfig(r=4, lora_r=value)


def test_a_state_dict_without_its_lora_is_refused():
    model = adapted()
    state = {k: v for k, v in get_peft_model_state_dict(model, adapter_name="0").items() if "hira_lora_A" not in k}
    with pytest.raises(HiraError, match=r"hira_lora_A.* is missing"):
        set_peft_model_state_dict(model, state, "0")


# Folders


def saved(tmp_path: Path, **options: Any) -> tuple[Any, Path, Path]:
    """A Llama with an adapter, its folder, and the adapter's."""
    model = llama_adapted(of_llama(**options))
    model.save_pretrained(tmp_path / "adapter")
    model.unload().save_pretrained(tmp_path / "base")
    return llama_adapted(of_llama(**options)), tmp_path / "base", tmp_path / "adapter" / "0"


def test_inspection_measures_the_whole_update(tmp_path):
    model, base, folder = saved(tmp_path)
    report = inspect_adapter(folder, base)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, hira.HiraLayer)}
    assert len(report.layers) == len(layers)
    for row in report.layers:
        layer = layers[f"base_model.model.{row.name}"]
        A, B, L1, L2 = (factors["0"].double() for factors in layer.factor_dicts("0"))
        W0 = layer.get_base_layer().weight.double()
        BA, LL = delta(layer, A, B), delta(layer, L1, L2)
        update = W0 * BA + LL
        assert (row.rank, row.lora_rank) == (2, 3)
        assert row.parameters == sum(factor.numel() for factor in (A, B, L1, L2))
        assert row.delta_norm == pytest.approx(float(BA.norm()), rel=1e-5)
        assert row.update_norm == pytest.approx(float(update.norm()), rel=1e-5)
        assert row.update.values[0] == pytest.approx(float(torch.linalg.svdvals(update)[0]), rel=1e-5)
    assert "rank 2 with LoRA of rank 3" in next(in_words(report))


def test_conversion_to_lora_approximates_the_whole_update(tmp_path):
    model, base, folder = saved(tmp_path, target_modules=["q_proj", "down_proj"])
    conversion = convert_adapter(folder, tmp_path / "lora", to="lora", rank=24, base=base)
    assert conversion.lora is not None
    assert conversion.lora.relative_error < 1e-5
    lora = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path / "lora").eval()
    with torch.no_grad():
        torch.testing.assert_close(lora(IDS).logits, model(IDS).logits, rtol=1e-3, atol=1e-3)


def test_folding_for_peft_is_refused(tmp_path):
    _, _, folder = saved(tmp_path)
    with pytest.raises(HiraError, match="lora_r"):
        convert_adapter(folder, tmp_path / "folded", fold=True)
    assert not (tmp_path / "folded").exists()


def test_type_and_tensors_have_to_agree(tmp_path):
    _, base, folder = saved(tmp_path)
    path = folder / "adapter_config.json"
    path.write_text(path.read_text().replace("HILORA", "HIRA"))
    with pytest.raises(HiraError, match="peft_type 'HIRA', but the tensors have a LoRA"):
        merge_checkpoint(base, [folder], tmp_path / "out")
