"""W' of linear layers kept between the forwards of generation, where forming it would cost more than using it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Rows and columns at which a base weight is compared, one by one with those it had.
_SAMPLE = 32


class _Source:
    """A tensor as it was: the object, its version and address, and numbers of it.

    What is written through ``.data``, as some optimisers and tests do, leaves no trace but in the numbers. Of A and B
    all are compared, which is little beside a product with W'; of W0 a grid.
    """

    def __init__(self, tensor: Tensor, whole: bool) -> None:
        self._tensor = weakref.ref(tensor)
        self._state = (tensor._version, tensor.data_ptr())
        self._steps = [1 if whole else max(1, size // _SAMPLE) for size in tensor.shape]
        self._numbers = self._part(tensor).clone()

    def _part(self, tensor: Tensor) -> Tensor:
        return tensor.detach()[tuple(slice(None, None, step) for step in self._steps)]

    def is_still(self, tensor: Tensor) -> bool:
        """Whether it is this tensor, unchanged."""
        return (
            self._tensor() is tensor
            and self._state == (tensor._version, tensor.data_ptr())
            and torch.equal(self._numbers, self._part(tensor))
        )


@dataclass(frozen=True)
class _Entry:
    sources: tuple[_Source, ...]
    weight: Tensor


class InferenceCache:
    """Effective weights by layer, each valid as long as the tensors it was formed from are the same and unchanged.

    A layer on a CPU uses it in evaluation mode, with gradients off, for a few tokens at a time.

    Args:
        max_bytes: the most that all kept weights may take. Layers that come when it is full form W' at each forward, as
            they would without a cache; 0 switches it off.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._lock = threading.RLock()  # a layer may be collected, and its entry with it, at any time
        self._entries: weakref.WeakKeyDictionary[Any, _Entry] = weakref.WeakKeyDictionary()

    @property
    def nbytes(self) -> int:
        """The bytes of all kept weights."""
        with self._lock:
            return sum(entry.weight.nbytes for entry in self._entries.values())

    def clear(self) -> None:
        """Free all kept weights."""
        with self._lock:
            self._entries.clear()

    def discard(self, layer: Any) -> None:
        """Free the weight of a layer, if one is kept."""
        with self._lock:
            self._entries.pop(layer, None)

    def get(self, layer: Any, sources: Sequence[Tensor], dtype: torch.dtype) -> Tensor | None:
        """The weight of a layer if it was formed from these sources, as they are now, in this dtype."""
        with self._lock:
            entry = self._entries.get(layer)
        if entry is None or entry.weight.dtype != dtype or len(entry.sources) != len(sources):
            return None
        same = all(kept.is_still(source) for kept, source in zip(entry.sources, sources, strict=True))
        return entry.weight if same else None

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
        states = tuple(_Source(source, whole=position > 0) for position, source in enumerate(sources))
        with self._lock:
            self._entries[layer] = _Entry(states, weight)
        return weight


inference_cache = InferenceCache(max_bytes=2 << 30)
