"""Small models of many architectures, and what of each is adapted and merged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import architectures
import peft
import transformers as hf
from merging import (
    hira_config,
)
from torch import nn
from vision_transformer import VisionTransformer

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "pad_token_id": 0}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2}


def mixtral() -> nn.Module:  # more than ten experts, whose order is not that of their names
    return hf.MixtralForCausalLM(hf.MixtralConfig(**SIZES, num_local_experts=12))


def qwen3_moe() -> nn.Module:
    return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**SIZES, moe_intermediate_size=8, num_experts=3))


def gpt_oss() -> nn.Module:
    return hf.GptOssForCausalLM(hf.GptOssConfig(**SIZES, num_local_experts=3, head_dim=8))


class Case(NamedTuple):
    """A model, and the modules and parameters to adapt."""

    build: Callable[[], nn.Module]
    targets: list[str]
    parameters: list[str] | None = None

    def config(self, r: int = 2, **options: Any) -> peft.HiraConfig:
        return hira_config(*self.targets, r=r, target_parameters=self.parameters, **options)


CASES = {name: Case(case.build, case.targets) for name, case in architectures.CASES.items()} | {
    "attention": Case(VisionTransformer, ["attn", "patches", "head"]),
    "mixtral": Case(mixtral, ["q_proj"], EXPERTS),
    "qwen3_moe": Case(qwen3_moe, ["q_proj"], EXPERTS),
    "gpt_oss": Case(gpt_oss, ["q_proj"], EXPERTS),
}
