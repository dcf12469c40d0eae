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
        W0: (rows, columns) or None.
        transposed: whether the rows are the layer's inputs, or an embedding's dimensions, and not its outputs or rows.
    """

    left: Tensor
    right: Tensor
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

    def updates(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield blocks of rows of W0 * BA in float64, and where they are."""
        for where, W0, delta in self.blocks():
            assert W0 is not None
            yield where, W0 * delta


def layer_matrices(
    module: str, A: Tensor, B: Tensor, kind: Kind, W0: Tensor | None, fan_in_fan_out: bool = False
) -> LayerMatrices:
    """Lay a module's tensors out as matrices of one orientation; convolutions are flattened.

    A linear layer's weight may be stored as (out, in) or (in, out); the shape decides, and for a square one
    `fan_in_fan_out`.

    Raises:
        HiraError: the weight is not finite.
    """
    left, right = B.flatten(1), A.flatten(1)  # (out, r), (r, in)
    if kind == "embedding":
        left, right = right.t(), left.t()  # (num, r), (r, dim)
    if W0 is not None:
        if not bool(torch.isfinite(W0).all()):
            raise HiraError(f"The weight of module {module!r} holds NaN or infinity: the base model's file is damaged.")
        shape = (left.shape[0], right.shape[1])
        if kind == "matrix" and (W0.shape != shape or (fan_in_fan_out and shape == shape[::-1])):
            W0 = W0.t()
        W0 = W0.flatten(1)
        left, right = left.to(W0.device), right.to(W0.device)
    if left.shape[0] >= right.shape[1]:
        return LayerMatrices(left, right, W0, False)
    return LayerMatrices(right.t(), left.t(), None if W0 is None else W0.t(), True)
