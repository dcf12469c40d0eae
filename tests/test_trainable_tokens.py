"""trainable_token_indices: rows of embeddings that train whole beside HiRA, as beside LoRA."""

from __future__ import annotations

import copy
import types
from typing import Any

import peft
import pytest
import tied_models
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from small_models import CLOSE, llama
from stock_peft import stock_peft
from tied_models import IDS
from torch import Tensor

import hira
from hira import HiraConfig, HiraError

TOKENS = [5, 9, 20]  # of which IDS has two
ties = pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])


def config(**options: Any) -> HiraConfig:
    given = {"r": 2, "target_modules": ["q_proj", "down_proj"], "trainable_token_indices": TOKENS, "hira_alpha": 8}
    return HiraConfig(**{**given, **options})


def logits(model: Any, ids: Tensor = IDS, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **options).logits


def trained(model: Any) -> Any:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    return model.eval()


def table(model: Any) -> Tensor:
    return model.get_input_embeddings().weight.detach()


@ties
def test_rows_train_are_saved_loaded_and_merged(tie, tmp_path):
    base = llama(tie_word_embeddings=tie)
    W0 = table(base).clone()
    model = get_peft_model(copy.deepcopy(base), config())
    torch.testing.assert_close(logits(model), logits(base))
    y = logits(trained(model))
    moved = (table(model) != W0).any(1).nonzero().flatten().tolist()
    assert moved == ([5, 9, 20] if tie else [5, 9])  # the head is trained on each of its rows
    model.save_pretrained(tmp_path)
    found = load_file(tmp_path / "adapter_model.safetensors")
    key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    assert {name for name in found if "hira_" not in name} == {key}
    assert torch.equal(found[key], table(model)[TOKENS])
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert again.peft_config["default"].trainable_token_indices == TOKENS
    assert torch.equal(logits(again), y)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    model.merge_adapter()
    torch.testing.assert_close(logits(model), y, **CLOSE)
    model.unmerge_adapter()
    assert torch.equal(logits(model), y)
    merged = model.merge_and_unload()
    assert type(merged.get_input_embeddings()) is torch.nn.Embedding
    torch.testing.assert_close(logits(merged), y, **CLOSE)
    assert merged.config.tie_word_embeddings == tie
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tie


@ties
def test_the_numbers_are_those_of_peft_beside_lora(tie):
    """Both adapters start from W0, so the first gradients of the rows are the same."""
    gradients = []
    for cfg in (config(), peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], trainable_token_indices=TOKENS)):
        model = get_peft_model(llama(tie_word_embeddings=tie), cfg)
        model(input_ids=IDS, labels=IDS).loss.backward()
        (rows,) = [p for name, p in model.named_parameters() if "trainable_tokens_delta" in name]
        gradients.append(rows.grad)
    torch.testing.assert_close(*gradients)


def test_rows_of_named_layers():
    """A dict names layers by the ends of their names, a list is of the input embedding."""
    model = get_peft_model(llama(), config(trainable_token_indices={"embed_tokens": [1], "lm_head": [2, 3]}))
    shapes = {n.split(".token")[0].rsplit(".")[-1]: len(p) for n, p in model.named_parameters() if "tokens_delta" in n}
    assert shapes == {"embed_tokens": 1, "lm_head": 2}


def test_mixed_batches_have_the_rows_of_each_adapter():
    model = trained(get_peft_model(llama(), config()))
    model.add_adapter("other", config(trainable_token_indices=[1, 3]))
    model.set_adapter("other")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "other" in name:
                parameter.add_(0.1)
    found = logits(model, IDS.repeat(3, 1), adapter_names=["default", "__base__", "other"])
    wanted = [logits(model)]
    model.set_adapter("default")
    with model.disable_adapter():
        wanted.insert(0, logits(model))
    wanted.insert(0, logits(model))
    torch.testing.assert_close(found, torch.cat(wanted), **CLOSE)


def test_stock_peft_names_what_it_leaves_out(tmp_path):
    trained(get_peft_model(llama(), config())).save_pretrained(tmp_path)
    with stock_peft(), pytest.warns(UserWarning, match="trainable_token_indices"):
        PeftModel.from_pretrained(llama(), tmp_path)


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], r".*(lm_head|q_proj)"], ids=str)
def test_a_layer_that_hira_adapts_is_refused_by_name(targets):
    model = llama(tie_word_embeddings=True)
    names = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(HiraError, match=r"trainable_token_indices.*(embed_tokens|lm_head)"):
        get_peft_model(model, config(target_modules=targets))
    assert {name: type(module) for name, module in model.named_modules()} == names
    model = get_peft_model(model, config(target_modules=targets, trainable_token_indices=None))
    with pytest.raises(HiraError, match=r"trainable_token_indices.*(embed_tokens|lm_head)"):
        model.add_adapter("other", config(target_modules=["v_proj"]))


def test_modules_by_default():
    """PEFT chooses those of the architecture."""
    model = get_peft_model(llama(tie_word_embeddings=True), config(target_modules=None, ensure_weight_tying=True))
    y = logits(trained(model))
    torch.testing.assert_close(logits(model.merge_and_unload()), y, **CLOSE)


def test_an_untied_head_may_be_a_target():
    model = get_peft_model(llama(), config(target_modules=["lm_head"]))
    y = logits(trained(model))
    torch.testing.assert_close(logits(model.merge_and_unload()), y, **CLOSE)


def test_a_token_that_is_not_there():
    with pytest.raises(HiraError, match=r"trainable_token_indices has 48 .* 48 rows: .*resize_token_embeddings"):
        get_peft_model(llama(), config(trainable_token_indices=[1, 48]))


def test_what_has_no_weighted_sum():
    model = get_peft_model(llama(), config())
    with pytest.raises(HiraError, match="trainable_token_indices"):
        model.add_weighted_adapter(["default"], [1.0], "sum", "cat")


def test_trls_reference_adapter_has_the_rows():
    """TRL adds an adapter with the configuration of the one that trains, and copies names with ".default." in them."""
    model = trained(get_peft_model(llama(tie_word_embeddings=True), config()))
    y, trainer = logits(model), types.ModuleType("trl.trainer")
    exec("def add_reference(model, config): model.add_adapter('ref', config)", vars(trainer))
    trainer.add_reference(model, model.peft_config["default"])
    model.set_adapter("ref")
    assert torch.equal(logits(model.eval()), y)


def test_mixed_models_are_refused():
    with pytest.raises(HiraError, match="trainable_token_indices"):
        get_peft_model(llama(), config(), mixed=True)


def test_file_commands(tmp_path):
    """`hira inspect` looks at HiRA's layers, a LoRA has the rows too, and what would lose them says so."""
    base = tied_models.llama()
    base.save_pretrained(tmp_path / "base")
    model = trained(get_peft_model(base, config(r=8, trainable_token_indices=[5, 9])))
    y = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    report = hira.inspect_adapter(tmp_path / "adapter", tmp_path / "base")
    assert len(report.layers) == 2
    with pytest.raises(HiraError, match="trainable_token_indices"):
        hira.merge_checkpoint(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    with pytest.raises(HiraError, match="trainable_token_indices"):
        hira.convert_adapter(tmp_path / "adapter", tmp_path / "folded", fold=True)
    options = {"to": "lora", "rank": 8, "base": tmp_path / "base"}
    hira.convert_adapter(tmp_path / "adapter", tmp_path / "lora", **options)
    again = type(base).from_pretrained(tmp_path / "base")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(again, tmp_path / "lora")), y, **CLOSE)
