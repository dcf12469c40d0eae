"""Ways of keeping weights elsewhere: the cases of test_offloaded.py, and of the table in docs/base_layers.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate import cpu_offload, cpu_offload_with_hook, disk_offload, dispatch_model
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
        away: which weights are on the meta device then.
        trains: whether adapters train; not where they are away themselves.
    """

    name: str
    offload: Callable[[nn.Module, Path], nn.Module]
    away: Literal["all", "some", "none"] = "all"
    trains: bool = True


def _loaded(model: nn.Module, folder: Path) -> nn.Module:
    model.save_pretrained(folder / "base")
    options = {"device_map": DEVICES, "offload_folder": str(folder / "off")}
    return AutoModelForCausalLM.from_pretrained(folder / "base", **options)


def _dispatched(model: nn.Module, folder: Path, prefix: str = "") -> nn.Module:
    return dispatch_model(model, {prefix + name: device for name, device in DEVICES.items()}, offload_dir=folder)


# of a base model, which is adapted then
WAYS = [
    Way("`cpu_offload`", lambda model, folder: cpu_offload(model, CPU)),
    Way("`disk_offload`", lambda model, folder: disk_offload(model, folder, CPU)),
    Way("`dispatch_model`, in part to the disk", _dispatched, away="some"),
    Way("`from_pretrained(device_map=...)` of Transformers, in part to the disk", _loaded, away="some"),
    Way("`cpu_offload_with_hook`", lambda model, folder: cpu_offload_with_hook(model, CPU)[0], away="none"),
]
# of a model that is adapted already
AFTERWARDS = [
    Way("`cpu_offload` of an adapted model", WAYS[0].offload, trains=False),
    Way("`disk_offload` of an adapted model", WAYS[1].offload, trains=False),
    Way(
        "`dispatch_model` of an adapted model",
        lambda model, folder: _dispatched(model, folder, "base_model.model."),
        away="some",
        trains=False,
    ),
]
