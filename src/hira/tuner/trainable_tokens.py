"""Checks of `trainable_token_indices`: whole rows of embeddings, which PEFT trains and saves beside the adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from hira.errors import HiraError
from hira.layers.base import HiraLayer


def check_token_layers(model: Any, config: Any, tied: list[str], targets: Callable[[str], bool]) -> None:
    """Refuse rows of a layer that HiRA adapts, which would train both ways, and rows that a layer does not have.

    Args:
        model: the base model.
        config: the HiraConfig, with `trainable_token_indices`.
        tied: the names of the modules whose weight is the input embedding's.
        targets: says whether a configuration targets a module, by the module's name.

    Raises:
        HiraError: as the first line says; it names the layer.
    """
    indices = config.trainable_token_indices
    modules = list(model.named_modules(remove_duplicate=False))
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    names = [name for name, module in modules if module is embedding]
    by_layer = dict(indices) if isinstance(indices, dict) else {name: indices for name in names or ["embed_tokens"]}
    for layer, ids in list(by_layer.items()):
        if any(name.endswith(layer) for name in names):
            by_layer |= {name: ids for name in tied if name not in by_layer}
    for name, module in modules:
        for layer, ids in by_layer.items():
            if not name.endswith(layer):
                continue
            if isinstance(module, HiraLayer) or targets(name):
                raise HiraError(
                    f"trainable_token_indices has rows of {layer}, which is, or shares its weight with, {name}, a "
                    "target of HiRA: leave it out of target_modules, or do without trainable_token_indices."
                )
            rows = _rows(module)
            if rows is not None and any(i >= rows for i in ids):
                raise HiraError(
                    f"trainable_token_indices has {max(ids)} for {name}, which has {rows} rows: call "
                    "model.resize_token_embeddings(len(tokenizer)) first."
                )


def _rows(module: Any) -> int | None:
    if isinstance(module, AuxiliaryTrainingWrapper):
        module = module.original_module
    weight = getattr(module, "weight", None)
    return len(weight) if isinstance(module, nn.Embedding | nn.Linear) and weight is not None else None
