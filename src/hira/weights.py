"""How a base layer's weight is read, written and restored: one small class for each way of storing it.

A layer needs four things of its base weight. What autograd should keep of it for backward (`kept`, and `dequantize`,
which turns that into W0), W0 itself (`read`), a merged weight put in its place (`write`), and the way back (`snapshot`
and `restore`). Nothing else in this package touches a base weight.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hira.errors import HiraError
from hira.ops.linear import Dequantize


class Storage:
    """A weight held as a dense parameter of shape (out, in, *kernel), or (num_embeddings, dim).

    `write` installs a new parameter instead of changing the old one. Whoever shares the old one, such as an output
    layer tied to an embedding, keeps it; and to restore it is to put it back, bit for bit, ties included.

    Args:
        layer: the base layer, whose parameter `weight` this is.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer: Any = layer

    @property
    def dequantize(self) -> Dequantize | None:
        """What turns `kept()` into W0, or None where that is W0 itself."""
        return None

    def kept(self) -> Tensor:
        """The tensor that autograd keeps for backward: W0 as it is stored, oriented (out, in)."""
        weight: Tensor = self.layer.weight
        return weight

    def read(self) -> Tensor:
        """W0, dense, oriented (out, in, *kernel)."""
        return self.kept() if self.dequantize is None else self.dequantize(self.kept())

    def write(self, weight: Tensor) -> None:
        """Put a dense weight, oriented as `read` gives it, in the place of the stored one."""
        self.layer.weight = nn.Parameter(weight, requires_grad=self.layer.weight.requires_grad)

    def snapshot(self) -> Any:
        """What `restore` needs to put the present weight back; no copy of data.

        Raises:
            HiraError: the weight is not a parameter of the layer, so that none can be put in its place.
        """
        if "weight" not in self.layer._parameters:
            raise HiraError(
                f"The weight of {type(self.layer).__name__} is computed, not stored, so nothing can be merged into it; "
                "remove its parametrization first."
            )
        return self.layer.weight

    def restore(self, snapshot: Any) -> None:
        """Put back the weight of a snapshot, on the device and in the dtype that the layer has now."""
        present = self.layer.weight
        snapshot.data = snapshot.data.to(present.device, present.dtype)
        self.layer.weight = snapshot


class Transposed(Storage):
    """A weight held as (in, out), as in a transformers `Conv1D` and wherever `fan_in_fan_out` says so."""

    def kept(self) -> Tensor:
        return super().kept().t()

    def write(self, weight: Tensor) -> None:
        super().write(weight.t())
