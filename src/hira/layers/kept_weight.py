"""W' of linear layers, kept for all products between two changes of A, B or W0: `HiraConfig(keep_weight=True)`.

A training step needs W' for the forward, for dx, and again where gradient checkpointing repeats the forward; with
gradient accumulation it does so for each micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from hira.layers.sources import are_same, states
from hira.ops import heuristics

# entries of W0 that are compared; all of A and B are
_SAMPLE = 1024


class _Entry(NamedTuple):
    """A kept weight, and all that it depends on, as it was then."""

    weight: Tensor
    sources: list[Tensor]
    states: list[tuple[int, int]]
    values: list[Tensor]
    scales: Sequence[float]
    steps: int


class _Steps:
    """How many steps all optimizers have made: an engine may write A and B so that no version tells."""

    count = 0
    watched = False

    def watch(self) -> None:
        if not self.watched:
            register_optimizer_step_post_hook(self._add)
            self.watched = True

    def _add(self, *_: Any) -> None:
        self.count += 1


_steps = _Steps()
_entries: WeakKeyDictionary[Any, _Entry] = WeakKeyDictionary()


def get(
    layer: Any, sources: Sequence[Tensor], scales: Sequence[float], dtype: torch.dtype, form: Callable[[], Tensor]
) -> Tensor | None:
    """The weight of a layer: the kept one if nothing has changed since, else one that is formed, and kept.

    A change is an optimizer's step, another tensor, version or address of W0, A or B, other scales, and on a CPU other
    numbers in A, in B or in a sample of W0, such as were written through ``.data``. Elsewhere the host would have to
    wait for such a comparison at each layer, so there a weight is kept in training alone: a forward in evaluation,
    before which averaged weights may have been written so, drops it.

    Args:
        layer: the layer.
        sources: W0 as it is stored, and the factors.
        scales: the numbers that W' is formed with beside them.
        dtype: that of W'.
        form: forms W'.

    Returns:
        W' (out, in), or None where it is not kept.
    """
    on_cpu = heuristics.on_cpu(sources[0].device)
    if not (on_cpu or layer.training):
        _entries.pop(layer, None)
        return None
    entry = _entries.get(layer)
    if entry is not None and entry.weight.dtype == dtype and _is_good(entry, sources, scales, on_cpu):
        return entry.weight
    _steps.watch()
    _entries.pop(layer, None)  # which frees its memory for the new one
    formed_from = states(sources)
    with torch.inference_mode(False), torch.no_grad():
        weight = form()
        values = [value.clone() for value in _values(sources)] if on_cpu else []
    _entries[layer] = _Entry(weight, list(sources), formed_from, values, scales, _steps.count)
    return weight


def _is_good(entry: _Entry, sources: Sequence[Tensor], scales: Sequence[float], on_cpu: bool) -> bool:
    if entry.steps != _steps.count or entry.scales != scales:
        return False
    if not are_same(entry.sources, sources) or entry.states != states(sources):
        return False
    return not on_cpu or all(map(torch.equal, entry.values, _values(sources)))


def _values(sources: Sequence[Tensor]) -> list[Tensor]:
    """The numbers that are compared: those of a sample of W0, and of all factors."""
    W0, *factors = (source.detach() for source in sources)
    return [W0.flatten()[:: max(1, W0.numel() // _SAMPLE)], *factors]
