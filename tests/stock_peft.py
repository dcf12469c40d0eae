"""PEFT with its own HiRA, for comparisons in one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import hira


@contextmanager
def stock_peft() -> Iterator[None]:
    """PEFT with its own HiRA, for comparisons in one process."""
    hira.unregister()
    try:
        yield
    finally:
        hira.register()
