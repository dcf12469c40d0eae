"""Is the learning rate one for LoRA, at which HiRA without `hira_alpha` hardly moves?"""

from __future__ import annotations

import math
import warnings
from statistics import geometric_mean
from typing import Any

import torch
from torch import nn

from hira.distributed.detection import sharded_by
from hira.layers.base import HiraLayer
from hira.layers.embedding import Embedding
from hira.training.measures import samples
from hira.tuner.model import hira_layers

# docs/learning_rate.md has the study. Up to this rate times the number of steps, HiRA without hira_alpha ended behind
# its own best on every model and rank; LoRA was near its best there on the decoders.
LORA_LIKE = 0.36
# The study's layers are 19 to 39 times behind LoRA's; where W0 is so large that little is missing, nothing is said.
BEHIND = 10
# HiRA's best rate over LoRA's, in the study
FASTER = 10


def check_learning_rate(model: nn.Module, optimizer: Any, steps: int) -> None:
    """Warn if HiRA is about to train at a learning rate for LoRA, with the numbers that fit.

    With A at its start, B = 0 and one learning rate, the first step of Adam changes W' less than with a LoRA of
    ``alpha = 2 r`` by ``2 / rms(W0)``. A warning is given if all of this holds:

    - the optimiser is an Adam, as far as its class's name tells, and has the B of adapters without `hira_alpha`,
      all of them zero still;
    - the geometric mean of ``2 / rms(W0)`` over their layers is at least 10;
    - the largest peak rate of a B, times the steps, is at most 0.36.

    Embeddings, whose B starts large, are not looked at, nor are weights that are divided over processes.

    Args:
        model: the model with the adapters.
        optimizer: the optimiser, in accelerate's or DeepSpeed's wrappers too; with a scheduler made, its peak rates are
            taken.
        steps: the number of optimiser steps of the whole training.

    Cost: some rows of each weight are read.

    Source: docs/learning_rate.md.
    """
    while hasattr(optimizer, "optimizer"):  # of accelerate, DeepSpeed
        optimizer = optimizer.optimizer
    if "adam" not in type(optimizer).__name__.lower():
        return
    rates = {id(p): group.get("initial_lr", group["lr"]) for group in optimizer.param_groups for p in group["params"]}
    layers = [layer for layer in hira_layers(model) if not isinstance(layer, Embedding)]
    found = [
        (layer, name, B)
        for layer in layers
        for name, B in layer._factor_dicts[1].items()
        if id(B) in rates and layer.alpha_scale[name] == 1
    ]
    if not found or any(_is_divided(layer) for layer in layers) or any(bool(B.any()) for _, _, B in found):
        return
    rate = max(rates[id(B)] for _, _, B in found)
    if rate * steps > LORA_LIKE:
        return
    behind = geometric_mean(_behind(layer, name) for layer, name, _ in found)
    if behind >= BEHIND:
        r = max(layer.r[name] for layer, name, _ in found)
        warnings.warn(
            f"HiRA is about to train without hira_alpha at a learning rate of {rate:.2g} for {steps} steps. Its first "
            f"step is {behind:.0f} times smaller than that of a LoRA with lora_alpha = 2 r at this rate. Set "
            f"hira_alpha={2 * r} in HiraConfig (2 r) to train at LoRA's rate, or try a rate near {FASTER * rate:.2g}; "
            "hira's docs/learning_rate.md has the figures.",
            stacklevel=2,
        )


def _is_divided(layer: HiraLayer) -> bool:
    return sharded_by(layer.storage.layer, layer.storage.name) is not None


@torch.no_grad()
def _behind(layer: HiraLayer, name: str) -> float:
    """How many times smaller than LoRA's the first step is, ``2 / rms(W0)``; 1 where W0 is zero."""
    rows = [W0 for W0, *_ in samples(layer, [name])]
    squares, count = sum(float(W0.square().sum()) for W0 in rows), sum(W0.numel() for W0 in rows)
    return 2 / math.sqrt(squares / count) if squares else 1.0
