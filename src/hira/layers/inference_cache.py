"""W' of linear layers, kept from token to token while a model generates: forming it would cost more than using it."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from hira.layers.sources import are_same, states

P = ParamSpec("P")
R = TypeVar("R")


class _Entry(NamedTuple):
    """A kept weight, the tensors that it was formed from, their versions and addresses then, and the scales."""

    weight: Tensor
    sources: list[Tensor]
    states: list[tuple[int, int]]
    scales: Sequence[float]


class _Scope(threading.local):
    """What a thread keeps, by layer and adapters; None where it keeps nothing."""

    entries: dict[Any, _Entry] | None = None


class InferenceCache:
    """Effective weights, kept while no weight changes: in a call of the model's `generate`, or within `keep`.

    There is one for a layer and the adapters that act in it. They are the thread's own and end with the call, so that
    the next one sees every change, however it was made.
    Layers on a CPU use them, with gradients off.

    Args:
        max_bytes: the most that all kept weights may take. Layers that come when it is full form W' at each forward, as
            they would without a cache; 0 switches it off.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._nbytes = 0
        self._scope = _Scope()
        self._open: list[dict[Any, _Entry]] = []

    @property
    def nbytes(self) -> int:
        """The bytes of all kept weights, those being formed included."""
        return self._nbytes

    @property
    def is_open(self) -> bool:
        """Whether any thread keeps weights; cheap, as every forward asks."""
        return bool(self._open)

    @property
    def keeps(self) -> bool:
        """Whether weights are kept here: in this thread, in `generate` or `keep`."""
        return self._scope.entries is not None

    @contextmanager
    def keep(self) -> Iterator[None]:
        """Keep weights from forward to forward, for a loop of one's own that generates, and free them after it.

        Changes in place are noticed, and so are other tensors in a weight's place. What is written through ``.data`` or
        by way of NumPy meanwhile need not be.
        """
        if self.keeps:
            yield
            return
        entries = self._scope.entries = {}
        with self._lock:
            self._open.append(entries)
        try:
            yield
        finally:
            self._scope.entries = None
            with self._lock:
                self._open = [other for other in self._open if other is not entries]
                self._empty(entries)

    def during(self, function: Callable[P, R]) -> Callable[P, R]:
        """A function that does what another does, within `keep`."""

        @functools.wraps(function)
        def keeping(*args: P.args, **kwargs: P.kwargs) -> R:
            with self.keep():
                return function(*args, **kwargs)

        return keeping

    def clear(self) -> None:
        """Free all kept weights, those of other threads too."""
        with self._lock:
            for entries in self._open:
                self._empty(entries)

    def _empty(self, entries: dict[Any, _Entry]) -> None:
        self._nbytes -= sum(entry.weight.nbytes for entry in entries.values())
        entries.clear()

    def get(self, key: Any, sources: Sequence[Tensor], scales: Sequence[float], dtype: torch.dtype) -> Tensor | None:
        """The weight of a key if it was formed from these sources, as they are now, with these scales, in dtype."""
        entry = (self._scope.entries or {}).get(key)
        if entry is None or entry.weight.dtype != dtype or entry.scales != scales:
            return None
        return entry.weight if are_same(entry.sources, sources) and entry.states == states(sources) else None

    def put(
        self,
        key: Any,
        sources: Sequence[Tensor],
        scales: Sequence[float],
        dtype: torch.dtype,
        form: Callable[[], Tensor],
    ) -> Tensor | None:
        """Form and keep the weight of a key in place of one kept before; None if there is no room, or no scope.

        Args:
            key: the layer and the names of its adapters.
            sources: the tensors that it is formed from, the base weight first.
            scales: the numbers that it is formed with.
            dtype: its dtype.
            form: forms it.
        """
        entries = self._scope.entries
        if entries is None:
            return None
        size = sources[0].numel() * dtype.itemsize
        with self._lock:
            replaced = entries.pop(key, None)
            self._nbytes -= 0 if replaced is None else replaced.weight.nbytes
            if self._nbytes + size > self.max_bytes:
                return None
            self._nbytes += size  # before it is formed, as other threads may be at the same
        formed_from = states(sources)
        try:
            weight = form()
        except BaseException:
            with self._lock:
                self._nbytes -= size
            raise
        with self._lock:
            entries[key] = _Entry(weight, list(sources), formed_from, scales)
        return weight


inference_cache = InferenceCache(max_bytes=2 << 30)
