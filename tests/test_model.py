"""HiraModel on whole models: what is adapted, with which ranks, and several adapters side by side."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import types
import warnings
from collections.abc import Callable

import peft
import pytest
import torch
from peft import get_peft_model
from stock_peft import stock_peft
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import hira
from hira import HiraError

IDS = torch.tensor([[1, 5, 9, 13], [1, 6, 7, 8], [1, 40, 30, 20]])
# outputs of one model by two orders of the same float32 operations
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def llama(**options) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "eos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **options)).eval()


def config(**options) -> peft.HiraConfig:
    """Of the registered class; the adapter does something before training."""
    return peft.HiraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], "init_weights": False, **options})


def adapted(model: nn.Module) -> dict[str, hira.HiraLayer]:
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, hira.HiraLayer)
    }


def several(model: nn.Module | None = None) -> peft.PeftModel:
    """Adapters first and second, on different modules, of different ranks."""
    model = get_peft_model(llama() if model is None else model, config(r=2), adapter_name="first")
    model.add_adapter("second", config(r=3, target_modules=["q_proj", "up_proj"]))
    return model.eval()


def logits(model: nn.Module, ids: Tensor = IDS, **options) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **options).logits


# The documented example


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


# What is adapted


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


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"layers_to_transform": [0, 2]}, {"0.self_attn.q_proj", "2.self_attn.q_proj"}),
        ({"layers_to_transform": 1, "layers_pattern": "layers"}, {"1.self_attn.q_proj"}),
        ({"exclude_modules": ["layers.1.self_attn.q_proj"]}, {"0.self_attn.q_proj", "2.self_attn.q_proj"}),
        ({"exclude_modules": r".*layers\.[02].*"}, {"1.self_attn.q_proj"}),
        ({"target_modules": r".*\.1\..*(k_proj|gate_proj)"}, {"1.self_attn.k_proj", "1.mlp.gate_proj"}),
    ],
    ids=["indices", "index and pattern", "names", "regular expression", "target expression"],
)
def test_which_modules_are_adapted(options, expected):
    model = get_peft_model(llama(), config(**{"target_modules": ["q_proj"], **options}))
    assert {name.removeprefix("model.layers.") for name in adapted(model)} == expected


def test_all_linear_leaves_the_output_layer_alone():
    model = get_peft_model(llama(), config(target_modules="all-linear"))
    assert {name.rpartition(".")[2] for name in adapted(model)} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }


def bert() -> BertForSequenceClassification:
    sizes = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=2, num_labels=3)).eval()


def t5() -> T5ForConditionalGeneration:
    sizes = {"vocab_size": 48, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    torch.manual_seed(0)
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (llama, {"q_proj", "v_proj"}),
        (bert, {"query", "value"}),
        (t5, {"q", "v"}),
        (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=48, n_embd=16, n_layer=2, n_head=2)), {"c_attn"}),
        (lambda: OPTForCausalLM(OPTConfig(vocab_size=48, hidden_size=16, ffn_dim=24, word_embed_proj_dim=16,
                                          num_attention_heads=2, num_hidden_layers=2)), {"q_proj", "v_proj"}),
    ],
    ids=["llama", "bert", "t5", "gpt2", "opt"],
)  # fmt: skip
def test_default_targets_of_known_architectures(build, expected):
    model = get_peft_model(build(), peft.HiraConfig(r=2))
    assert {name.rpartition(".")[2] for name in adapted(model)} == expected


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


# Several adapters


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


# Copies


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


# Tied weights


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


# weights that the model reads


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


# Models whose config does not say of which type they are


class Projection(nn.Module):
    def __init__(self, config: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config, self.c_attn = config, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_attn(x)


@dataclasses.dataclass
class Width:
    n_embd: int = 8


CONFIGS = {
    "dataclass": Width(),
    "dict": {"width": 8},
    "dict without a type": {"model_type": None},
    "namespace": types.SimpleNamespace(model_type=None),
    "none": None,
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_config_need_not_say_the_type_of_the_model(config):
    hira_config = hira.HiraConfig(r=2, target_modules=["c_attn"], init_weights=False)
    for add in (get_peft_model, lambda model, config: peft.inject_adapter_in_model(config, model)):
        model = add(Projection(config), hira_config)
        x = torch.randn(3, 8)
        layer = next(module for module in model.modules() if isinstance(module, hira.HiraLayer))
        W = layer.base_layer.weight * (1 + layer.hira_B["default"] @ layer.hira_A["default"])
        torch.testing.assert_close(model(x), x @ W.T + layer.base_layer.bias, **CLOSE)


@pytest.mark.parametrize("config", [*CONFIGS.values(), {"model_type": "own"}], ids=[*CONFIGS, "own type"])
def test_only_default_modules_need_the_type_of_the_model(config):
    with pytest.raises(HiraError, match="target_modules"):
        get_peft_model(Projection(config), hira.HiraConfig(r=2))


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


# Target modules that are none of the model's


def warnings_of(add: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        add()
    return [str(warning.message) for warning in caught if "target_modules" in str(warning.message)]


@pytest.mark.parametrize("mixed", [False, True])
def test_names_that_match_nothing_beside_others_that_do_are_warned_of(mixed):
    config = hira.HiraConfig(target_modules=["q_proj", "w1_typo", "self_attn.v_proj", "v_attn"])
    (message,) = warnings_of(lambda: get_peft_model(llama(), config, mixed=mixed))
    assert "no module for 'v_attn', 'w1_typo' in target_modules" in message
    assert "['q_proj', 'self_attn.v_proj'] are adapted" in message


def test_a_second_adapter_is_warned_of_too():
    model = get_peft_model(llama(), hira.HiraConfig(target_modules=["q_proj"]))
    (message,) = warnings_of(lambda: model.add_adapter("b", hira.HiraConfig(target_modules=["q_proj", "qkv"])))
    assert "'qkv'" in message


@pytest.mark.parametrize(
    "targets",
    [["q_proj", "model.layers.1.mlp.up_proj"], "all-linear", ".*q_proj", None, ["embed_tokens", "lm_head"]],
    ids=str,
)
def test_names_that_all_match_are_not_warned_of(targets):
    model = get_peft_model(llama(), hira.HiraConfig(target_modules=targets))
    assert not warnings_of(lambda: model.add_adapter("b", hira.HiraConfig(target_modules=targets)))


def test_layers_and_exclusions_are_not_misspelt_names():
    config = hira.HiraConfig(
        target_modules=["q_proj", "v_proj"], layers_to_transform=[1], exclude_modules=[".*v_proj", "v_proj"]
    )
    assert not warnings_of(lambda: get_peft_model(llama(), config))
