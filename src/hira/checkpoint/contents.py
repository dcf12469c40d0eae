"""What the bytes of a merged model's tensors are made of, a piece at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hira.checkpoint.header import Header, read_chunks, tensor_bytes
from hira.checkpoint.parameters import StoredMatrix
from hira.errors import HiraError
from hira.ops.modulate import block, modulation, row_blocks
from hira.ops.paths import one_thread
from hira.ops.workspace import Workspace, scratch

# bytes of a tensor that is converted, at a time
_CHUNK = 16 << 20


class Content(Protocol):
    """The bytes of a tensor."""

    def chunks(self) -> Iterator[memoryview]:
        """Yield the bytes in order; a chunk may be overwritten when the next one is asked for."""
        ...


class Copied(NamedTuple):
    """A tensor as it is in a file."""

    header: Header
    name: str

    def chunks(self) -> Iterator[memoryview]:
        """As of every content."""
        return read_chunks(self.header, self.name)


class Converted(NamedTuple):
    """A tensor in another dtype, rounded to nearest."""

    matrix: StoredMatrix
    dtype: torch.dtype

    def chunks(self) -> Iterator[memoryview]:
        """As of every content."""
        for rows in self.matrix.row_blocks(_CHUNK):
            yield tensor_bytes(self.matrix.read(rows).to(self.dtype))


class Piece(NamedTuple):
    """Some rows of a modulated matrix.

    Args:
        matrix: W0, as it is stored.
        rows: which of its rows.
        factors: gives A (r, in) and B (out, r); where W0 is stored as (in, out), those of its transpose.
    """

    matrix: StoredMatrix
    rows: slice
    factors: Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Modulated:
    """A tensor with ``W' = W0 * (1 + BA)``, formed by the blocks by which the layers form it.

    Args:
        name: the parameter's name, for messages.
        pieces: what it is made of, in the order of its bytes.
        transposed: whether W0 is stored as (in, out), and read whole.
        stored: the dtype in which the base layer has W0.
        dtype: that of the result.
        dither: whether to round with a dither; None to do as the layers do.
    """

    name: str
    pieces: tuple[Piece, ...]
    transposed: bool
    stored: torch.dtype
    dtype: torch.dtype
    dither: bool | None

    def chunks(self) -> Iterator[memoryview]:
        """As of every content; a HiraError if W' is not finite."""
        for piece in self.pieces:
            for formed in self._transposed(piece) if self.transposed else self._formed(piece):
                if not _is_finite(formed):
                    raise HiraError(
                        f"W0 * (1 + BA) of {self.name} is not finite in {self.dtype}: the base model's weight is "
                        "damaged, or the adapter's update too large for the dtype."
                    )
                yield tensor_bytes(formed)

    def _formed(self, piece: Piece) -> Iterator[Tensor]:
        """The rows of a piece, a block at a time, from as many rows of W0."""
        first, last, _ = piece.rows.indices(piece.matrix.shape[0])
        like = torch.empty(1, 1, dtype=self.stored).expand(piece.matrix.shape)
        by = modulation(like, *piece.factors(), self.dtype, dither=self.dither)
        workspace = Workspace(like, self.dtype)
        for rows in row_blocks(like):
            if rows.start < last and first < rows.stop:
                W0 = piece.matrix.read(rows, _memory).to(self.stored)
                formed = block(W0, by, workspace, rows, alone=True)
                yield formed[max(first - rows.start, 0) : last - rows.start]

    def _transposed(self, piece: Piece) -> Iterator[Tensor]:
        """The same for a matrix stored as (in, out), of which a block is some columns."""
        W0 = piece.matrix.read(slice(None)).to(self.stored).t()
        by = modulation(W0, *piece.factors(), self.dtype, dither=self.dither)
        workspace = Workspace(W0, self.dtype)
        out = torch.empty_like(W0, dtype=self.dtype)
        for rows in row_blocks(W0):
            out[rows] = block(W0[rows], by, workspace, rows, alone=True)
        yield out.t()[piece.rows]


def _is_finite(block: Tensor) -> bool:
    with one_thread():
        return not block.numel() or all(bool(end.isfinite()) for end in block.aminmax())  # NaN is both of them


def _memory(nbytes: int) -> Tensor:
    """Memory that the next block overwrites, as fresh pages are slow."""
    return scratch.take(nbytes, torch.uint8)[:nbytes]
