"""The weights of GPTQ and AWQ, in the layers of GPTQModel."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from hira.base_weights.dense import ReadOnly
from hira.errors import HiraError
from hira.ops.linear import Dequantize

# the modules of its layers for PyTorch; those for other kernels pack the weight in ways of their own, and that of
# `torch_awq` rounds its scales for each dtype of x
_READABLE = ("torch", "torch_aten_kernel", "torch_aten_kernel_awq")


class Gptq(ReadOnly):
    """Codes of 2 to 8 bits that were calibrated, with a scale and a zero point for each group of rows.

    Raises:
        HiraError: the layer has repacked its weight for inference, so that it cannot be read.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer, "qweight")
        if getattr(layer, "linear_mode", None) == "inference":
            raise HiraError(
                f"This {type(layer).__name__} was run in evaluation mode and repacked its weight for inference, "
                "which cannot be undone; load the model again and adapt it before it is run."
            )
        self.layer.linear_mode = "train"  # it stays readable, with adapters disabled too

    @classmethod
    def serves(cls, layer: Any, name: str = "qweight") -> bool:
        package, _, module = type(layer).__module__.rpartition(".")
        return package == "gptqmodel.nn_modules.qlinear" and module in _READABLE

    @property
    def plain_forwards(self) -> tuple[Callable[..., Any], ...]:
        return (type(self.layer).forward,)

    def saved_for_backward(self) -> tuple[Tensor, Dequantize]:
        return self.stored, partial(_dequantize, layer=self.layer)


def _dequantize(codes: Tensor, layer: Any) -> Tensor:
    if any(method.value == "awq" for method in layer.SUPPORTS_METHODS):
        library: Any = sys.modules["gptqmodel.quantization.awq.utils.packing_utils"]
        weight: Tensor = library.dequantize_gemm(
            qweight=codes, qzeros=layer.qzeros, scales=layer.scales, bits=layer.bits, group_size=layer.group_size
        )
    else:
        # the function of the class: some instances have a compiled one
        weight = type(layer).dequantize_weight(layer)
    return weight.t()
