"""A batch whose rows have an adapter each: the rows of one adapter are computed together."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hira.distributed.detection import is_gathered_by_call, sharded_by
from hira.errors import HiraError

if TYPE_CHECKING:
    from hira.layers.base import HiraLayer

BASE = "__base__"  # in adapter_names, a row without an adapter
# the adapter_names of the mixed batch that a model computes
adapters_of_rows: ContextVar[list[str] | None] = ContextVar("adapters_of_rows", default=None)


def output(layer: HiraLayer, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
    """The layer's output with an adapter for each row of x.

    Args:
        layer: the layer.
        x: (rows, ...), the base layer's input.
        adapter_names: one name for each row; of a name that the layer lacks, such as BASE, the base layer's output.

    Raises:
        HiraError: adapters are merged, the names are not of x's length, or other processes would have to wait.
    """
    if layer.merged:
        raise HiraError(
            f"adapter_names was passed while {layer.merged_adapters} are merged into {layer.name or 'a layer'}; call "
            "unmerge_adapter() first."
        )
    if len(adapter_names) != len(x):
        raise HiraError(
            f"adapter_names names {len(adapter_names)} rows, but {layer.name or 'a layer'} got {len(x)}; pass one "
            "name for each sample of the batch."
        )
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(adapter_names):
        rows.setdefault(name if name in layer.r else BASE, []).append(row)
    _check_processes_agree(layer, rows)
    if len(rows) == 1:
        return layer._adapted(x, layer._present(list(rows)), *args, **kwargs)
    parts = layer._mixed_parts(x, rows, *args, **kwargs)
    order = torch.tensor([row for group in rows.values() for row in group], device=x.device)
    return torch.cat(parts)[torch.argsort(order)]


def _check_processes_agree(layer: HiraLayer, rows: dict[str, list[int]]) -> None:
    """Refuse a mixed batch where the rows of a process decide what it gathers, and other processes would wait."""
    base = layer.storage.layer
    calls_differ = len(rows) > 1 and is_gathered_by_call(base)
    if calls_differ or sharded_by(base, layer.storage.name) == "ZeRO-3":
        raise HiraError(
            f"adapter_names asks for {sorted(rows)}, but {layer.name or 'this layer'} is spread over processes that "
            "would gather other weights than this one, and wait; set an adapter and pass no names, or serve mixed "
            "batches on a model that is not sharded."
        )
