"""The pairs A and B of an adapter's tensors, and W0 and BA of a layer as two matrices of one orientation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hira.errors import HiraError
from hira.files.io.adapter_folder import Kind, sort_tensors

# entries of a block: 32 MiB in float64
BLOCK = 1 << 22


class Factors(NamedTuple):
    """The trained tensors of one module.

    Args:
        A: (r, in), (r, in / groups, *kernel), or (r, num_embeddings) for an embedding.
        B: (out, r), (out, r, 1, ...), or (dim, r) for an embedding.
        kind: what the module is.
    """

    A: Tensor
    B: Tensor
    kind: Kind


class Matrices(NamedTuple):
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

    def blocks(self, dtype: torch.dtype = torch.float64) -> Iterator[tuple[slice, Tensor | None, Tensor]]:
        """Blocks of rows: where they are, W0's entries and BA's, in a dtype."""
        rows, columns = self.left.shape[0], self.right.shape[1]
        right, step = self.right.to(dtype), max(1, BLOCK // max(1, columns))
        for start in range(0, rows, step):
            where = slice(start, start + step)
            W0 = None if self.W0 is None else self.W0[where].to(dtype)
            yield where, W0, self.left[where].to(dtype) @ right


def pairs(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """Sort an adapter's tensors into the factors of its modules, and others such as those of `modules_to_save`.

    Args:
        tensors: by the keys of a checkpoint, ``base_model.model.<module>.hira_A``.

    Returns:
        The factors by the module's name without ``base_model.model.``, in the order of the tensors; the other tensors.

    Raises:
        HiraError: an A without its B or the reverse, or shapes that do not fit each other.
    """
    modules, others = sort_tensors("the adapter", tensors)
    factors = {module: Factors(found.A, found.B, found.kind) for module, found in modules.items()}
    for module, (A, B, kind) in factors.items():
        check_shapes(module, A, B, kind)
    return factors, {key: tensors[key] for key in others.values()}


def check_shapes(module: str, A: Tensor, B: Tensor, kind: Kind) -> None:
    """Refuse factors that do not fit each other or that hold anything but numbers."""
    fits = A.dim() >= 2 and B.dim() == A.dim() and A.shape[0] == B.shape[1] >= 1 and B.shape[2:].numel() == 1
    if not fits or (A.dim() > 2) != (kind == "convolution"):
        raise HiraError(
            f"The factors of module {module!r}, {kind}, have shapes {tuple(A.shape)} and {tuple(B.shape)}; expected "
            "A (r, in, *kernel) and B (out, r, 1, ...). The file is damaged or no HiRA adapter's."
        )
    for name, value in (("A", A), ("B", B)):
        if not value.is_floating_point() or not bool(torch.isfinite(value).all()):
            raise HiraError(
                f"{name} of module {module!r} ({value.dtype}) holds NaN, infinity or no real numbers: the adapter is "
                "broken. Use a checkpoint from before the training diverged."
            )


def matrices(module: str, factors: Factors, W0: Tensor | None, fan_in_fan_out: bool = False) -> Matrices:
    """Lay a module's tensors out as matrices of one orientation.

    A linear layer's weight may be stored as (out, in) or (in, out); the shape decides, and for a square one
    `fan_in_fan_out`.

    Args:
        module: the module's name, for messages.
        factors: its A and B.
        W0: the weight as it is stored, or None.
        fan_in_fan_out: whether a square weight of a linear layer is stored as (in, out).

    Returns:
        The matrices, convolutions flattened.

    Raises:
        HiraError: the weight's shape does not fit the factors, or it is quantised or not finite.
    """
    A, B, kind = factors
    left, right = B.flatten(1), A.flatten(1)  # (out, r), (r, in)
    if kind == "embedding":
        left, right = right.t(), left.t()  # (num, r), (r, dim)
    if W0 is not None:
        expected = (left.shape[0], right.shape[1]) if A.dim() == 2 else (B.shape[0], *A.shape[1:])
        shape = tuple(W0.shape)
        _check_weight(module, W0, shape == expected or (kind == "matrix" and shape == expected[::-1]), expected)
        if kind == "matrix" and (shape != expected or (fan_in_fan_out and shape == shape[::-1])):
            W0 = W0.t()
        W0 = W0.flatten(1)
        left, right = left.to(W0.device), right.to(W0.device)
    if left.shape[0] >= right.shape[1]:
        return Matrices(left, right, W0, False)
    return Matrices(right.t(), left.t(), None if W0 is None else W0.t(), True)


def _check_weight(module: str, W0: Tensor, fits: bool, expected: Any) -> None:
    if not fits:
        raise HiraError(
            f"The weight of module {module!r} has shape {tuple(W0.shape)}, but the adapter was made for {expected}: it "
            "belongs to another model. Name the base model that the adapter was trained on."
        )
    if not W0.is_floating_point() or W0.element_size() < 2:
        raise HiraError(
            f"The weight of module {module!r} is quantised ({W0.dtype}), so its values cannot be read from the tensor. "
            "Name the model as it was before it was quantised."
        )
    if not bool(torch.isfinite(W0).all()):
        raise HiraError(f"The weight of module {module!r} holds NaN or infinity: the base model's file is damaged.")
