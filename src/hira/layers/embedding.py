"""HiRA on `nn.Embedding`: the rows that are looked up, and no table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hira import ops
from hira.config.hira_config import InitWeights
from hira.layers import base_layer_call
from hira.layers.base import HiraLayer
from hira.layers.lazy_weight import Expert, LazyWeight
from hira.layers.substitution import substituted
from hira.ops.embedding import bound_norm


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

    def _lookup(self, ids: Tensor, names: Sequence[str], **options: Any) -> Tensor:
        base = self.get_base_layer()
        return ops.embedding(
            ids,
            self.storage.read(),
            *self._factors(names),
            padding_idx=base.padding_idx,
            scale_grad_by_freq=base.scale_grad_by_freq,
            sparse=base.sparse,
            **options,
        )

    def _product(self, x: Tensor, names: Sequence[str]) -> Tensor:
        base = self.get_base_layer()
        return self._lookup(x, names, max_norm=base.max_norm, norm_type=base.norm_type)

    def _base_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output; with `max_norm` it would rescale the frozen table in place."""
        if self._bounds_norm(args, kwargs):
            return self._bounded(self._rows(x))
        return super()._base_output(x, *args, **kwargs)

    def _combined(self, x: Tensor, names: Sequence[str], base_output: Callable[[], Tensor]) -> Tensor:
        if self.get_base_layer().max_norm is None or not self._dropped(names):
            return super()._combined(x, names, base_output)
        y = self._rows(x)
        for name in names:
            y = y + self._update(x, [name], self.hira_dropout[name])
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

    def _update(self, x: Tensor, names: Sequence[str], dropout: nn.Module | None = None) -> Tensor:
        keep = None if dropout is None else dropout(torch.ones(x.shape, device=x.device))
        update = self._lookup(x, names, keep=keep, update_only=True)
        scale = self._get_embed_scale()
        return update if scale is None else update * scale.to(update.dtype)

    def _matrices(self, W0: Tensor, A: Tensor, B: Tensor, lora_r: int) -> tuple[Tensor, Tensor, Tensor, int]:
        return W0, B.t(), A.t(), lora_r

    @contextmanager
    def _substituted(self, names: Sequence[str]) -> Iterator[None]:
        """W' is formed of the rows that are looked up alone, where the base layer does no more with it."""
        if torch.compiler.is_compiling():
            with super()._substituted(names):
                yield
            return
        storage = self.storage
        table = LazyWeight([Expert(*self._matrices(storage.read(), *self._factors(names)))], [0], stacked=False)
        with substituted(storage.layer, **{storage.name: table}):
            yield

    def _dropped_change(self, name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        change = base_layer_call.change(self, name, x, *args, **kwargs)
        keep = self.hira_dropout[name](torch.ones(change.shape[:-1], device=change.device))
        dropped: Tensor = change * keep.unsqueeze(-1).to(change.dtype)
        return dropped

    def _delta(self, A: Tensor, B: Tensor) -> Tensor:
        return (B @ A).t()
