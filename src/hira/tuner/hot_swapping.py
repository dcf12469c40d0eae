"""Hot-swapping: another adapter's A and B in the place of those that a model has, compiled or not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.utils import PeftType
from torch import Tensor, nn

from hira.distributed.detection import is_dtensor
from hira.errors import HiraError
from hira.layers.base import HiraLayer
from hira.tuner.state_dicts import drop_tied, in_names_of, nameless, unwrapped, with_name
from hira.tuner.weighted_adapters import set_ranks

# what changes the model and is in no tensor
_SAME = ("hira_dropout", "target_parameters", "layer_replication")
# what has tensors of its own
_WHOLE = ("modules_to_save", "trainable_token_indices")


@torch.no_grad()
def swap(model: Any, adapter_name: str, config: Any, state_dict: Mapping[str, Tensor]) -> None:
    """Replace A and B of an adapter by another's, in place: a compiled model is not compiled again.

    A and B of a lower rank get zeros up to the rank at hand, ``[B 0] [A; 0] = BA``; those of a higher rank become new
    parameters. A layer that the other adapter lacks gets zeros, and computes with W0. The scales of `hira_alpha` stay
    as they are, and B is divided by them, so that the layer computes what the file says. `r` and `rank_pattern` of the
    adapter's configuration become the ranks that it has then.

    Args:
        model: the model, or what `torch.compile` made of it.
        adapter_name: the name of the adapter, which it keeps.
        config: the other adapter's HiraConfig.
        state_dict: its tensors, by the names in its file, with or without the adapter's name at the end.

    Raises:
        HiraError: there is no such adapter, it is merged, its A and B are offloaded or spread over processes, or the
            other does not fit the model or has modules or rows of its own. Nothing was changed.

    Source: what PEFT's `hotswap_adapter` does for LoRA.
    """
    own = getattr(model, "peft_config", {}).get(adapter_name)
    if own is None or own.peft_type != PeftType.HIRA or config.peft_type != PeftType.HIRA:
        raise HiraError(f"Hot-swapping needs a HiRA adapter {adapter_name!r} in the model, and another to swap it for.")
    _check_configs(own, config)
    layers = {unwrapped(name): layer for name, layer in model.named_modules() if isinstance(layer, HiraLayer)}
    layers = {name: layer for name, layer in layers.items() if layer._present([adapter_name])}
    for name, layer in layers.items():
        _check_layer(name, layer, adapter_name)
    tensors = _named(model, adapter_name, state_dict)
    problems = drop_tied(model, adapter_name, tensors)
    pairs: dict[HiraLayer, list[tuple[Tensor, Tensor]]] = {}
    for name, layer in layers.items():
        if adapter_name in layer.tied_to:
            continue
        pairs[layer] = []
        for factors, scale in _parts(layer, adapter_name):
            found = [tensors.pop(f"{name}.{factor}.{adapter_name}", None) for factor in factors]
            A, B = found
            if A is None and B is None:
                A, B = (
                    value.new_zeros(value.shape)
                    for value in (getattr(layer, factor)[adapter_name] for factor in factors)
                )
            if A is None or B is None or (A.shape, B.shape) != layer._factor_shapes(_rank(layer, A)):
                shapes = [None if factor is None else tuple(factor.shape) for factor in found]
                problems.append(f"{' and '.join(factors)} of {name} are of shapes {shapes}")
            else:
                pairs[layer].append((A, B / scale))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for key, value in tensors.items():  # PEFT saves the base weights of embeddings that are targets
        if key not in parameters or not torch.equal(parameters[key].cpu(), value.to(parameters[key].dtype).cpu()):
            problems.append(f"{key} is not of a layer of the adapter in the model")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise HiraError(
            f"The adapter cannot be swapped for {adapter_name!r}: {'; '.join(problems[:5])}{more}. Nothing was "
            "changed. Load it as another adapter instead."
        )
    for layer, new in pairs.items():
        put(layer, adapter_name, new, 1)
        layer.equal_on_all_processes.discard(adapter_name)
    _settle_ranks(model, own, adapter_name)


@torch.no_grad()
def pad_adapters(model: Any, rank: int) -> bool:
    """Give all HiRA adapters of a model one rank, with zeros, so that those up to it can be swapped in.

    Args:
        model: the model, before it is compiled.
        rank: the rank.

    Returns:
        Whether there is any.

    Raises:
        HiraError: an adapter has a higher rank; nothing was changed.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, HiraLayer)]
    for layer in layers:
        for name in layer.r:
            if (r := max(layer.r[name], layer.lora_r[name])) > rank:
                raise HiraError(f"Adapter {name!r} has rank {r} on {layer.name}, above the target_rank {rank}.")
    for layer in layers:
        for name in layer.r:
            if name not in layer.tied_to:
                factors = layer.parameters_of(name)
                put(layer, name, list(zip(factors[::2], factors[1::2], strict=True)), rank)
        for name, holder in layer.tied_to.items():
            layer.resize_adapter(name, holder.r[name], holder.lora_r[name])
    for name, config in getattr(model, "peft_config", {}).items():
        if config.peft_type == PeftType.HIRA:
            set_ranks(config, model, name)
    return bool(layers)


def put(layer: HiraLayer, adapter_name: str, pairs: list[tuple[Tensor, Tensor]], rank: int) -> None:
    """Write the factors of an adapter, with zeros up to the ranks that it has, and up to another one.

    Args:
        layer: the layer that holds them.
        adapter_name: the adapter's name.
        pairs: A and B, and L1 and L2 if the adapter has a LoRA.
        rank: the least rank that A and B, and L1 and L2, are to have.
    """
    ranks = layer.r[adapter_name], layer.lora_r[adapter_name]
    new_ranks = [max(old, rank, _rank(layer, A)) for old, (A, _) in zip(ranks, pairs, strict=False)]
    padded_pairs = [padded(layer, *pair, r) for pair, r in zip(pairs, new_ranks, strict=True)]
    if (*new_ranks, 0)[:2] != ranks:
        layer.resize_adapter(adapter_name, *new_ranks)
    for parameter, value in zip(layer.parameters_of(adapter_name), sum(padded_pairs, ()), strict=True):
        parameter.copy_(value)


def _parts(layer: HiraLayer, adapter_name: str) -> list[tuple[tuple[str, str], float]]:
    """The names of A and B, and of L1 and L2, with the scales that `hira_alpha` gave them."""
    parts = [(layer.factor_names, layer.alpha_scale[adapter_name])]
    return [*parts, (layer.lora_names, layer.lora_scale[adapter_name])] if layer.lora_r[adapter_name] else parts


def padded(layer: HiraLayer, A: Tensor, B: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A and B as a layer lays them out, with zeros up to a rank: for each of the matrices that it adapts."""
    matrices = layer._factor_shapes(1)[0][0]
    A, B = A.reshape(matrices, -1, *A.shape[1:]), B.reshape(len(B), -1, matrices, *B.shape[2:])
    more = r - A.shape[1]
    A = torch.cat([A, A.new_zeros(matrices, more, *A.shape[2:])], dim=1)
    B = torch.cat([B, B.new_zeros(len(B), more, *B.shape[2:])], dim=1)
    return A.flatten(0, 1), B.flatten(1, 2)


def _rank(layer: HiraLayer, A: Tensor) -> int:
    return len(A) // layer._factor_shapes(1)[0][0]


def _settle_ranks(model: Any, config: Any, adapter_name: str) -> None:
    for layer in model.modules():
        if isinstance(layer, HiraLayer) and adapter_name in layer.tied_to:
            holder = layer.tied_to[adapter_name]
            layer.resize_adapter(adapter_name, holder.r[adapter_name], holder.lora_r[adapter_name])
    set_ranks(config, model, adapter_name)


def _named(model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors by the names of the model's parameters."""
    return with_name(in_names_of(model, nameless(state_dict, adapter_name)), adapter_name)


def _check_configs(own: Any, config: Any) -> None:
    for field in _WHOLE:
        for value in (getattr(own, field, None), getattr(config, field, None)):
            if value:
                raise HiraError(
                    f"An adapter has {field} {value}, and hot-swapping replaces A and B alone: load it as another "
                    "adapter instead."
                )
    for field in _SAME:
        values = [_plain(getattr(each, field, None)) for each in (own, config)]
        if values[0] != values[1]:
            raise HiraError(
                f"{field} is {values[0]} for the adapter in the model and {values[1]} for the other; adapters that are "
                "swapped have to agree. Load it as another adapter instead."
            )


def _plain(value: Any) -> Any:
    """A field's value in a form in which one that was read from JSON compares."""
    if isinstance(value, list | tuple | set):
        items = [tuple(item) if isinstance(item, list | tuple) else item for item in value]
        return sorted(items) if all(isinstance(item, str) for item in items) else items
    return value


def _check_layer(name: str, layer: HiraLayer, adapter_name: str) -> None:
    if adapter_name in layer.merged_adapters:
        raise HiraError(
            f"Adapter {adapter_name!r} is merged into {name}: call unmerge_adapter() before it is swapped, and merge "
            "again."
        )
    for parameter in layer.parameters_of(adapter_name):
        if parameter.is_meta or is_dtensor(parameter) or parameter.numel() == 0:
            raise HiraError(
                f"A and B of {name} are offloaded, or spread over processes, where no other adapter can be swapped in. "
                "Load it as another adapter instead."
            )
