"""PEFT with its own HiRA, for comparisons in one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

import hira


@contextmanager
def stock_peft() -> Iterator[None]:
    """PEFT with its own HiRA, for comparisons in one process."""
    hira.unregister()
    try:
        yield
    finally:
        hira.register()


def two_linear() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
