"""Which way a base weight is spread over processes, as far as a layer can tell from its own module."""

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


def spread(layer: nn.Module, name: str = "weight") -> str | None:
    """What spreads a layer's parameter over processes, in words; None where the process holds all of it."""
    parameter = _parameter(layer, name)
    if hasattr(parameter, "ds_id"):
        return "ZeRO-3"
    if getattr(layer, "_is_fsdp_managed_module", False):  # both FSDPs mark all modules that they manage, for Dynamo
        return "FSDP"
    return "tensor parallelism" if is_dtensor(parameter) else None


def is_gathered_by_call(layer: nn.Module) -> bool:
    """Whether the layer's own call gathers its weight: where it is a shard group of FSDP by itself.

    Processes that called such a layer a different number of times would wait for each other.
    """
    return isinstance(layer, _FSDP2)


def is_laid_out_by_call(layer: nn.Module, name: str = "weight") -> bool:
    """Whether the layer's own call gathers its parameter, or lays x out for the part that this process holds."""
    return is_gathered_by_call(layer) or is_dtensor(_parameter(layer, name))


def only_gathers(hook: Any) -> bool:
    """Whether a hook on a layer is one of ZeRO-3, which gathers the weight for whoever reads it in a forward."""
    return str(getattr(hook, "__module__", "")).startswith("deepspeed.")


def check_is_here(layer: nn.Module, name: str) -> None:
    """Refuse a parameter that is spread over processes, for a layer that lets its module's own forward multiply by it.

    What stands in for the parameter there is not what hooks gather, in backward least of all.
    """
    parameter = _parameter(layer, name)
    if hasattr(parameter, "ds_id") or is_dtensor(parameter):
        raise HiraError(
            f"The {name} of {type(layer).__name__} is spread over processes by {spread(layer, name)}. HiRA adapts "
            "attention and single parameters with FSDP alone, in a group with their block. Shard the model so, or "
            "leave them out of target_modules and target_parameters."
        )


def _parameter(layer: nn.Module, name: str) -> Any:
    # past DeepSpeed's dict, which gathers what is read from it
    return dict.get(layer._parameters, name)
