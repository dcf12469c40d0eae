"""Ways of keeping weights elsewhere: the cases of test_offload.py, and of the table in docs/base_layers.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

TARGETS = ["q_proj", "o_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"]
CPU = torch.device("cpu")
DEVICES = {
    "model.embed_tokens": "disk",
    "model.rotary_emb": "cpu",
    "model.layers.0": "disk",
    "model.layers.1": "cpu",
    "model.norm": "cpu",
    "lm_head": "disk",
}


def llama() -> nn.Module:
    """A small model with biases; the same at each call."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = LlamaConfig(
            vocab_size=48,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=False,
            eos_token_id=None,
        )
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


@dataclass(frozen=True)
class Way:
    """One way of keeping a model's weights elsewhere.

    Args:
        name: as it stands in the table.
        offload: makes such a model of one in memory, given a folder that is its own.
        all_away: whether every weight is on the meta device then.
    """

    name: str
    offload: Callable[[nn.Module, Path], nn.Module]
    all_away: bool = True


def _loaded(model: nn.Module, folder: Path) -> nn.Module:
    model.save_pretrained(folder / "base")
    options = {"device_map": DEVICES, "offload_folder": str(folder / "off")}
    return AutoModelForCausalLM.from_pretrained(folder / "base", **options)


WAYS = [
    Way("`cpu_offload`", lambda model, folder: cpu_offload(model, execution_device=CPU)),
    Way("`disk_offload`", lambda model, folder: disk_offload(model, folder, execution_device=CPU)),
    Way(
        "`dispatch_model`, part of it on the disk",
        lambda model, folder: dispatch_model(model, DEVICES, offload_dir=folder),
        all_away=False,
    ),
    Way("`from_pretrained(device_map=...)`, part of it on the disk", _loaded, all_away=False),
]
