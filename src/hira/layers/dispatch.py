"""Which layer class serves which module: one ordered table, in which the first that answers wins."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from hira.base_weights.aqlm import Aqlm
from hira.base_weights.dense import Storage
from hira.base_weights.gptq import Gptq
from hira.base_weights.hqq import Hqq
from hira.base_weights.torchao import Torchao
from hira.distributed.detection import sharded_by
from hira.errors import HiraError
from hira.layers.attention import dispatch_attention
from hira.layers.base import HiraLayer
from hira.layers.bitsandbytes import dispatch_bnb_4bit, dispatch_bnb_8bit
from hira.layers.conv import Conv1d, Conv2d, Conv3d
from hira.layers.embedding import Embedding
from hira.layers.experts import ParamWrapper
from hira.layers.linear import Linear

Dispatcher = Callable[..., nn.Module | None]


def dispatch_default(target: nn.Module, adapter_name: str, hira_config: Any, **kwargs: Any) -> nn.Module | None:
    """Return a HiRA layer for a linear, embedding or convolution layer with a dense weight, None for another module.

    Args:
        target: the module, or another tuner's layer around it.
        adapter_name: the adapter's name.
        hira_config: its HiraConfig.
        **kwargs: `r`, the rank, if not the config's; PEFT passes more, which is not needed.

    Raises:
        HiraError: the module's type is served, but not the way in which its weight is stored.
    """
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    layer: type[HiraLayer]
    options: dict[str, Any] = {}
    if isinstance(base, nn.Embedding):
        layer = Embedding
    elif isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        layer = {1: Conv1d, 2: Conv2d, 3: Conv3d}[base.weight.dim() - 2]
    elif isinstance(base, nn.Linear | Conv1D):
        layer = Linear
        is_conv1d = isinstance(base, Conv1D)
        options = {"fan_in_fan_out": is_conv1d, "is_target_conv_1d_layer": is_conv1d}
        if hira_config.fan_in_fan_out != is_conv1d:
            warnings.warn(
                f"fan_in_fan_out is set to {hira_config.fan_in_fan_out} but the target module is a "
                f"{type(base).__name__}. Setting fan_in_fan_out to {is_conv1d}.",
                stacklevel=2,
            )
    else:
        return None
    _check_dense(base)
    return layer(target, adapter_name, hira_config, kwargs.get("r"), **options)


def dispatch_parameter(
    target: nn.Module, adapter_name: str, hira_config: Any, *, parameter_name: str | None = None, **kwargs: Any
) -> nn.Module | None:
    """Return the layer for a single parameter of a module, None where the module itself is adapted.

    Args:
        target, adapter_name, hira_config, **kwargs: as for `dispatch_default`.
        parameter_name: the parameter's name.

    Raises:
        HiraError: the parameter cannot be served, or the module has single parameters that are adapted.
    """
    if parameter_name is not None:
        return ParamWrapper(target, adapter_name, hira_config, kwargs.get("r"), parameter_name=parameter_name)
    if isinstance(target, ParamWrapper):
        raise HiraError(
            f"Its parameter {target.parameter_name} is adapted on its own already; target it with target_parameters or "
            "the module with target_modules, not both."
        )
    return None


def linear_stored_as(storage: type[Storage]) -> Dispatcher:
    """Return a dispatcher for linear layers whose weight is stored in some way.

    Args:
        storage: the way; its constructor raises a HiraError for a layer whose weight cannot be read.
    """

    def dispatch_storage(target: nn.Module, adapter_name: str, hira_config: Any, **kwargs: Any) -> nn.Module | None:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not storage.serves(base):
            return None
        storage(base)  # raises if this layer cannot be read
        return Linear(target, adapter_name, hira_config, kwargs.get("r"), storage_type=storage)

    return dispatch_storage


DISPATCHERS: tuple[Dispatcher, ...] = (
    dispatch_parameter,
    dispatch_bnb_8bit,
    dispatch_bnb_4bit,
    linear_stored_as(Aqlm),
    linear_stored_as(Gptq),
    linear_stored_as(Hqq),
    linear_stored_as(Torchao),
    dispatch_attention,
    dispatch_default,
)


def dispatch(target: nn.Module, adapter_name: str, hira_config: Any, **kwargs: Any) -> nn.Module:
    """Return the HiRA layer that serves a module.

    Args:
        target, adapter_name, hira_config, **kwargs: as for `dispatch_default`.

    Raises:
        HiraError: no layer serves the module.
    """
    for dispatcher in DISPATCHERS:
        layer = dispatcher(target, adapter_name, hira_config=hira_config, **kwargs)
        if layer is not None:
            return layer
    raise HiraError(
        f"Target module {target} is not supported. HiRA adapts nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, "
        "nn.Conv3d, nn.MultiheadAttention, transformers' Conv1D and the quantised linear layers that "
        "docs/base_layers.md lists."
    )


def _check_dense(base: nn.Module) -> None:
    if not Storage.serves(base):
        weight: Any = base.weight
        if (by := sharded_by(base)) == "FSDP":
            raise HiraError(
                f"Target module {base} is not supported: {by} has sharded its weight already, and would not shard the "
                "adapter with it. Adapt the model first, then shard it."
            )
        raise HiraError(
            f"Target module {base} is not supported: its weight is a {type(weight.data).__name__} of {weight.dtype}. "
            "HiRA reads dense float weights and the quantised ones that docs/base_layers.md lists; adapt the model "
            "before it is quantised, or leave this module out with exclude_modules."
        )
