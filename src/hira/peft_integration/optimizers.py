"""PEFT's optimizers for LoRA on models with HiRA adapters, whose parameters have other names."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from hira.errors import HiraError
from hira.layers.base import HiraLayer
from hira.layers.embedding import Embedding
from hira.layers.experts import ParamWrapper
from hira.tuner.model import hira_layers

Pairs = list[tuple[nn.Parameter, nn.Parameter]]


def loraplus(create: Callable[..., Optimizer]) -> Callable[..., Optimizer]:
    """Make `create_loraplus_optimizer` give HiRA's B the rate and the decay of LoRA's B."""

    @functools.wraps(create)
    def wrapper(model: nn.Module, optimizer_cls: Any, *args: Any, **kwargs: Any) -> Optimizer:
        layers = [layer for layer in hira_layers(model) if not isinstance(layer, Embedding)]
        ids = {id(B) for layer in layers for Bs in (layer._factor_dicts[1], layer.hira_lora_B) for B in Bs.values()}
        if not ids:
            return create(model, optimizer_cls, *args, **kwargs)

        @functools.wraps(optimizer_cls, updated=())  # PEFT looks at its name
        def regrouping(groups: list[dict[str, Any]], **options: Any) -> Any:
            others, _, groupB, _ = groups
            groupB["params"] = [*groupB["params"], *(p for p in others["params"] if id(p) in ids)]
            others["params"] = [p for p in others["params"] if id(p) not in ids]
            return optimizer_cls(groups, **options)

        return create(model, regrouping, *args, **kwargs)

    return wrapper


def lorafa(create: Callable[..., Optimizer]) -> Callable[..., Optimizer]:
    """Make `create_lorafa_optimizer` refuse a model with HiRA adapters, on which it would be plain AdamW."""

    @functools.wraps(create)
    def wrapper(model: nn.Module, *args: Any, **kwargs: Any) -> Optimizer:
        if hira_layers(model):
            raise HiraError(
                "create_lorafa_optimizer is for LoRA: it freezes each lora_A and projects the gradient of lora_B, and "
                "leaves HiRA's adapters, which this model has, to plain AdamW. Use create_loraplus_optimizer, "
                "create_riemannian_optimizer or an optimizer of PyTorch."
            )
        return create(model, *args, **kwargs)

    return wrapper


def riemannian_pairs(collect: Callable[[nn.Module], Pairs]) -> Callable[[nn.Module], Pairs]:
    """Make the preconditioner's search for pairs of A and B find HiRA's too: the loss depends on BA alone."""

    @functools.wraps(collect)
    def wrapper(model: nn.Module) -> Pairs:
        return collect(model) + [pair for layer in hira_layers(model) for pair in _matrices(layer)]

    return wrapper


def _matrices(layer: HiraLayer) -> Pairs:
    """A and B of each adapter that trains; none of embeddings and of stacked experts."""
    if isinstance(layer, Embedding | ParamWrapper):
        return []
    pairs = []
    for As, Bs in (layer._factor_dicts, (layer.hira_lora_A, layer.hira_lora_B)):
        pairs += [(As[name], Bs[name]) for name in As]
    return [(A, B) for A, B in pairs if A.dim() == 2 and A.requires_grad and B.requires_grad]
