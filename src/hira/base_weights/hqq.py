"""The weights of HQQ."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from hira.base_weights.dense import Storage
from hira.ops.linear import Dequantize


class Hqq(Storage):
    """Codes of 1 to 8 bits in an `HQQLinear`, with a scale and a zero point for each group of entries."""

    takes_dense = False
    is_dense = False
    is_one_parameter = False

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer, "W_q")

    @classmethod
    def serves(cls, layer: Any, name: str = "W_q") -> bool:
        library: Any = sys.modules.get("hqq.core.quantize")
        return library is not None and isinstance(layer, library.HQQLinear)

    @property
    def plain_forwards(self) -> tuple[Callable[..., Any], ...]:
        return (type(self.layer).forward,)  # that of the backend in use

    def saved_for_backward(self) -> tuple[Tensor, Dequantize]:
        return self.stored, partial(_dequantize, meta=self.layer.meta)

    def write(self, weight: Tensor) -> None:
        layer = self.layer
        config = copy.deepcopy(layer.quant_config)
        scratch = type(layer)(
            None,
            {**config, "offload_meta": layer.offload_meta},
            compute_dtype=layer.compute_dtype,
            device=str(self.stored.device),
        )
        scratch.quantize(weight, **config)
        layer.W_q, layer.meta = scratch.W_q, scratch.meta

    def snapshot(self) -> tuple[Tensor, dict[str, Any]]:
        return self.stored, self.layer.meta

    def restore(self, snapshot: Any) -> None:
        device = self.stored.device
        codes, meta = snapshot
        codes.data = codes.data.to(device)
        self.layer.W_q = codes
        self.layer.meta = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in meta.items()}


def _dequantize(codes: Tensor, meta: dict[str, Any]) -> Tensor:
    weight: Tensor = sys.modules["hqq.core.quantize"].Quantizer.dequantize(codes.detach(), meta)
    return weight
