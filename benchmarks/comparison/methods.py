"""The methods that are compared: how each adapts a model, and the weight that each stands for, by definition."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

import hira
from hira.ops import reference

Leaves = Mapping[Tensor, Tensor]


@dataclass(frozen=True)
class Method:
    """One way to fine-tune.

    Args:
        name: as it stands in tables.
        adapt: makes a model trainable by this method: (model, target modules, rank, adapter name) -> model.
        weight: the weight that an adapted layer stands for, from a layer, its adapter's name, and the tensors that
            stand for its parameters.
        gradient_error: the relative error that gradients of the factors may have besides that of rounding.
    """

    name: str
    adapt: Callable[[nn.Module, list[str], int, str], nn.Module]
    weight: Callable[[Any, str, Leaves], Tensor]
    gradient_error: float = 0.0


def _peft(config: Any, model: Any, adapter: str) -> nn.Module:
    if isinstance(model, PeftModel):
        model.add_adapter(adapter, config)
    else:
        model = get_peft_model(model, config, adapter_name=adapter)
    adapted: nn.Module = model
    return adapted


def _lora(model: nn.Module, targets: list[str], r: int, adapter: str) -> nn.Module:
    return _peft(LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets), model, adapter)


def _dora(model: nn.Module, targets: list[str], r: int, adapter: str) -> nn.Module:
    return _peft(LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets, use_dora=True), model, adapter)


def _hira(model: nn.Module, targets: list[str], r: int, adapter: str) -> nn.Module:
    return _peft(hira.HiraConfig(r=r, target_modules=targets), model, adapter)


def _hira_int8(model: nn.Module, targets: list[str], r: int, adapter: str) -> nn.Module:
    return _peft(hira.HiraConfig(r=r, target_modules=targets, weight_gradient="int8"), model, adapter)


def _hira_kept(model: nn.Module, targets: list[str], r: int, adapter: str) -> nn.Module:
    return _peft(hira.HiraConfig(r=r, target_modules=targets, keep_weight=True), model, adapter)


def _peft_hira(model: nn.Module, targets: list[str], r: int, adapter: str) -> nn.Module:
    hira.unregister()
    try:
        from peft import HiraConfig

        return _peft(HiraConfig(r=r, target_modules=targets), model, adapter)
    finally:
        hira.register()


def _full(model: nn.Module, targets: list[str], r: int, adapter: str) -> nn.Module:
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in targets:
            module.get_parameter("weight").requires_grad_(True)
    return model


def _factors(layer: Any, kind: str, adapter: str, leaves: Leaves) -> tuple[Tensor, Tensor]:
    """A and B of a layer, as matrices over flattened kernels."""
    A, B = (getattr(layer, f"{kind}_{letter}") for letter in "AB")
    if adapter not in A:
        A, B = (getattr(layer, f"{kind}_embedding_{letter}") for letter in "AB")
    A, B = (getattr(factors[adapter], "weight", factors[adapter]) for factors in (A, B))
    return leaves[A].flatten(1), leaves[B].flatten(1)


def _base_weight(layer: Any, leaves: Leaves) -> Tensor:
    """W0 of a layer; of a packed weight, which nothing trains, what bitsandbytes makes of it."""
    weight = layer.get_base_layer().weight
    if not hasattr(weight, "quant_state"):
        return leaves[weight]
    from bitsandbytes.functional import dequantize_4bit

    dense: Tensor = dequantize_4bit(weight.data, weight.quant_state).double()
    return dense


def _lora_weight(layer: Any, adapter: str, leaves: Leaves) -> Tensor:
    A, B = _factors(layer, "lora", adapter, leaves)
    W0 = _base_weight(layer, leaves)
    update = (B @ A).t() if isinstance(layer.get_base_layer(), nn.Embedding) else B @ A
    scale: float = layer.scaling[adapter]
    return W0 + scale * update.reshape(W0.shape)


def _dora_weight(layer: Any, adapter: str, leaves: Leaves) -> Tensor:
    V = _lora_weight(layer, adapter, leaves)
    magnitude = leaves[layer.lora_magnitude_vector[adapter].weight]
    # DoRA (ICML 2024), section 4.3: the norm counts as a constant in backward
    directions: Tensor = V / torch.linalg.vector_norm(V, dim=1, keepdim=True).detach()
    return magnitude.unsqueeze(1) * directions


def _hira_weight(layer: Any, adapter: str, leaves: Leaves) -> Tensor:
    A, B = _factors(layer, "hira", adapter, leaves)
    W0 = _base_weight(layer, leaves)
    if isinstance(layer.get_base_layer(), nn.Embedding):
        return reference.modulated_weight(W0.t(), A, B).t()
    return reference.modulated_weight(W0.flatten(1), A, B).reshape(W0.shape)


def _own_weight(layer: nn.Module, adapter: str, leaves: Leaves) -> Tensor:
    return leaves[layer.get_parameter("weight")]


LORA = Method("LoRA", _lora, _lora_weight)
HIRA = Method("hira", _hira, _hira_weight)
HIRA_INT8 = Method("hira, int8 gradient", _hira_int8, _hira_weight, gradient_error=0.06)
HIRA_KEPT = Method("hira, weight kept", _hira_kept, _hira_weight)
PEFT_HIRA = Method("PEFT's HiRA", _peft_hira, _hira_weight)
DORA = Method("DoRA", _dora, _dora_weight)
FULL = Method("full fine-tuning", _full, _own_weight)
METHODS = (LORA, HIRA, HIRA_INT8, HIRA_KEPT, PEFT_HIRA, DORA, FULL)


def start(model: nn.Module) -> None:
    """Make every adapter do something: what starts at zero becomes normal, small, and the same at each call."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


def effective_weights(model: nn.Module, method: Method, adapter: str, leaves: Leaves) -> dict[str, Tensor]:
    """The weights that the layers of an adapted model stand for, by the names they have in the bare model."""
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            weights[f"{name.removeprefix('base_model.model.')}.weight"] = method.weight(module, adapter, leaves)
        elif method is FULL and "weight" in module._parameters and module.weight.requires_grad:
            weights[f"{name}.weight"] = method.weight(module, adapter, leaves)
    return weights
