"""W' of linear layers kept between the forwards of generation, where forming it would cost more than using it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Entry:
    sources: tuple[tuple[weakref.ref[Tensor], int, int], ...]
    weight: Tensor


class InferenceCache:
    """Effective weights by layer, each valid as long as the tensors it was formed from are the same and unchanged.

    A layer uses it in evaluation mode, with gradients off, for a few tokens at a time. What changes a weight through
    ``.data`` goes unseen by PyTorch's version counters, and so by this cache: call `clear` after it.

    Args:
        max_bytes: the most that all kept weights may take. Layers that come when it is full form W' at each forward, as
            they would without a cache; 0 switches it off.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._entries: weakref.WeakKeyDictionary[Any, _Entry] = weakref.WeakKeyDictionary()

    @property
    def nbytes(self) -> int:
        """The bytes of all kept weights."""
        return sum(entry.weight.nbytes for entry in self._entries.values())

    def clear(self) -> None:
        """Free all kept weights."""
        self._entries.clear()

    def discard(self, layer: Any) -> None:
        """Free the weight of a layer, if one is kept."""
        self._entries.pop(layer, None)

    def get(self, layer: Any, sources: Sequence[Tensor], dtype: torch.dtype) -> Tensor | None:
        """The weight of a layer if it was formed from these sources, as they are now, in this dtype."""
        entry = self._entries.get(layer)
        if entry is None or entry.weight.dtype != dtype or len(entry.sources) != len(sources):
            return None
        for (kept, version, address), source in zip(entry.sources, sources, strict=True):
            if kept() is not source or version != source._version or address != source.data_ptr():
                return None
        return entry.weight

    def put(
        self, layer: Any, sources: Sequence[Tensor], dtype: torch.dtype, form: Callable[[], Tensor]
    ) -> Tensor | None:
        """Form and keep the weight of a layer in place of one kept before; None if there is no room.

        Args:
            layer: the layer.
            sources: the tensors that it is formed from, the base weight first.
            dtype: its dtype.
            form: forms it.
        """
        self.discard(layer)
        if self.nbytes + sources[0].numel() * dtype.itemsize > self.max_bytes:
            return None
        weight = form()
        states = tuple((weakref.ref(source), source._version, source.data_ptr()) for source in sources)
        self._entries[layer] = _Entry(states, weight)
        return weight


inference_cache = InferenceCache(max_bytes=2 << 30)
