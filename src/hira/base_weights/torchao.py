"""The weights of torchao."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from hira.base_weights.dense import Storage
from hira.ops.linear import Dequantize


class Torchao(Storage):
    """A tensor of torchao as the weight of an `nn.Linear`: 8-bit integers, integers of 1 to 8 bits, or 8-bit floats.

    A weight whose layer rounds x to 8 bits as well is not served: torchao gives x no gradient there.
    """

    is_dense = False

    @classmethod
    def serves(cls, layer: Any, name: str = "weight") -> bool:
        weight = getattr(layer, name, None)
        return isinstance(layer, nn.Linear) and _quantise_as(weight) is not None

    def saved_for_backward(self) -> tuple[Tensor, Dequantize]:
        return self.stored, _dequantize

    def write(self, weight: Tensor) -> None:
        old = self.stored
        quantise: Any = _quantise_as(old)
        self.layer.weight = nn.Parameter(quantise(weight.to(old.dtype)), requires_grad=False)

    def restore(self, snapshot: Any) -> None:
        device = self.stored.device
        self.layer.weight = snapshot if snapshot.device == device else nn.Parameter(snapshot.to(device), False)


def _dequantize(weight: Any) -> Tensor:
    dense: Tensor = weight.detach().dequantize()
    return dense


def _quantise_as(weight: Any) -> Callable[[Tensor], Tensor] | None:
    """What quantises a dense weight with the settings of a tensor of torchao; None for a tensor that is not served."""
    library: Any = sys.modules.get("torchao.quantization")
    if library is None:
        return None
    kind = type(weight)
    if kind is library.Int8Tensor and weight.act_quant_kwargs is None and weight.act_pre_scale is None:
        granularity, mapping = _granularity(library, weight), _mapping(library, weight)
        return lambda dense: kind.from_hp(dense, granularity, mapping, reduce_range=weight.reduce_range)
    if kind is library.Float8Tensor and weight.act_quant_kwargs is None:
        granularity, preference = _granularity(library, weight), weight.kernel_preference
        return lambda dense: kind.from_hp(
            dense, weight.qdata.dtype, granularity, mm_config=weight.mm_config, kernel_preference=preference
        )
    if kind is library.IntxUnpackedToInt8Tensor and weight.activation_quantization is None:
        mapping = _mapping(library, weight)
        return lambda dense: kind.from_hp(dense, tuple(weight.block_size), weight.target_dtype, mapping_type=mapping)
    return None


def _granularity(library: Any, weight: Any) -> Any:
    rows, columns = weight.block_size
    if columns != weight.shape[1]:
        return library.PerGroup(columns)
    return library.PerTensor() if rows == weight.shape[0] and rows > 1 else library.PerRow()


def _mapping(library: Any, weight: Any) -> Any:
    shifted = weight.zero_point is not None and bool(weight.zero_point.any())
    return library.MappingType.ASYMMETRIC if shifted else library.MappingType.SYMMETRIC
