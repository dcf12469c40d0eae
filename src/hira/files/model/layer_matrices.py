"""W0 and BA of a layer as two matrices of one orientation, and blocks of their rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hira.errors import HiraError
from hira.files.io.adapter_folder import Kind

# entries of a block: 32 MiB in float64
BLOCK = 1 << 22


class LayerMatrices(NamedTuple):
    """A layer as matrices with at least as many rows as columns: ``BA`` is ``left right``, entry by entry with W0.

    Args:
        left: (rows, r).
        right: (r, columns).
        lora: (rows, lora_r) and (lora_r, columns), whose product is added to the weight; None without LoRA.
        W0: (rows, columns) or None.
        transposed: whether the rows are the layer's inputs, or an embedding's dimensions, and not its outputs or rows.
    """

    left: Tensor
    right: Tensor
    lora: tuple[Tensor, Tensor] | None
    W0: Tensor | None
    transposed: bool

    def blocks(self) -> Iterator[tuple[slice, Tensor | None, Tensor]]:
        """Yield blocks of rows in float64: where they are, W0's entries and BA's."""
        rows, columns = self.left.shape[0], self.right.shape[1]
        right, step = self.right.double(), max(1, BLOCK // max(1, columns))
        for start in range(0, rows, step):
            where = slice(start, start + step)
            W0 = None if self.W0 is None else self.W0[where].double()
            yield where, W0, self.left[where].double() @ right

    def update(self, where: slice, W0: Tensor, delta: Tensor) -> Tensor:
        """W0 * BA + L2 L1 of a block of rows that `blocks` yields."""
        update = W0 * delta
        return update if self.lora is None else update.addmm_(self.lora[0][where].double(), self.lora[1].double())

    def updates(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield blocks of rows of W0 * BA + L2 L1 in float64, and where they are."""
        for where, W0, delta in self.blocks():
            assert W0 is not None
            yield where, self.update(where, W0, delta)


def layer_matrices(
    module: str,
    A: Tensor,
    B: Tensor,
    kind: Kind,
    W0: Tensor | None,
    fan_in_fan_out: bool = False,
    lora: tuple[Tensor, Tensor] | None = None,
) -> LayerMatrices:
    """Lay a module's tensors out as matrices of one orientation; convolutions are flattened.

    A linear layer's weight may be stored as (out, in) or (in, out); the shape decides, and for a square one
    `fan_in_fan_out`.

    Raises:
        HiraError: the weight is not finite.
    """
    products = [(B.flatten(1), A.flatten(1))]  # (out, r), (r, in)
    if lora is not None:
        products.append((lora[1].flatten(1), lora[0].flatten(1)))
    if kind == "embedding":
        products = [(right.t(), left.t()) for left, right in products]  # (num, r), (r, dim)
    (left, right), *_ = products
    if W0 is not None:
        if not bool(torch.isfinite(W0).all()):
            raise HiraError(f"The weight of module {module!r} holds NaN or infinity: the base model's file is damaged.")
        shape = (left.shape[0], right.shape[1])
        if kind == "matrix" and (W0.shape != shape or (fan_in_fan_out and shape == shape[::-1])):
            W0 = W0.t()
        W0 = W0.flatten(1)
        products = [(left.to(W0.device), right.to(W0.device)) for left, right in products]
    transposed = left.shape[0] < right.shape[1]
    if transposed:
        products, W0 = [(right.t(), left.t()) for left, right in products], None if W0 is None else W0.t()
    (left, right), *added = products
    return LayerMatrices(left, right, added[0] if added else None, W0, transposed)
