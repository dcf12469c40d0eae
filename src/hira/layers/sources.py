"""The tensors that a kept W' was formed from: whether they are the same, as they were."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def are_same(kept: Sequence[Tensor], sources: Sequence[Tensor]) -> bool:
    """Whether two lists have the very same tensors."""
    return len(kept) == len(sources) and all(one is other for one, other in zip(kept, sources, strict=True))


def states(sources: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Their versions and addresses, which change when tensors are written in place or get other memory."""
    return [(source._version, source.data_ptr()) for source in sources]
