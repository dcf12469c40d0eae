"""Small models whose input and output embeddings share one weight."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

IDS = torch.tensor([[1, 5, 9, 3]])
SMALL = {"vocab_size": 24, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=1, tie_word_embeddings=True))


def gpt2() -> nn.Module:
    special = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=24, n_embd=8, n_layer=1, n_head=2, n_positions=8, **special))


def bert() -> nn.Module:
    return BertForMaskedLM(BertConfig(**SMALL, max_position_embeddings=8))


def t5() -> nn.Module:
    sizes = {"vocab_size": 24, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, tie_word_embeddings=True))


# the model, its embeddings that share a weight, and the adapted ones among them
CASES = [
    (make, tied, targets)
    for make, tied in (
        (llama, ("model.embed_tokens", "lm_head")),
        (gpt2, ("transformer.wte", "lm_head")),
        (bert, ("bert.embeddings.word_embeddings", "cls.predictions.decoder")),
        (t5, ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")),
    )
    for targets in (tied[:1], tied[-1:], tied)
]
every_case = pytest.mark.parametrize(
    ("make", "tied", "targets"), CASES, ids=[f"{make.__name__}: {', '.join(targets)}" for make, _, targets in CASES]
)


def logits(model: nn.Module) -> Tensor:
    decoder = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, **decoder).logits


def adapted(make: Any, targets: tuple[str, ...]) -> PeftModel:
    torch.manual_seed(0)
    pattern = "|".join(name.replace(".", r"\.") for name in targets)
    config = peft.HiraConfig(r=2, target_modules=f"({pattern})", init_weights=False)
    return get_peft_model(make().eval(), config).eval()


def assert_close(found: Tensor, wanted: Tensor) -> None:
    # outputs of one model by two orders of the same float32 operations
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
