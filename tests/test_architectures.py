"""Real architectures, tiny and with random weights: adapted, trained, saved, loaded and merged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import hira

IDS = torch.tensor([[3, 5, 9, 13, 8, 4], [3, 6, 7, 8, 1, 2]])
Inputs = dict[str, Tensor]


class Case(NamedTuple):
    """An architecture, with the modules to adapt and the types of base layers that has to cover."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    targets: list[str]
    bases: set[type[nn.Module]]


def language(**more: Tensor) -> Callable[[], Inputs]:
    return lambda: {"input_ids": IDS, "labels": IDS, **more}


def llama() -> nn.Module:
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **heads, pad_token_id=0, bos_token_id=1, eos_token_id=2))


def t5() -> nn.Module:
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0))


def bart() -> nn.Module:
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    sizes = {"vocab_size": 32, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 16}
    return hf.BartForConditionalGeneration(hf.BartConfig(**sizes, **heads))


def bert() -> nn.Module:
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return hf.BertForSequenceClassification(hf.BertConfig(**sizes, num_attention_heads=2, num_labels=3))


def gpt2() -> nn.Module:
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16))


def gemma3() -> nn.Module:
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 4}
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**sizes, **heads, pad_token_id=0, bos_token_id=1, eos_token_id=2))


def whisper() -> nn.Module:
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "num_mel_bins": 8, "vocab_size": 32}
    positions = {"max_source_positions": 10, "max_target_positions": 16}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return hf.WhisperForConditionalGeneration(hf.WhisperConfig(**sizes, **heads, **positions, **tokens))


def mobilenet() -> nn.Module:
    return hf.MobileNetV2ForImageClassification(
        hf.MobileNetV2Config(depth_multiplier=0.1, min_depth=4, depth_divisible_by=4, num_labels=3, image_size=32)
    )


def convnext() -> nn.Module:
    return hf.ConvNextForImageClassification(
        hf.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_labels=3, layer_scale_init_value=1.0)
    )


def mamba() -> nn.Module:
    sizes = {"vocab_size": 32, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 2}
    return hf.MambaForCausalLM(hf.MambaConfig(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2))


def images() -> Inputs:
    return {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 2])}


def sounds() -> Inputs:
    return {"input_features": torch.randn(2, 8, 20), "labels": IDS}


CASES = {
    "llama": Case(llama, language(), ["q_proj", "v_proj", "down_proj", "embed_tokens"], {nn.Linear, nn.Embedding}),
    "t5": Case(t5, language(), ["q", "v", "wo", "wi"], {nn.Linear}),
    "bart": Case(bart, language(), ["q_proj", "fc1", "out_proj"], {nn.Linear}),
    "bert": Case(
        bert,
        lambda: {"input_ids": IDS, "labels": torch.tensor([0, 2])},
        ["query", "value", "dense", "word_embeddings"],
        {nn.Linear, nn.Embedding},
    ),
    "gpt2": Case(gpt2, language(), ["c_attn", "c_proj", "c_fc", "wte"], {Conv1D, nn.Embedding}),
    "gemma3": Case(gemma3, language(), ["q_proj", "embed_tokens"], {nn.Linear, nn.Embedding}),
    "whisper": Case(whisper, sounds, ["conv1", "conv2", "q_proj", "fc2"], {nn.Conv1d, nn.Linear}),
    "mobilenet": Case(mobilenet, images, ["convolution", "classifier"], {nn.Conv2d, nn.Linear}),
    "convnext": Case(convnext, images, ["dwconv", "pwconv1", "pwconv2"], {nn.Conv2d, nn.Linear}),
    "mamba": Case(mamba, language(), ["in_proj", "x_proj", "dt_proj", "conv1d", "out_proj"], {nn.Conv1d, nn.Linear}),
}


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


def make(case: Case) -> nn.Module:
    """The base model, with weights that keep activations at their size, so that adapters show in the outputs."""
    torch.manual_seed(0)
    model = case.build().eval()
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | Conv1D):
            fan_in = module.weight.shape[0] if isinstance(module, Conv1D) else module.weight[0].numel()
            nn.init.normal_(module.weight, std=(2 / fan_in) ** 0.5)
    return model


def adapted(case: Case, base: nn.Module, **options) -> peft.PeftModel:
    return peft.get_peft_model(base, peft.HiraConfig(**{"r": 2, "target_modules": case.targets, **options}))


def layers(model: nn.Module) -> list[hira.HiraLayer]:
    return [module for module in model.modules() if isinstance(module, hira.HiraLayer)]


def factors(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if "hira_" in name}


def logits(model: nn.Module, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def train(model: nn.Module, inputs: Inputs, steps: int = 3) -> list[float]:
    """AdamW on the trainable parameters; the losses, in evaluation mode so that only the steps change them."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(steps):
        loss = model(**inputs).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [*losses, model(**inputs).loss.item()]


def test_the_case_covers_what_it_is_for(case):
    found = {type(layer.get_base_layer()) for layer in layers(adapted(case, make(case)))}
    assert {next(kind for kind in case.bases if issubclass(base, kind)) for base in found} == case.bases


def test_depthwise_convolutions_are_among_them():
    for name in ("mobilenet", "convnext", "mamba"):
        groups = [
            getattr(layer.get_base_layer(), "groups", 1) for layer in layers(adapted(CASES[name], make(CASES[name])))
        ]
        assert max(groups) > 1, name


def test_a_depthwise_weight_that_the_model_reads_itself():
    """As the fast paths of short convolutions do: the layer is never called, and its weight is W'."""

    class ShortConvolution(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(4, 4, 3, groups=4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return F.conv1d(x, self.conv.weight, groups=4)

    model = peft.get_peft_model(ShortConvolution(), peft.HiraConfig(r=2, target_modules=["conv"], init_weights=False))
    layer, x = model.base_model.model.conv, torch.randn(2, 4, 9)
    W = layer.base_layer.weight * (1 + layer.get_delta_weight("default"))
    y = model(x)
    torch.testing.assert_close(y, F.conv1d(x, W, groups=4))
    y.sum().backward()
    assert layer.hira_A["default"].grad.abs().min() > 0
    with model.disable_adapter():
        assert torch.equal(model(x), F.conv1d(x, layer.base_layer.weight, groups=4))
    assert torch.equal(model.merge_and_unload()(x), y)


def test_train_save_load_and_merge(case, tmp_path):
    inputs = case.inputs()
    base = make(case)
    before, untouched = logits(base, inputs), copy.deepcopy(base)
    model = adapted(case, base).eval()
    torch.testing.assert_close(logits(model, inputs), before)
    start, frozen = factors(model), {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}

    losses = train(model, inputs)
    assert losses[-1] < losses[0]
    assert [name for name, value in factors(model).items() if torch.equal(value, start[name])] == []
    assert [name for name, value in frozen.items() if not torch.equal(model.get_parameter(name), value)] == []

    trained = logits(model, inputs)
    assert not torch.allclose(trained, before, rtol=1e-3, atol=1e-3)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(untouched), tmp_path)
    assert torch.equal(logits(loaded, inputs), trained)

    # rounding to one part in 2^24, some hundred roundings deep
    scale = trained.abs().max().item()
    model.merge_adapter()
    torch.testing.assert_close(logits(model, inputs), trained, rtol=0, atol=100 * 2**-24 * scale)
    model.unmerge_adapter()
    assert torch.equal(logits(model, inputs), trained)
    merged = model.merge_and_unload(safe_merge=True)
    assert [type(module) for module in merged.modules()] == [type(module) for module in untouched.modules()]
    torch.testing.assert_close(logits(merged, inputs), trained, rtol=0, atol=100 * 2**-24 * scale)


def test_against_dense_weights(case):
    """Random adapters: the model computes what it would with W0 * (1 + BA) written into its weights, in float64."""
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in case.inputs().items()}
    model = adapted(case, make(case).double(), init_weights=False).eval()
    model.double()
    dense = make(case).double()
    for layer in layers(model):
        weight = dense.get_submodule(layer.name).weight
        dense.get_submodule(layer.name).weight = nn.Parameter(weight * (1 + layer.get_delta_weight("default")))
    found, expected = logits(model, inputs), logits(dense, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert not torch.allclose(found, logits(make(case).double(), inputs), rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", "t5", "gpt2", "whisper", "mamba"])
def test_generate_with_a_cache(name):
    case = CASES[name]
    model = adapted(case, make(case), init_weights=False).eval()
    first = {key: value for key, value in case.inputs().items() if key != "labels"}
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    cached = model.generate(**first, **options, use_cache=True)
    assert torch.equal(model.generate(**first, **options, use_cache=False), cached)
    assert torch.equal(model.merge_and_unload().generate(**first, **options), cached)
