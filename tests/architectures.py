"""Real architectures, tiny and with random weights, and what tests do with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import peft
import torch
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
