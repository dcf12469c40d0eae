"""What a model finds that reads a layer's weight instead of calling the layer: W' in a forward, else the weight."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hira.base_weights.dense import Transposed
from hira.distributed.detection import is_dtensor
from hira.errors import HiraError
from hira.layers import merging
from hira.layers.lazy_weight import Expert, weight_of_layer
from hira.layers.mixed_batch import adapters_of_rows
from hira.ops.linear import Dequantize

if TYPE_CHECKING:
    from hira.layers.base import HiraLayer

_CALL = nn.Module._call_impl.__code__


def parameter(layer: HiraLayer, name: str) -> Tensor:
    """A parameter of the base layer, or W' if that is the adapted one and a forward reads it.

    Args:
        layer: the layer.
        name: the parameter's name.
    """
    storage = layer.storage
    if name == storage.name and storage.takes_dense and (layer.weight_is_read or _is_in_a_call()):
        names = layer._applied()
        if layer.weight_is_read or torch.compiler.is_compiling():
            if names:
                W0 = merging.read_original(layer)
                return layer._stored_orientation(layer._effective_weight(W0, *layer._factors(names)))
        elif (rows := adapters_of_rows.get()) is not None and any(layer._present([row]) != names for row in rows):
            return layer._lazy_weight(list(layer.r), partial(_refuse_rows, layer, names))
        elif names:
            return layer._lazy_weight(names)
    weight: Tensor = getattr(layer._modules["base_layer"], name)
    return weight


def lazy_weight(layer: HiraLayer, names: Sequence[str], dequantize: Dequantize | None = None) -> Tensor:
    """W' that is formed where it is multiplied by: often a forward reads no more than its dtype.

    Args:
        layer: the layer.
        names: the adapters.
        dequantize: reads W0 of the stored weight, in the place of the storage's own.
    """
    storage = layer.storage
    with merging.holding_W0(layer) if layer.record is not None else nullcontext():
        stored: Any = storage.stored
        reads: Dequantize | None
        if is_dtensor(stored):
            reads = lambda _: storage.read()  # noqa: E731  # which says why it cannot be read
        else:
            stored, reads = storage.saved_for_backward()
    factors = layer._factors(names)
    expert = Expert(*layer._matrices(stored, *factors))
    if (read := dequantize or reads) is not None:
        expert = expert._replace(dequantize=lambda _: layer._matrices(read(stored), *factors)[0])
    return weight_of_layer(
        expert, transposed=isinstance(storage, Transposed), kernel=stored.shape if stored.dim() > 2 else None
    )


def _refuse_rows(layer: HiraLayer, active: list[str], stored: Tensor) -> Tensor:
    raise HiraError(
        f"adapter_names asks for other adapters than the active {active}, but the model multiplies by the weight "
        f"of {layer.name or 'a layer'} itself, which is one for all rows; set the adapter and pass no names."
    )


def _is_in_a_call() -> bool:
    """Whether a module is being called: only then is a weight read to compute with; else to load, tie or resize it."""
    if torch.compiler.is_compiling():
        return True
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _CALL:
            return True
        frame = frame.f_back
    return False
