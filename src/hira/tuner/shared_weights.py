"""Adapters of layers that share a base weight: tied embeddings, and layers that are replicated."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

from peft.tuners.tuners_utils import replicate_layers
from torch import nn

from hira.errors import HiraError
from hira.layers.base import HiraLayer

_MARK = "layer_replication"


def tie(config: Any, model: Any, tied: list[str], targets: Callable[[str], bool]) -> None:
    """Make a configuration with `ensure_weight_tying` adapt, or save, all modules with one weight if it does any.

    Args:
        config: the HiraConfig. `target_modules` gets the names of all, so that a reader that ties nothing finds them
            too; `modules_to_save` that of the input embedding, whose copy the others get.
        model: the base model.
        tied: the names of the modules whose weight is the input embedding's.
        targets: says whether the configuration targets a module, by the module's name.
    """
    if not tied:
        warnings.warn("ensure_weight_tying is set, but no tied modules were found in the model.", stacklevel=2)
        return
    embedding = model.get_input_embeddings()
    first: str = next(name for name, module in model.named_modules() if module is embedding)
    names, saved = [first, *tied], list(config.modules_to_save or ())
    if any(_ends(name, each) for name in names for each in saved):
        others = [each for each in saved if not any(_ends(name, each) for name in names)]
        config.modules_to_tie, config.modules_to_save = set(tied), [*others, first]
    elif any(map(targets, names)):
        config.target_modules_to_tie = set(tied)
        if isinstance(config.target_modules, str):
            config.target_modules = "|".join([f"(?:{config.target_modules})", *map(re.escape, names)])
        else:
            config.target_modules = {*(config.target_modules or ()), *names}
    elif config.trainable_token_indices is None:
        warnings.warn(
            f"ensure_weight_tying is set, but none of {', '.join(names)}, which share a weight, is in target_modules "
            "or modules_to_save.",
            stacklevel=2,
        )


def is_tied(config: Any, key: str) -> bool:
    """Whether a module's adapter is that of the input embedding."""
    return any(_ends(key, name) for name in getattr(config, "target_modules_to_tie", None) or ())


def tie_adapter(layer: HiraLayer, adapter_name: str, model: Any) -> None:
    """Give a layer the adapter of the input embedding, whose weight it shares.

    Raises:
        HiraError: the embedding has no such adapter, or the layer's weight is not the embedding's.
    """
    embedding: Any = model.get_input_embeddings()
    if not isinstance(embedding, HiraLayer) or not embedding._present([adapter_name]):
        raise HiraError(
            "ensure_weight_tying needs an adapter on the input embedding, which the configuration excludes; take it "
            "out of exclude_modules and layers_to_transform, or leave out ensure_weight_tying."
        )
    if layer.storage.stored is not embedding.storage.stored:
        raise HiraError("its weight is not the input embedding's, with which ensure_weight_tying would tie it.")
    layer.tie_adapter(adapter_name, embedding)


def replicate(model: Any, config: Any, others: dict[str, Any]) -> None:
    """Stack layers of a model as `layer_replication` says, once: other adapters of the model have the same.

    The new list of layers remembers the ranges, so that an adapter that comes when the first is gone stacks none again.

    Args:
        model: the base model, which is changed.
        config: the HiraConfig.
        others: the configurations of the adapters that the model has already.

    Raises:
        HiraError: another adapter has another `layer_replication` or none, a range ends beyond the model's layers, or
            they are not found.
    """
    wanted = _ranges(config)
    for name, other in others.items():
        if _ranges(other) != wanted:
            raise HiraError(
                f"layer_replication is {wanted}, but {_ranges(other)} for adapter {name!r}: adapters of one model must "
                "have the same, since it changes the model's layers."
            )
    if wanted is None or others or any(vars(module).get(_MARK) == wanted for module in model.modules()):
        return
    before = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    last = max(end for _, end in wanted)
    if not any(len(layers) >= last for layers in before.values()):
        sizes = sorted({len(layers) for layers in before.values()})
        raise HiraError(f"layer_replication has a range up to layer {last}, but the model's lists are of {sizes}.")
    try:
        replicate_layers(model, wanted)
    except (ValueError, IndexError, AttributeError) as error:
        raise HiraError(f"layer_replication {wanted} does not fit the model: {error}.") from error
    order = [i for start, end in wanted for i in range(start, end)]
    for name, old in before.items():
        new = model.get_submodule(name)
        if new is not old:
            setattr(new, _MARK, wanted)
            for i, layer in zip(order, new, strict=True):
                _share_parameters(old[i], layer)


def _share_parameters(source: nn.Module, copy: nn.Module) -> None:
    """Give a copy of a module its parameters; PEFT registers them, which moves them to where accelerate says."""
    for name, module in source.named_modules():
        copy.get_submodule(name)._parameters.update(module._parameters)


def _ranges(config: Any) -> list[tuple[int, int]] | None:
    ranges = getattr(config, "layer_replication", None)  # not in PEFT's config
    return None if ranges is None else [(start, end) for start, end in ranges]


def _ends(key: str, name: str) -> bool:
    return f".{key}".endswith(f".{name}")
