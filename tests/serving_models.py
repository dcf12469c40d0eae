"""Small models whose greedy answers are not a matter of rounding, with a tokenizer, and adapters on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import transformers as hf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn

WORDS = 128
SIZES = {"vocab_size": WORDS, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


class Case(NamedTuple):
    """A model, and the configurations of two adapters."""

    build: Callable[[], nn.Module]
    adapters: tuple[Mapping[str, Any], Mapping[str, Any]]


CASES = {
    "llama": Case(
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)),
        ({"target_modules": LINEAR, "modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj"], "lora_r": 2}),
    ),
    "qwen": Case(  # the second adapter makes a head of its own beside the embeddings
        lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SIZES, tie_word_embeddings=True)),
        ({"target_modules": ["embed_tokens", "q_proj", "up_proj"]}, {"target_modules": ["up_proj", "v_proj"]}),
    ),
    "mixtral": Case(
        lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**SIZES, num_local_experts=4)),
        ({"target_modules": ["q_proj"], "target_parameters": EXPERTS}, {"target_modules": ["q_proj", "o_proj"]}),
    ),
}


def made(name: str, root: Path) -> Path:
    """Write a base model and its adapters, `base`, `a0` and `a1`, to a folder."""
    case = CASES[name]
    torch.manual_seed(len(name))
    model = case.build()
    for key, parameter in model.named_parameters():
        if parameter.dim() > 1:  # large enough that one word is far ahead of the others
            nn.init.normal_(parameter, std=1.0 if "embed_tokens" in key or "lm_head" in key else 0.15)
    model.save_pretrained(root / "base")
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w3"))
    special = {"pad_token": "w0", "bos_token": "w1", "eos_token": "w2", "unk_token": "w3"}
    hf.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(root / "base")
    for i, options in enumerate(case.adapters):
        adapted = peft.get_peft_model(type(model).from_pretrained(root / "base"), peft.HiraConfig(r=4, **options))
        for key, parameter in adapted.named_parameters():
            if "hira_" in key:
                nn.init.normal_(parameter, std=0.4)
            elif "modules_to_save" in key:
                nn.init.normal_(parameter, std=1.0)
        adapted.save_pretrained(root / f"a{i}")
    return root
