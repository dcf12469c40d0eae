"""A weight that ZeRO-3 has spread over processes, whole for a moment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def gathered(layer: nn.Module) -> Iterator[None]:
    """Gather a layer's own parameters if ZeRO-3 has spread them; all processes have to come here together."""
    spread = [parameter for parameter in layer.parameters(recurse=False) if hasattr(parameter, "ds_id")]
    if not spread:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(spread):
        yield
