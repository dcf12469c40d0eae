"""HiRA on linear layers: `nn.Linear`, transformers' `Conv1D`, and quantised ones."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hira import ops
from hira.base_weights.dense import Storage, Transposed
from hira.distributed.detection import sharded_by
from hira.layers import kept_weight
from hira.layers.base import HiraLayer
from hira.layers.inference_cache import inference_cache
from hira.layers.mixed_batch import BASE
from hira.ops import effective_weight, heuristics
from hira.ops.linear import Dequantize
from hira.ops.workspace import is_concrete

# a weight as a storage gives it for backward, and what turns it into W0
Stored = tuple[Tensor, Dequantize | None]


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

    def _product(self, x: Tensor, names: Sequence[str]) -> Tensor:
        y = self._product_with_cached(x, names) if inference_cache.is_open else None
        return self._linear(x, names, self.storage.bias) if y is None else y

    def _update(self, x: Tensor, names: Sequence[str], dropout: nn.Module | None = None) -> Tensor:
        return self._linear(x if dropout is None else dropout(x), names, None, update_only=True)

    def _linear(self, x: Tensor, names: Sequence[str], bias: Tensor | None, *, update_only: bool = False) -> Tensor:
        storage = self.storage
        dtype = storage.compute_dtype
        W0, dequantize = storage.saved_for_backward()
        A, B, lora_r = self._factors(names)
        x_ = x if dtype is None else x.to(dtype)
        formed = None
        if self.keep_weight and not update_only and self.keep_weight.issuperset(names):
            formed = self._kept_weight(x_, names, (W0, dequantize), (A, B, lora_r))
        y = ops.linear(
            x_,
            W0,
            A,
            B,
            bias,
            lora_r=lora_r,
            update_only=update_only,
            dequantize=dequantize,
            weight_gradient="int8" if set(self.weight_gradient.values()) == {"int8"} else "exact",
            formed=formed,
            training=not torch.is_grad_enabled() and self._is_in_training_step(),
        )
        return y if dtype is None else y.to(x.dtype)

    def _kept_weight(
        self, x: Tensor, names: Sequence[str], stored: Stored, factors: tuple[Tensor, Tensor, int]
    ) -> Tensor | None:
        """W' for a product with x, kept while A, B and W0 are what they are; None where none is kept."""
        sources, dtype = self._sources(x, names, stored)
        if dtype is None or not self._can_keep(sources):
            return None
        scales = [self._scale(name) for name in names]
        return kept_weight.get(self, sources, scales, dtype, partial(_form, stored, factors, dtype))

    def _product_with_cached(self, x: Tensor, names: Sequence[str]) -> Tensor | None:
        weight, bias = self._cached_weight(x, names), self.storage.bias
        return None if weight is None else F.linear(x, weight, bias if bias is None else bias.to(weight.dtype))

    def _cached_weight(self, x: Tensor, names: Sequence[str]) -> Tensor | None:
        """W' for generation, kept from token to token; None where it is better formed as it is used."""
        if torch.compiler.is_compiling() or not inference_cache.keeps or torch.is_grad_enabled() or heuristics.plain():
            return None
        stored = self.storage.saved_for_backward()
        if stored[1] is not None:  # a quantised weight is not kept dense
            return None
        sources, dtype = self._sources(x, names, stored)
        if dtype is None:
            return None
        key, scales = (self, tuple(names)), [self._scale(name) for name in names]
        weight = inference_cache.get(key, sources, scales, dtype)
        if weight is None and heuristics.keeps_weight(x) and self._can_keep(sources):
            form = partial(_form, stored, self._factors(names), dtype)
            weight = inference_cache.put(key, sources, scales, dtype, form)
        return weight

    def _sources(self, x: Tensor, names: Sequence[str], stored: Stored) -> tuple[list[Tensor], torch.dtype | None]:
        """What W' of some adapters is formed from, the base weight first, and the dtype of a product of x with it.

        The dtype is None where x has another.
        """
        W0, dequantize = stored
        sources = [self.storage.stored, *(factor for name in names for factor in self.parameters_of(name))]
        dtype = effective_weight.product_dtype(x, W0.dtype if dequantize is None else x.dtype)
        return sources, dtype if x.dtype == dtype or effective_weight.autocasts(x.device) else None

    def _can_keep(self, sources: Sequence[Tensor]) -> bool:
        """Whether a W' may outlive its product; asked before it is formed.

        Not where code is traced, a CUDA graph is captured, the weight is spread over processes, or a tensor has no
        numbers here or no version that tells when they change.
        """
        if torch.compiler.is_compiling() or heuristics.plain() or sharded_by(self.storage.layer):
            return False
        if heuristics.is_capturing(sources[0].device):
            return False
        return not any(source.is_meta or source.is_inference() or not is_concrete(source) for source in sources)

    def _mixed_parts(self, x: Tensor, rows: dict[str, list[int]], *args: Any, **kwargs: Any) -> list[Tensor]:
        tokens_per_row = x[0].numel() // x.shape[-1]
        single = {name: rows[name][0] for name in rows if name != BASE and len(rows[name]) * tokens_per_row == 1}
        W0, dequantize = self.storage.saved_for_backward()
        if args or kwargs or dequantize or self._dropped(list(single)) or not self._is_plain():
            return super()._mixed_parts(x, rows, *args, **kwargs)
        found: dict[str, Tensor] = {}
        if inference_cache.is_open:  # with W' of each adapter at hand, a product for each costs less
            products = {name: self._product_with_cached(x[row : row + 1], [name]) for name, row in single.items()}
            found = {name: y for name, y in products.items() if y is not None}
        formed = [name for name in single if name not in found]
        if len(formed) > 1:
            tokens = x[[single[name] for name in formed]].reshape(-1, x.shape[-1])
            y = ops.linear_each(tokens, W0, [self._factors([name]) for name in formed], self.storage.bias)
            found.update(zip(formed, y.view(len(formed), 1, *x.shape[1:-1], -1), strict=True))
        others = {name: rows[name] for name in rows if name not in found}
        found.update(zip(others, super()._mixed_parts(x, others), strict=True))
        return [found[name] for name in rows]

    def _delta(self, A: Tensor, B: Tensor) -> Tensor:
        return self._stored_orientation(B @ A)

    def _stored_orientation(self, W0: Tensor) -> Tensor:
        return W0.t() if self.fan_in_fan_out else W0


def _form(stored: Stored, factors: tuple[Tensor, Tensor, int], dtype: torch.dtype) -> Tensor:
    W0, dequantize = stored
    return effective_weight.form(W0 if dequantize is None else dequantize(W0), *factors, dtype)
