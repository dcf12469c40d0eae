"""ensure_weight_tying and layer_replication: adapters of layers that share a base weight."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from small_models import CLOSE, llama
from stock_peft import stock_peft
from tied_models import IDS, every_case, logits
from torch import Tensor

import hira
from hira import HiraConfig, HiraError
from hira.tuner.model import hira_layers

pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")


def config(*targets: str, **options: Any) -> HiraConfig:
    return HiraConfig(**{"r": 2, "target_modules": list(targets), "ensure_weight_tying": True, **options})


def trained(model: Any, steps: int = 3) -> Any:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        decoder = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
        model(input_ids=IDS, **decoder).logits.square().mean().backward()
        optimizer.step()
    return model.eval()


def tied_llama(**options: Any) -> Any:
    return llama(tie_word_embeddings=True, **options)


def W(layer: Any) -> Tensor:
    """W' of an embedding or a linear layer, (vocabulary, width)."""
    with torch.no_grad():
        return layer._effective_weight(layer.storage.read(), *layer._factors(["default"]))


# Tied embeddings


@every_case
def test_layers_of_one_weight_keep_one(make, tied, targets, tmp_path):
    """Whichever is targeted: one A and B, one W', after training, saving, loading, merging and in stock PEFT."""
    torch.manual_seed(0)
    base = make().eval()
    model = get_peft_model(copy.deepcopy(base), config(*targets, hira_alpha=4))
    layers = [model.get_base_model().get_submodule(name) for name in tied]
    assert set(layers) <= set(hira_layers(model))
    assert model.get_model_status().available_adapters == model.get_model_status().active_adapters == ["default"]
    assert sum(p.requires_grad for p in model.parameters()) == 2
    y = logits(trained(model))
    assert not torch.equal(y, logits(base))
    assert all(torch.equal(W(layers[0]), W(layer)) for layer in layers)
    model.save_pretrained(tmp_path)
    found = load_file(tmp_path / "adapter_model.safetensors")
    assert sum("hira_" in key for key in found) == 2 * len(hira_layers(model))
    lean = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(lean.eval()), y)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert torch.equal(logits(again.eval()), y)
    assert sum(p.requires_grad for p in again.parameters()) == 2
    with stock_peft(), pytest.warns(UserWarning, match="ensure_weight_tying"):
        torch.testing.assert_close(logits(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()), y, **CLOSE)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), y, **CLOSE)
    model.unmerge_adapter()
    assert torch.equal(logits(model), y)
    again.merge_adapter()
    for merged in (model.merge_and_unload(), again.merge_and_unload()):
        torch.testing.assert_close(logits(merged), y, **CLOSE)
        assert merged.get_submodule(tied[0]).weight is merged.get_submodule(tied[-1]).weight
        assert merged.config.tie_word_embeddings


def test_the_gradient_is_that_of_both_uses():
    """PEFT's LoRA has two parameters in one memory instead, of which each gets a part."""
    model = get_peft_model(tied_llama(), config("embed_tokens", init_weights=False)).double()
    apart = get_peft_model(tied_llama(), HiraConfig(r=2, target_modules=r".*(embed_tokens|lm_head)")).double()
    table = model.get_base_model().model.embed_tokens
    with torch.no_grad():
        for source, target in (
            (table, apart.get_base_model().model.embed_tokens),
            (table, apart.get_base_model().lm_head),
        ):
            A, B = source.hira_embedding_A["default"], source.hira_embedding_B["default"]
            transposed = not isinstance(target, hira.Embedding)
            for new, old in zip(target._factor_dicts, (B.t(), A.t()) if transposed else (A, B), strict=True):
                new["default"].copy_(old)
    for each in (model, apart):
        each(input_ids=IDS).logits.square().mean().backward()
    other, head = apart.get_base_model().model.embed_tokens, apart.get_base_model().lm_head
    for found, first, second in (
        (table.hira_embedding_A, other.hira_embedding_A, head.hira_B),
        (table.hira_embedding_B, other.hira_embedding_B, head.hira_A),
    ):
        torch.testing.assert_close(found["default"].grad, first["default"].grad + second["default"].grad.t())


def test_they_stay_tied_when_the_model_is_cast_copied_or_pickled():
    model = trained(get_peft_model(tied_llama(), config("embed_tokens")))
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).double()):
        assert sum(p.requires_grad for p in again.parameters()) == 2
        again = trained(again)
        assert torch.equal(W(again.get_base_model().model.embed_tokens), W(again.get_base_model().lm_head))
    model.get_base_model().to(torch.bfloat16)
    assert logits(model).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens", "q_proj"], "r": 1},
        {"target_modules": ["q_proj"], "trainable_token_indices": [5, 9]},
        {"target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 3]], "ensure_weight_tying": False},
        {
            "target_modules": ["q_proj"],
            "alpha_pattern": {"q_proj": 2},
            "use_rslora": True,
            "ensure_weight_tying": False,
        },
    ],
    ids=lambda options: list(options)[-1],
)
def test_transformers_own_functions(options, tmp_path):
    cfg = HiraConfig(**{"r": 2, "ensure_weight_tying": True, "hira_alpha": 8, "init_weights": False, **options})
    model = get_peft_model(tied_llama(), cfg).eval()
    y = logits(model)
    model.save_pretrained(tmp_path / "one")
    model = tied_llama()
    model.load_adapter(tmp_path / "one")
    torch.testing.assert_close(logits(model), y, **CLOSE)
    if "embed_tokens" not in options["target_modules"]:  # transformers refuses to save both base weights that PEFT adds
        model.save_pretrained(tmp_path / "two")
        torch.testing.assert_close(logits(PeftModel.from_pretrained(tied_llama(), tmp_path / "two")), y, **CLOSE)


def test_generation_keeps_the_heads_weight():
    model = trained(get_peft_model(tied_llama(), config("embed_tokens")))
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    tokens = model.generate(input_ids=IDS, **options)
    for i in range(IDS.shape[1], tokens.shape[1]):
        with torch.no_grad():
            assert model(input_ids=tokens[:, :i]).logits[0, -1].argmax() == tokens[0, i]


def test_several_adapters():
    model = trained(get_peft_model(tied_llama(), config("embed_tokens")))
    y = logits(model)
    model.add_adapter("own", HiraConfig(r=3, target_modules=["lm_head"], init_weights=False))
    model.add_weighted_adapter(["default", "own"], [1.0, 1.0], "sum", "cat")
    model.base_model.set_adapter(["default", "own"])
    both = logits(model)
    model.set_adapter("sum")
    torch.testing.assert_close(logits(model), both, **CLOSE)
    assert not model.get_base_model().lm_head.tied_to.keys() & {"sum"}
    model.set_adapter("own")
    model.delete_adapter("default")
    assert not model.get_base_model().lm_head.tied_to
    model.set_adapter("sum")
    torch.testing.assert_close(logits(model), both, **CLOSE)
    assert not torch.equal(both, y)


def test_merged_files_are_the_merged_model(tmp_path):
    base = tied_llama()
    base.save_pretrained(tmp_path / "base")
    model = trained(get_peft_model(base, config("embed_tokens", "q_proj")))
    model.save_pretrained(tmp_path / "adapter")
    hira.merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    again = type(base).from_pretrained(tmp_path / "merged")
    merged = model.merge_and_unload().state_dict()
    assert all(torch.equal(value, merged[key]) for key, value in again.state_dict().items())
    hira.convert_adapter(tmp_path / "adapter", tmp_path / "folded", fold=True)
    with stock_peft():
        theirs = PeftModel.from_pretrained(type(base).from_pretrained(tmp_path / "base"), tmp_path / "folded")
        torch.testing.assert_close(logits(theirs), logits(again), **CLOSE)
    options = {"to": "lora", "rank": 16, "base": tmp_path / "base"}
    hira.convert_adapter(tmp_path / "adapter", tmp_path / "lora", **options)
    lora = PeftModel.from_pretrained(type(base).from_pretrained(tmp_path / "base"), tmp_path / "lora")
    torch.testing.assert_close(logits(lora), logits(again), **CLOSE)


def test_saved_modules_are_tied(tmp_path):
    base = tied_llama()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, config("q_proj", modules_to_save=["lm_head"]))
    saved = [p for name, p in model.named_parameters() if "modules_to_save" in name]
    assert len(saved) == 1
    y = logits(trained(model))
    head, table = model.get_base_model().lm_head, model.get_base_model().model.embed_tokens
    assert head.modules_to_save["default"].weight is table.modules_to_save["default"].weight
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(tied_llama(), tmp_path / "adapter")
    assert torch.equal(logits(again), y)
    hira.merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    torch.testing.assert_close(logits(type(base).from_pretrained(tmp_path / "merged")), y, **CLOSE)
    with pytest.raises(HiraError, match="ensure_weight_tying"):
        hira.convert_adapter(tmp_path / "adapter", tmp_path / "folded", fold=True)
    options = {"to": "lora", "rank": 16, "base": tmp_path / "base"}
    hira.convert_adapter(tmp_path / "adapter", tmp_path / "lora", **options)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(tied_llama(), tmp_path / "lora")), y, **CLOSE)


def test_a_checkpoint_of_layers_apart_is_refused(tmp_path):
    apart = get_peft_model(tied_llama(), config("embed_tokens", "lm_head", ensure_weight_tying=False))
    trained(apart).save_pretrained(tmp_path)
    peft_config = peft.PeftConfig.from_pretrained(tmp_path)
    peft_config.ensure_weight_tying = True
    with pytest.raises(HiraError, match=r"lm_head\.hira_A.*ensure_weight_tying"):
        PeftModel.from_pretrained(tied_llama(), tmp_path, config=peft_config)


def test_what_cannot_be_tied():
    with pytest.raises(HiraError, match="ensure_weight_tying needs an adapter on the input embedding"):
        get_peft_model(tied_llama(), config("lm_head", exclude_modules=["embed_tokens"]))
    with pytest.warns(UserWarning, match="no tied modules were found"):
        get_peft_model(llama(), config("embed_tokens"))
    model = get_peft_model(tied_llama(), HiraConfig(ensure_weight_tying=True, modules_to_save=["lm_head"]))
    assert {layer.name.rpartition(".")[2] for layer in hira_layers(model)} == {"q_proj", "v_proj"}
    with pytest.warns(UserWarning, match="ensure_weight_tying is set, but none of model.embed_tokens, lm_head"):
        get_peft_model(tied_llama(), config("q_proj"))
    with pytest.raises(HiraError, match="ensure_weight_tying is not for mixed models"):
        get_peft_model(tied_llama(), config("embed_tokens"), mixed=True)


# Replicated layers


RANGES = [[0, 2], [1, 3]]


def replicated(**options: Any) -> Any:
    return HiraConfig(**{"r": 2, "target_modules": ["q_proj", "down_proj"], "layer_replication": RANGES, **options})


def stacked(base: Any) -> Any:
    """A model that has the layers of another in the order of RANGES, as modules of their own."""
    model = copy.deepcopy(base)
    layers = [copy.deepcopy(base.model.layers[i]) for start, end in RANGES for i in range(start, end)]
    for i, layer in enumerate(layers):
        layer.self_attn.layer_idx = i
    model.model.layers = torch.nn.ModuleList(layers)
    model.config.num_hidden_layers = len(layers)
    return model


def test_each_layer_has_an_adapter_and_weights_are_shared(tmp_path):
    base = llama()
    model = get_peft_model(copy.deepcopy(base), replicated(init_weights=False))
    layers = model.get_base_model().model.layers
    assert len(layers) == model.config.num_hidden_layers == 4
    assert layers[1].self_attn.q_proj.weight is layers[2].self_attn.q_proj.weight
    plain = get_peft_model(stacked(base), replicated(layer_replication=None))
    peft.set_peft_model_state_dict(plain, peft.get_peft_model_state_dict(model))
    y = logits(model)
    assert torch.equal(logits(plain), y)
    trained(model)
    y = logits(model)
    model.save_pretrained(tmp_path)
    for lean in (False, True):
        again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=lean)
        assert torch.equal(logits(again), y)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), y, **CLOSE)
    model.unmerge_adapter()
    assert torch.equal(logits(model), y)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), y, **CLOSE)


def test_the_layers_are_those_of_lora():
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], layer_replication=RANGES)
    models = [get_peft_model(llama(), cfg) for cfg in (lora, replicated())]
    names = [
        {n for n, p in m.get_base_model().named_parameters(remove_duplicate=False) if "ra_" not in n} for m in models
    ]
    assert names[0] == names[1]
    torch.testing.assert_close(logits(models[0]), logits(models[1]))


def test_adapters_of_a_model_have_the_same_replication():
    model = get_peft_model(llama(), replicated())
    y = logits(model)
    model.add_adapter("other", replicated())
    assert len(model.get_base_model().model.layers) == 4
    for name, options in (("third", {"layer_replication": [[0, 1]]}), ("fourth", {"layer_replication": None})):
        with pytest.raises(HiraError, match=r"layer_replication.*'default'"):
            model.add_adapter(name, replicated(**options))
    assert torch.equal(logits(model), y)
    model.delete_adapter("default")
    model.delete_adapter("other")
    model.add_adapter("again", replicated())
    assert len(model.base_model.model.model.layers) == 4
    plain = get_peft_model(llama(), replicated(layer_replication=None))
    with pytest.raises(HiraError, match="layer_replication"):
        plain.add_adapter("other", replicated())


@pytest.mark.parametrize(
    ("options", "mentioned"),
    [({"layer_replication": [[0, 9]]}, "layer_replication"), ({"target_modules": ["absent"]}, "absent")],
)
def test_an_error_leaves_the_model_as_it_was(options, mentioned):
    model = llama()
    y, layers = logits(model), list(model.model.layers)
    with pytest.raises(ValueError, match=mentioned):
        get_peft_model(model, replicated(**options))
    assert list(model.model.layers) == layers
    assert model.config.num_hidden_layers == 3
    assert torch.equal(logits(model), y)


def test_models_without_layers():
    with pytest.raises(HiraError, match="layer_replication"):
        get_peft_model(torch.nn.Sequential(torch.nn.Linear(3, 3)), replicated(target_modules=["0"]))


@pytest.mark.parametrize("ranges", [RANGES, [[0, 1], [0, 2]]], ids=str)
def test_file_commands_refuse_it_by_name(ranges, tmp_path):
    """With three layers again too, whose names are all there."""
    llama().save_pretrained(tmp_path / "base")
    get_peft_model(llama(), replicated(layer_replication=ranges)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(HiraError, match="layer_replication"):
        hira.merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    with pytest.raises(HiraError, match="layer_replication"):
        hira.inspect_adapter(tmp_path / "adapter", tmp_path / "base")
    with pytest.raises(HiraError, match="layer_replication"):
        hira.convert_adapter(tmp_path / "adapter", tmp_path / "lora", to="lora", rank=2, base=tmp_path / "base")
    with pytest.raises(HiraError, match="layer_replication"):
        hira.convert_adapter(tmp_path / "adapter", tmp_path / "folded", fold=True)
    assert len(hira.inspect_adapter(tmp_path / "adapter").layers) == 2 * sum(end - start for start, end in ranges)
