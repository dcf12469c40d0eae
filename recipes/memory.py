"""Computes the memory that the recipes take, and writes the table of recipes/README.md: python -m recipes.memory

Nothing is loaded: models are made on the meta device, from the sizes that their publishers give. The formula is in
recipes/README.md.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from benchmarks.readme_table import with_lines
from diffusers import Flux2Transformer2DModel
from peft import get_peft_model
from recipes import flux2_klein
from transformers import LlamaConfig, LlamaForCausalLM

from hira import HiraConfig
from hira.training.finetune.arguments import parse
from hira.training.finetune.memory import kept_for_backward
from hira.training.finetune.plan import plan

FOLDER = Path(__file__).parent
README = FOLDER / "README.md"
BEGIN = "<!-- recipes/memory.py writes from here -->\n"
PROCESSES = 4

_LLAMA3 = {"vocab_size": 128256, "num_key_value_heads": 8, "head_dim": 128}
MODELS: dict[str, dict[str, Any]] = {
    "Llama-2-7B": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    | {"num_attention_heads": 32},
    "Llama-3-8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    | _LLAMA3,
    "Llama-3.2-3B": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24}
    | _LLAMA3
    | {"tie_word_embeddings": True},
}
PAPER = ("commonsense", "convai2", "metamath")  # their batches are equal
RECIPES = ((PAPER, "Llama-3-8B"), (PAPER, "Llama-2-7B"), (("peft_metamathqa",), "Llama-3.2-3B"))
# FLUX.2-klein-base-4B; what it gets for an image of 512 x 512 pixels and a prompt
FLUX = {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "attention_head_dim": 128}
FLUX |= {"joint_attention_dim": 7680, "guidance_embeds": False}
PATCHES, TEXT = (512 // 16) ** 2, 512


class Need(NamedTuple):
    """Bytes, and numbers of parameters.

    Args:
        total, trained: parameters of the adapted model, and those that are trained.
        weights, training, activations: bytes, as hira's `Memory` has them.
        shared: bytes in each of PROCESSES processes; None where the recipe is for one GPU alone.
    """

    total: int
    trained: int
    weights: int
    training: int
    activations: int
    shared: float | None = None

    @property
    def together(self) -> int:
        """Bytes on one GPU."""
        return self.weights + self.training + self.activations


def of_language_model(recipe: str, name: str) -> Need:
    """What a recipe takes with a model."""
    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(**MODELS[name], max_position_embeddings=8192).save_pretrained(folder)
        arguments = parse(["--config", str(FOLDER / f"{recipe}.yaml"), "--model_name_or_path", folder])
        adapted, memory = plan(arguments)
    if memory.activations is None:
        raise RuntimeError(f"{name} does not run on the meta device")
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**MODELS[name])).to(torch.bfloat16)
    block = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    root = memory.weights - block * len(model.model.layers)
    state = memory.weights + memory.training
    activations = memory.activations * arguments.training.gradient_accumulation_steps / PROCESSES
    each = (state - root) / PROCESSES + root + 2 * block + activations
    return Need(adapted.total, adapted.trainable, memory.weights, memory.training, memory.activations, each)


def of_flux() -> Need:
    """What recipes/flux2_klein.py takes while it trains."""
    batch, bfloat16 = flux2_klein.BATCH, torch.bfloat16
    with torch.device("meta"):
        base = Flux2Transformer2DModel(**FLUX).to(bfloat16)
        inputs = {
            "hidden_states": torch.empty(batch, PATCHES, base.config.in_channels, dtype=bfloat16),
            "encoder_hidden_states": torch.empty(batch, TEXT, base.config.joint_attention_dim, dtype=bfloat16),
            "timestep": torch.empty(batch, dtype=bfloat16),
            "img_ids": torch.empty(batch, PATCHES, 4),
            "txt_ids": torch.empty(batch, TEXT, 4),
        }
    weights = sum(parameter.nbytes for parameter in base.parameters())
    model = get_peft_model(base, HiraConfig(r=32, target_modules=flux2_klein.TARGETS)).train()
    trained, total = model.get_nb_trainable_parameters()
    whole = kept_for_backward(model, lambda: model(**inputs))
    base.enable_gradient_checkpointing()
    between = kept_for_backward(model, lambda: model(**inputs))
    blocks = len(base.transformer_blocks) + len(base.single_transformer_blocks)
    return Need(total, trained, weights, 16 * trained, between + (whole - between) // blocks)


def needs() -> Iterator[tuple[list[str], str, Need]]:
    """The recipes' files with a model, and what they take."""
    for recipes, model in RECIPES:
        yield [f"{recipe}.yaml" for recipe in recipes], model, of_language_model(recipes[0], model)
    yield ["flux2_klein.py"], "FLUX.2-klein-base-4B", of_flux()


def table() -> list[str]:
    """The table, in Markdown."""
    each = f"each of {PROCESSES} GPUs, FSDP2"
    lines = [
        f"| recipe | base model | trained, r = 32 | weights | A, B, gradients, Adam | activations | one GPU | {each} |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for files, model, need in needs():
        share = f"{need.trained:,}, {100 * need.trained / need.total:.4f} %"
        parts = (need.weights, need.training, need.activations, need.together)
        sizes = [f"{size / 1e9:.1f} GB" for size in parts]
        shared = "" if need.shared is None else f"{need.shared / 1e9:.1f} GB"
        links = ", ".join(f"[{file}]({file})" for file in files)
        lines.append(f"| {links} | {model} | {share} | {' | '.join(sizes)} | {shared} |")
    return lines


def with_table(readme: str) -> str:
    """The README with the table between its two marks."""
    return with_lines(readme, BEGIN, table())


if __name__ == "__main__":
    README.write_text(with_table(README.read_text()))
