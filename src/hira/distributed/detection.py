"""How a base weight is sharded over processes, as far as a layer can tell from its own module."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hira.errors import HiraError

_FSDP2: Any = ()
_DTENSOR: Any = ()
if torch.distributed.is_available():
    from torch.distributed.fsdp import FSDPModule as _FSDP2
    from torch.distributed.tensor import DTensor as _DTENSOR


def is_dtensor(tensor: Any) -> bool:
    """Whether a tensor is one of `torch.distributed`, of which this process holds a part."""
    return isinstance(tensor, _DTENSOR)


def sharded_by(layer: nn.Module, name: str = "weight") -> str | None:
    """What shards a layer's parameter over processes, as a name; None where this process holds all of it."""
    parameter = _parameter(layer, name)
    if hasattr(parameter, "ds_id"):
        return "ZeRO-3"
    if getattr(layer, "_is_fsdp_managed_module", False):  # both FSDPs mark all modules that they manage, for Dynamo
        return "FSDP"
    return "tensor parallelism" if is_dtensor(parameter) else None


def is_gathered_by_call(layer: nn.Module) -> bool:
    """Whether the layer's own call gathers its weight, because the layer is a shard group of FSDP by itself.

    All processes have to call such a layer equally often, or they wait for each other.
    """
    return isinstance(layer, _FSDP2)


def is_laid_out_by_call(layer: nn.Module, name: str = "weight") -> bool:
    """Whether the layer's own call gathers its parameter, or redistributes x for the part that this process holds."""
    return is_gathered_by_call(layer) or is_dtensor(_parameter(layer, name))


def only_gathers(hook: Any) -> bool:
    """Whether a hook on a layer belongs to ZeRO-3, whose hooks gather the weight and do nothing else."""
    return str(getattr(hook, "__module__", "")).startswith("deepspeed.")


def check_not_sharded(layer: nn.Module, name: str) -> None:
    """Refuse a parameter that is sharded over processes, for a layer whose module multiplies by it in its own forward.

    There the parameter is replaced by W', which hooks cannot gather.
    """
    parameter = _parameter(layer, name)
    if hasattr(parameter, "ds_id") or is_dtensor(parameter):
        raise HiraError(
            f"The {name} of {type(layer).__name__} is sharded over processes by {sharded_by(layer, name)}. HiRA adapts "
            "attention and single parameters with FSDP alone, in a group with their block. Shard the model so, or "
            "leave them out of target_modules and target_parameters."
        )


def _parameter(layer: nn.Module, name: str) -> Any:
    # by `dict.get`, since DeepSpeed's class of dict gathers what is read from it
    return dict.get(layer._parameters, name)
