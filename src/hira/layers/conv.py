"""HiRA on convolutions of one, two and three dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from hira import ops
from hira.errors import HiraError
from hira.layers.base import HiraLayer


class ConvNd(HiraLayer):
    """HiRA on a convolution: A (r, in / groups, *kernel), B (out, r, 1, ...), multiplied over flattened kernels.

    Args:
        base_layer, adapter_name, config, r: as for Linear.

    Raises:
        HiraError: the rank is not a positive integer, or the convolution has another number of dimensions.

    Source: HiRA (ICLR 2025), equation 5, on the weight flattened to (out, in / groups * kernel).
    """

    spatial_dims: ClassVar[int | None] = None

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: Any, r: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(base_layer, **kwargs)
        found = self.get_base_layer().weight.dim() - 2
        if self.spatial_dims not in (None, found):
            raise HiraError(f"{type(self).__name__} is for {self.spatial_dims} spatial dimensions, not {found}.")
        # short convolutions over each channel alone are often applied by kernels that take the weight
        self.weight_is_read = self.get_base_layer().groups == self.get_base_layer().in_channels > 1
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config.r if r is None else r, config=config)

    @staticmethod
    def _features(base: Any) -> tuple[int, int]:
        return base.in_channels, base.out_channels

    def _factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        _, *rest = self.get_base_layer().weight.shape
        return (r, *rest), (self.out_features, r, *(1 for _ in rest[1:]))

    def _convolve(self, x: Tensor, names: Sequence[str], bias: Tensor | None, *, update_only: bool = False) -> Tensor:
        base = self.get_base_layer()
        padding, pad = _padding(base)
        if pad is not None:
            x = F.pad(x, pad, mode="constant" if base.padding_mode == "zeros" else base.padding_mode)
        W0, dequantize = self.storage.saved_for_backward()
        A, B, lora_r = self._factors(names)
        return ops.conv(
            x,
            W0,
            A,
            B,
            bias,
            lora_r=lora_r,
            stride=base.stride,
            padding=padding,
            dilation=base.dilation,
            groups=base.groups,
            update_only=update_only,
            dequantize=dequantize,
        )

    def _product(self, x: Tensor, names: Sequence[str]) -> Tensor:
        return self._convolve(x, names, self.storage.bias)

    def _update(self, x: Tensor, names: Sequence[str], dropout: nn.Module | None = None) -> Tensor:
        return self._convolve(x if dropout is None else dropout(x), names, None, update_only=True)

    def _matrices(self, W0: Tensor, A: Tensor, B: Tensor, lora_r: int) -> tuple[Tensor, Tensor, Tensor, int]:
        return W0.flatten(1), A.flatten(1), B.flatten(1), lora_r

    def _delta(self, A: Tensor, B: Tensor) -> Tensor:
        return (B.flatten(1) @ A.flatten(1)).view(self.get_base_layer().weight.shape)


class Conv1d(ConvNd):
    """HiRA on `nn.Conv1d`; see ConvNd."""

    spatial_dims = 1


class Conv2d(ConvNd):
    """HiRA on `nn.Conv2d`; see ConvNd."""

    spatial_dims = 2


class Conv3d(ConvNd):
    """HiRA on `nn.Conv3d`; see ConvNd."""

    spatial_dims = 3


def _padding(base: Any) -> tuple[tuple[int, ...], list[int] | None]:
    """The zero padding to convolve with, and what to pad beforehand, in `F.pad`'s order, where zeros will not do."""
    dims = len(base.kernel_size)
    before_and_after = list(base._reversed_padding_repeated_twice)
    even = before_and_after[::2] == before_and_after[1::2]
    if base.padding_mode == "zeros" and even:
        return tuple(reversed(before_and_after[::2])), None
    return (0,) * dims, before_and_after
