"""The weights of AQLM."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hira.ops.linear import Dequantize
from hira.weights import ReadOnly


class Aqlm(ReadOnly):
    """Sums of vectors from learned codebooks, in a `QuantizedLinear` of AQLM."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer, "codes")

    @classmethod
    def serves(cls, layer: Any, name: str = "codes") -> bool:
        library: Any = sys.modules.get("aqlm.inference")
        return library is not None and isinstance(layer, library.QuantizedLinear)

    @property
    def plain_forwards(self) -> tuple[Callable[..., Any], ...]:
        return (type(self.layer).forward,)

    @property
    def dequantize(self) -> Dequantize:
        layer = self.layer
        codebooks, scales = layer.codebooks.detach(), layer.scales.detach()
        return partial(_dequantize, bits=layer.nbits_per_codebook, codebooks=codebooks, scales=scales)


def _dequantize(codes: Tensor, bits: int, codebooks: Tensor, scales: Tensor) -> Tensor:
    unsigned = codes.detach().to(torch.int64) % 2**bits
    weight: Tensor = sys.modules["aqlm.utils"]._dequantize_weight(unsigned, codebooks, scales)
    return weight
