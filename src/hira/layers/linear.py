"""The HiRA layers: Linear, Embedding and ConvNd, on top of HiraLayer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hira import ops
from hira.base_weights.dense import Storage, Transposed
from hira.config.hira_config import InitWeights
from hira.distributed.detection import sharded_by
from hira.errors import HiraError
from hira.layers.base import BASE, HiraLayer
from hira.layers.inference_cache import inference_cache
from hira.layers.lazy_weight import Expert, LazyWeight
from hira.layers.substitution import substituted
from hira.ops import effective_weight, heuristics
from hira.ops.embedding import bound_norm
from hira.ops.workspace import is_concrete

__all__ = ["Conv1d", "Conv2d", "Conv3d", "ConvNd", "Embedding", "HiraLayer", "Linear"]


class Linear(HiraLayer):
    """HiRA on `nn.Linear`, or on a transformers `Conv1D` or another layer that stores its weight as (in, out).

    Args:
        base_layer: the layer to adapt.
        adapter_name: the first adapter's name.
        config: its HiraConfig.
        r: its rank; ``config.r`` by default.
        fan_in_fan_out: whether the weight is stored as (in, out).
        is_target_conv_1d_layer: whether the base layer is a `Conv1D`.
        storage_type: how the base layer stores its weight, where not as a dense parameter.

    Raises:
        HiraError: the rank is not a positive integer.

    Source: HiRA (ICLR 2025), equation 5.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: Any,
        r: int | None = None,
        fan_in_fan_out: bool = False,
        is_target_conv_1d_layer: bool = False,
        storage_type: type[Storage] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(base_layer, **kwargs)
        if storage_type is not None:
            self.storage_type = storage_type
        elif fan_in_fan_out:
            self.storage_type = Transposed
        self.fan_in_fan_out = fan_in_fan_out
        self.is_target_conv_1d_layer = is_target_conv_1d_layer
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config.r if r is None else r, config=config)

    @staticmethod
    def _features(base: Any) -> tuple[int, int]:
        if isinstance(base, Conv1D):
            return base.weight.shape[0], base.weight.shape[1]
        return base.in_features, base.out_features

    def _product(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return self._linear(x, A, B, self.storage.bias)

    def _update(self, x: Tensor, A: Tensor, B: Tensor, dropout: nn.Module | None = None) -> Tensor:
        return self._linear(x if dropout is None else dropout(x), A, B, update_only=True)

    def _linear(
        self, x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None = None, *, update_only: bool = False
    ) -> Tensor:
        storage = self.storage
        dtype = storage.compute_dtype
        y = ops.linear(
            x if dtype is None else x.to(dtype),
            storage.kept(),
            A,
            B,
            bias,
            update_only=update_only,
            dequantize=storage.dequantize,
            weight_gradient="int8" if set(self.weight_gradient.values()) == {"int8"} else "exact",
        )
        return y if dtype is None else y.to(x.dtype)

    def _active(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        keeps = not torch.compiler.is_compiling() and inference_cache.keeps
        weight = self._kept_weight(x, names) if keeps and self._is_one_product(names, args, kwargs) else None
        if weight is None:
            return super()._active(x, names, *args, **kwargs)
        bias = self.storage.bias
        return F.linear(x, weight, bias if bias is None else bias.to(weight.dtype))

    def _kept_weight(self, x: Tensor, names: list[str]) -> Tensor | None:
        """W' for generation, kept from token to token; None where it is better formed as it is used."""
        storage = self.storage
        if torch.is_grad_enabled() or heuristics.plain() or sharded_by(storage.layer) or storage.dequantize is not None:
            return None
        sources = [storage.stored, *(factors[name] for factors in self._factor_dicts for name in names)]
        dtype = effective_weight.product_dtype(x, sources[0].dtype)
        if (
            sources[0].is_meta
            or (x.dtype != dtype and not effective_weight.autocasts(x.device))
            or any(source.is_inference() or not is_concrete(source) for source in sources)
        ):
            return None
        scales = [self._scale(name) for name in names]
        weight = inference_cache.get(self, sources, scales, dtype)
        if weight is None and heuristics.keeps_weight(x):
            A, B = self._factors(names)
            form = partial(effective_weight.form, storage.kept(), A, B, dtype)
            weight = inference_cache.put(self, sources, scales, dtype, form)
        return weight

    def _mixed_parts(self, x: Tensor, rows: dict[str, list[int]], *args: Any, **kwargs: Any) -> list[Tensor]:
        tokens_per_row = x[0].numel() // x.shape[-1]
        single = [name for name in rows if name != BASE and len(rows[name]) * tokens_per_row == 1]
        single = [name for name in single if self._is_one_product([name], args, kwargs)]
        if len(single) < 2 or self.storage.dequantize is not None:
            return super()._mixed_parts(x, rows, *args, **kwargs)
        tokens = x[[rows[name][0] for name in single]].reshape(-1, x.shape[-1])
        factors = [self._factors([name]) for name in single]
        y = ops.linear_each(tokens, self.storage.kept(), factors, self.storage.bias)
        found = dict(zip(single, y.view(len(single), 1, *x.shape[1:-1], -1), strict=True))
        others = {name: rows[name] for name in rows if name not in found}
        found.update(zip(others, super()._mixed_parts(x, others), strict=True))
        return [found[name] for name in rows]

    def _delta(self, A: Tensor, B: Tensor) -> Tensor:
        return self._stored_orientation(B @ A)

    def _stored_orientation(self, W0: Tensor) -> Tensor:
        return W0.t() if self.fan_in_fan_out else W0


class Embedding(HiraLayer):
    """HiRA on `nn.Embedding`: A (r, num_embeddings), B (dim, r), ``W' = W0 * (1 + (BA)^T)``.

    Args:
        base_layer, adapter_name, config, r: as for Linear.
        fan_in_fan_out: accepted for PEFT, without effect.

    Raises:
        HiraError: the rank is not a positive integer.

    Source: HiRA (ICLR 2025), equation 5, on the rows that are looked up.
    """

    factor_names = ("hira_embedding_A", "hira_embedding_B")

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: Any,
        r: int | None = None,
        fan_in_fan_out: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(base_layer, **kwargs)
        self.fan_in_fan_out = fan_in_fan_out
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config.r if r is None else r, config=config)

    @staticmethod
    def _features(base: Any) -> tuple[int, int]:
        return base.num_embeddings, base.embedding_dim

    def _init_factors(self, A: Tensor, B: Tensor, r: int, init_weights: InitWeights) -> None:
        nn.init.zeros_(A)
        nn.init.normal_(B)

    def _lookup(self, ids: Tensor, A: Tensor, B: Tensor, **options: Any) -> Tensor:
        base = self.get_base_layer()
        return ops.embedding(
            ids,
            self.storage.read(),
            A,
            B,
            padding_idx=base.padding_idx,
            scale_grad_by_freq=base.scale_grad_by_freq,
            sparse=base.sparse,
            **options,
        )

    def _product(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        base = self.get_base_layer()
        return self._lookup(x, A, B, max_norm=base.max_norm, norm_type=base.norm_type)

    def _base_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output; with `max_norm` it would rescale the frozen table in place."""
        if self._bounds_norm(args, kwargs):
            return self._bounded(self._rows(x))
        return super()._base_output(x, *args, **kwargs)

    def _combined(self, x: Tensor, names: list[str], base_output: Callable[[], Tensor]) -> Tensor:
        if self.get_base_layer().max_norm is None or not any(self._drops(name) for name in names):
            return super()._combined(x, names, base_output)
        y = self._rows(x)
        for name in names:
            y = y + self._update(x, *self._factors([name]), self.hira_dropout[name])
        return self._bounded(y)

    def _bounds_norm(self, args: Any, kwargs: Any) -> bool:
        return self.get_base_layer().max_norm is not None and self._is_plain() and not (args or kwargs)

    def _rows(self, ids: Tensor) -> Tensor:
        base = self.get_base_layer()
        return F.embedding(
            ids, self.storage.read(), base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq, sparse=base.sparse
        )

    def _bounded(self, y: Tensor) -> Tensor:
        base = self.get_base_layer()
        return bound_norm(y, base.max_norm, base.norm_type)

    def _update(self, x: Tensor, A: Tensor, B: Tensor, dropout: nn.Module | None = None) -> Tensor:
        keep = None if dropout is None else dropout(torch.ones(x.shape, device=x.device))
        update = self._lookup(x, A, B, keep=keep, update_only=True)
        scale = self._get_embed_scale()
        return update if scale is None else update * scale.to(update.dtype)

    def _matrices(self, W0: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return W0, B.t(), A.t()

    @contextmanager
    def _substituted(self, A: Tensor, B: Tensor) -> Iterator[None]:
        """As of any layer, but W' is formed of the rows that are looked up, where the layer does no more with it."""
        if torch.compiler.is_compiling():
            with super()._substituted(A, B):
                yield
            return
        storage = self.storage
        table = LazyWeight([Expert(*self._matrices(storage.read(), A, B))], [0], stacked=False)
        with substituted(storage.layer, **{storage.name: table}):
            yield

    def _dropped_change(self, name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        change = self._change(name, x, *args, **kwargs)
        keep = self.hira_dropout[name](torch.ones(change.shape[:-1], device=change.device))
        dropped: Tensor = change * keep.unsqueeze(-1).to(change.dtype)
        return dropped

    def _delta(self, A: Tensor, B: Tensor) -> Tensor:
        return (B @ A).t()


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

    def _convolve(self, x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, *, update_only: bool) -> Tensor:
        base = self.get_base_layer()
        padding, pad = _padding(base)
        if pad is not None:
            x = F.pad(x, pad, mode="constant" if base.padding_mode == "zeros" else base.padding_mode)
        storage = self.storage
        return ops.conv(
            x,
            storage.kept(),
            A,
            B,
            bias,
            stride=base.stride,
            padding=padding,
            dilation=base.dilation,
            groups=base.groups,
            update_only=update_only,
            dequantize=storage.dequantize,
        )

    def _has_one_product(self) -> bool:
        # padding other than with zeros is on x before it arrives there
        return self.get_base_layer().padding_mode == "zeros" and super()._has_one_product()

    def _product(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return self._convolve(x, A, B, self.storage.bias, update_only=False)

    def _update(self, x: Tensor, A: Tensor, B: Tensor, dropout: nn.Module | None = None) -> Tensor:
        return self._convolve(x if dropout is None else dropout(x), A, B, None, update_only=True)

    def _matrices(self, W0: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return W0.flatten(1), A.flatten(1), B.flatten(1)

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
