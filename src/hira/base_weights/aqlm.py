"""The weights of AQLM."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hira.base_weights.dense import ReadOnly
from hira.ops.linear import Dequantize


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

    def saved_for_backward(self) -> tuple[Tensor, Dequantize]:
        layer = self.layer
        codebooks, scales = layer.codebooks.detach(), layer.scales.detach()
        return self.stored, partial(_dequantize, layer=layer, codebooks=codebooks, scales=scales)


def _dequantize(codes: Tensor, layer: Any, codebooks: Tensor, scales: Tensor) -> Tensor:
    unsigned = codes.detach().to(torch.int64) % 2**layer.nbits_per_codebook
    if _is_transposed(codes, layer):
        unsigned = unsigned.transpose(0, 1)
    weight: Tensor = sys.modules["aqlm.utils"]._dequantize_weight(unsigned, codebooks, scales)
    return weight


def _is_transposed(codes: Tensor, layer: Any) -> bool:
    """Whether a first call on a CPU put the codes, (out, in, codebooks) in groups, as (in, out, codebooks)."""
    if codes.shape[0] != codes.shape[1]:
        transposed: bool = codes.shape[0] != layer.out_features // layer.out_group_size
        return transposed
    return layer.gemv_op is not None and layer.codebook_size == 256 and not codes.is_cuda
