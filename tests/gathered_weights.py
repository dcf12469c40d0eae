"""How many base weights a process holds whole, seen at each product of forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

import hira


@dataclass
class Watch:
    """How much of the base weights a process has whole, seen at each product of forward and backward."""

    layers: list[Any]
    most: int = 0
    seen: int = 0
    kept: list[Tensor] = field(default_factory=list)

    def look(self) -> None:
        self.seen += 1
        self.most = max(self.most, sum(self._is_whole(layer) for layer in self.layers))

    @staticmethod
    def _is_whole(layer: Any) -> bool:
        base = layer.get_base_layer()
        weight = dict.get(base._parameters, "weight", base.__dict__.get("weight"))  # FSDP1 sets an attribute
        if type(weight).__name__ == "DTensor" or weight.dim() != 2:
            return False
        return weight.untyped_storage().nbytes() >= weight.numel() * weight.element_size() > 0

    @property
    def bytes_kept(self) -> int:
        """The bytes of weights that autograd keeps, where no parameter has them."""
        shapes = {tuple(sorted((layer.in_features, layer.out_features))) for layer in self.layers}
        weights = [tensor for tensor in self.kept if tuple(sorted(tensor.shape)) in shapes]
        return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in weights}.values())


@contextmanager
def watched(model: Any) -> Iterator[Watch]:
    import sys

    linear: Any = sys.modules["hira.ops.linear"]
    watch = Watch(hira.tuner.model.hira_layers(model))
    names = ("linear_forward", "linear_input_gradient", "linear_factor_gradients")
    originals = {name: getattr(linear, name) for name in names}

    def watching(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            watch.look()
            return function(*args, **kwargs)

        return call

    for name, function in originals.items():
        setattr(linear, name, watching(function))
    try:
        yield watch
    finally:
        for name, function in originals.items():
            setattr(linear, name, function)
