"""HiraModel on whole models: what is adapted, with which ranks, and several adapters side by side."""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import torch
from peft import get_peft_model
from small_models import CLOSE, adapted, bert, config, llama
from stock_peft import stock_peft
from torch import Tensor, nn
from transformers import (
    OPTConfig,
    OPTForCausalLM,
)

import hira
from hira import HiraError

IDS = torch.tensor([[1, 5, 9, 13], [1, 6, 7, 8], [1, 40, 30, 20]])


def several(model: nn.Module | None = None) -> peft.PeftModel:
    """Adapters first and second, on different modules, of different ranks."""
    model = get_peft_model(llama() if model is None else model, config(r=2), adapter_name="first")
    model.add_adapter("second", config(r=3, target_modules=["q_proj", "up_proj"]))
    return model.eval()


def logits(model: nn.Module, ids: Tensor = IDS, **options) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **options).logits


@pytest.mark.parametrize("place", [peft, hira], ids=["peft", "hira"])
def test_the_documented_example(place, capsys):
    base_model = OPTForCausalLM(OPTConfig())
    hira_config = place.HiraConfig(
        r=32, target_modules=["k_proj", "q_proj", "v_proj", "fc1", "fc2"], hira_dropout=0.0, init_weights=True
    )
    peft_model = get_peft_model(base_model, hira_config)
    capsys.readouterr()
    peft_model.print_trainable_parameters()
    expected = "trainable params: 4,718,592 || all params: 129,957,888 || trainable%: 3.6309\n"
    assert capsys.readouterr().out == expected
    assert {type(layer) for layer in adapted(peft_model).values()} == {hira.Linear}
    assert type(peft_model.base_model) is hira.HiraModel


def test_the_first_adapter_gets_its_rank_pattern():
    """Row 1 of the peer's faults: PEFT gives the first adapter rank r everywhere."""
    pattern = {"q_proj": 2, r"model\.layers\.[12]\.mlp\.down_proj": 1}
    with stock_peft():
        stock = get_peft_model(llama(), config(rank_pattern=pattern))
        assert stock.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").r == {"default": 4}
    ranks = {
        "model.layers.0.self_attn.q_proj": 2,
        "model.layers.1.self_attn.q_proj": 2,
        "model.layers.2.self_attn.q_proj": 2,
        "model.layers.0.mlp.down_proj": 4,
        "model.layers.1.mlp.down_proj": 1,
        "model.layers.2.mlp.down_proj": 1,
    }
    model = get_peft_model(llama(), config(rank_pattern=pattern), adapter_name="first")
    model.add_adapter("second", config(rank_pattern=pattern))
    for name, layer in adapted(model).items():
        for adapter in ("first", "second"):
            assert layer.r[adapter] == ranks[name]
            assert layer.hira_A[adapter].shape[0] == layer.hira_B[adapter].shape[1] == ranks[name]
    assert set(adapted(model)) == set(ranks)


def test_a_start_that_changes_nothing():
    model = llama()
    before = logits(model)
    model = get_peft_model(model, config(target_modules=["q_proj", "embed_tokens"], init_weights=True))
    assert torch.equal(logits(model), before)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all("hira_" in name for name in trainable)


def test_modules_to_save_train_and_travel(tmp_path):
    model = get_peft_model(bert(), config(target_modules=["query"], modules_to_save=["classifier"]))
    classifier = model.base_model.model.classifier
    assert classifier.modules_to_save["default"].weight.requires_grad
    assert not classifier.original_module.weight.requires_grad
    nn.init.normal_(classifier.modules_to_save["default"].weight)
    before = logits(model)
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    fresh = bert()
    fresh.load_state_dict(model.unload().state_dict(), strict=False)
    fresh.classifier.weight.data.zero_()
    assert torch.equal(logits(peft.PeftModel.from_pretrained(fresh, tmp_path)), before)


def test_switch_disable_and_delete():
    model = several()
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"first"}
    model.set_adapter("first")
    y_1 = logits(model)
    model.set_adapter("second")
    y_2 = logits(model)
    with model.disable_adapter():
        y_0 = logits(model)
    assert torch.equal(y_0, logits(llama()))
    assert not any(torch.allclose(some, other) for some, other in [(y_1, y_2), (y_1, y_0), (y_2, y_0)])
    model.set_adapter("first")
    assert torch.equal(logits(model), y_1)
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"first"}
    model.delete_adapter("second")
    assert torch.equal(logits(model), y_1)
    assert not [name for name in model.state_dict() if name.endswith(".second")]
    assert all("second" not in layer.r and "second" not in layer.hira_dropout for layer in adapted(model).values())
    model.add_adapter("second", config(r=5))
    assert {layer.r["second"] for name, layer in adapted(model).items() if "up_proj" not in name} == {5}
    assert torch.equal(logits(model), y_1)


def test_two_active_adapters_add_up():
    model = several()
    model.base_model.set_adapter(["first", "second"])
    y = logits(model)
    base = llama()
    for name, layer in adapted(model).items():
        delta = sum(layer.get_delta_weight(adapter) for adapter in ("first", "second") if adapter in layer.hira_A)
        base.get_submodule(name).weight.data *= 1 + delta.detach()
    torch.testing.assert_close(y, logits(base), **CLOSE)


@pytest.mark.parametrize("names", [["first"], ["second"], ["first", "second"]], ids="-".join)
def test_merge_some_or_all(names):
    model = several()
    model.base_model.set_adapter(names)
    y = logits(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.merge_adapter(names)
    assert {name for layer in adapted(model).values() for name in layer.merged_adapters} == set(names)
    torch.testing.assert_close(logits(model), y, **CLOSE)
    model.unmerge_adapter()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(logits(model.merge_and_unload(adapter_names=names)), y, **CLOSE)


def test_deepcopy_is_independent():
    model = several()
    y = logits(model)
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), y)
    for layer in adapted(copied).values():
        layer.hira_B["first"].data.zero_() if "first" in layer.hira_B else None
    assert torch.equal(logits(copied), logits(llama()))
    assert torch.equal(logits(model), y)


def test_deepcopy_and_pickle_of_a_merged_model():
    model = several()
    y = logits(model)
    model.merge_adapter()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(logits(copied), y, **CLOSE)
        copied.unmerge_adapter()
        assert torch.equal(logits(copied), y)


def test_pickle(tmp_path):
    model = several()
    y = logits(model)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), y)
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(logits(torch.load(tmp_path / "model.pt", weights_only=False)), y)


def test_tied_weights_are_adapted_merged_and_restored():
    """Row 9 of the peer's faults: a merge of the embedding changes the output layer that shares its weight."""

    def tied(scale: float = 1.0) -> peft.PeftModel:
        model = get_peft_model(llama(tie_word_embeddings=True), config(target_modules=["embed_tokens"]))
        layer = model.base_model.model.model.embed_tokens
        torch.nn.init.normal_(layer.hira_embedding_A["default"], std=scale)
        return model.eval()

    with stock_peft():
        stock = tied()
        y = logits(stock)
        stock.merge_adapter()
        assert not torch.allclose(logits(stock), y, **CLOSE)
    model = tied()
    y = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), y, **CLOSE)
    model.unmerge_adapter()
    assert torch.equal(logits(model), y)
    base = model.base_model.model
    assert base.lm_head.weight is base.model.embed_tokens.base_layer.weight
    torch.testing.assert_close(logits(model.merge_and_unload()), y, **CLOSE)


def attention_model():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x)[0]

    base, x = Model(), torch.randn(2, 3, 8)
    before = base(x).detach()
    model = get_peft_model(base, hira.HiraConfig(r=2, target_modules=["out_proj"], init_weights=False)).eval()
    return model, x, before


def test_disabling_while_merged_reaches_weights_that_are_read():
    model, x, before = attention_model()
    assert not torch.allclose(model(x), before, atol=1e-3)
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(model(x), before)


def test_a_mixed_batch_is_refused_where_one_weight_serves_all_rows():
    model, x, _ = attention_model()
    with pytest.raises(HiraError, match=r"attention\.out_proj"):
        model(x, adapter_names=["__base__", "default"])
    torch.testing.assert_close(model(x, adapter_names=["default", "default"]), model(x))


def test_the_fast_path_of_torchs_encoder_multiplies_by_the_adapted_weights():
    base, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0), torch.randn(2, 3, 8)
    before = base.eval()(x).detach()
    model = get_peft_model(base, hira.HiraConfig(r=2, target_modules=["linear1", "linear2"], init_weights=False))
    slow = model.train()(x).detach()
    assert not torch.allclose(slow, before, atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), slow, rtol=1e-4, atol=1e-5)


def test_a_diffusers_model():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    unet = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=2, attention_head_dim=4, **blocks
    ).eval()
    sample = torch.randn(1, 3, 8, 8)
    before = unet(sample, 1).sample
    model = get_peft_model(unet, hira.HiraConfig(r=2, target_modules=["to_q", "to_v"], init_weights=False))
    expected = model(sample, 1).sample
    assert not torch.allclose(expected, before)
    torch.testing.assert_close(model.merge_and_unload()(sample, 1).sample, expected, **CLOSE)
