"""The scale that `hira_alpha` gives an adapter in each layer, so that HiRA trains at LoRA's learning rate."""

from __future__ import annotations

import math
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hira.distributed.detection import is_dtensor
from hira.distributed.gathering import gathered
from hira.errors import HiraError
from hira.layers import merging
from hira.ops.workspace import formation_dtype

if TYPE_CHECKING:
    from hira.layers.base import HiraLayer

# whether adapters are made without the scale of `hira_alpha`: for tensors that go into the layers as a file has them,
# with the scale in B, or on the meta device
takes_files_as_they_are: ContextVar[bool] = ContextVar("takes_files_as_they_are", default=False)

_NEEDS_WEIGHT = (
    "hira_alpha scales each layer's adapter by the size of its weight, which cannot be read here. Load the base "
    "model's weights, and have them quantised, before it is adapted, and adapt it before it is sharded; or leave "
    "hira_alpha out."
)


def alpha_scales(layer: HiraLayer, config: Any, r: int) -> tuple[float, float]:
    """What the `hira_alpha` of a configuration multiplies B, and L2, by in a layer; 1 without one.

    Args:
        layer: the layer, whose base weight is read.
        config: the HiraConfig, for this layer.
        r: the rank of BA in it.

    Raises:
        HiraError: the base weight has no values here, or is not quantised yet.
    """
    alpha = getattr(config, "hira_alpha", None)  # not in PEFT's config
    if alpha is None or takes_files_as_they_are.get():
        return 1, 1
    ranks = [math.sqrt(rank) if config.use_rslora else rank for rank in (r, config.lora_r)]
    with gathered(layer.get_base_layer()):
        try:
            W0 = merging.read_original(layer)
        except HiraError as error:
            raise HiraError(f"{_NEEDS_WEIGHT} {error}") from error
        alpha_scale = scale_of_alpha(alpha, ranks[0], W0)
    return alpha_scale, power_of_two(alpha / ranks[1]) if ranks[1] else 1


def scale_of_alpha(alpha: float, r: float, W0: Tensor) -> float:
    """The power of two that is nearest to ``alpha / (r rms(W0))``, with the square root of the rank for r if so set.

    A step of Adam at some rate changes W' by that times as much as if B had no scale: as much as it changes the weight
    of a LoRA of this alpha and rank, alpha / r times its BA.

    Raises:
        HiraError: W0 has no values here: it is on the meta device, or in other processes.
    """
    if W0.is_meta or W0.numel() == 0 or is_dtensor(W0):
        raise HiraError(_NEEDS_WEIGHT)
    rms = float(torch.linalg.vector_norm(W0.detach(), dtype=formation_dtype(W0.dtype))) / math.sqrt(W0.numel())
    return power_of_two(alpha / (r * rms)) if 0 < rms < math.inf else 1


def power_of_two(value: float) -> float:
    """The power of two that is nearest to a positive number, by its logarithm; an integer where it is one."""
    exponent = round(math.log2(value))
    return 2**exponent if exponent >= 0 else 2.0**exponent
