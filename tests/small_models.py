"""A Llama and a BERT of a few thousand weights, configurations for them, and their HiRA layers."""

from __future__ import annotations

import peft
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

import hira

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


def bert() -> BertForSequenceClassification:
    sizes = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=2, num_labels=3)).eval()
