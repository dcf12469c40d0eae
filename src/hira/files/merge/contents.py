"""What the bytes of a merged model's tensors are made of, a piece at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hira.errors import HiraError
from hira.files.io.safetensors_file import Header, all_finite, read_bytes, tensor_bytes
from hira.files.model.parameters import StoredMatrix
from hira.ops.effective_weight import Modulation, block, modulation, row_blocks
from hira.ops.heuristics import one_thread
from hira.ops.workspace import Workspace, scratch

# bytes of a tensor that is copied or converted, at a time
_PART = 16 << 20


Part = Callable[[], memoryview]


class Content(Protocol):
    """The bytes of a tensor."""

    def parts(self) -> Iterator[Part]:
        """Yield what makes the bytes, part by part in their order; a thread's next part overwrites the one before."""
        ...


class Workers:
    """Two threads that make parts: while one computes, the other reads, and the caller hashes and writes."""

    def __init__(self) -> None:
        count = torch.get_num_threads()
        self._threads = [ThreadPoolExecutor(1, initializer=_begin, initargs=(count,)) for _ in range(2)]

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        for thread in self._threads:
            thread.shutdown(cancel_futures=True)

    def made(self, parts: Iterable[Part]) -> Iterator[memoryview]:
        """Yield the bytes of parts in order; they stay until the next ones are asked for."""
        ahead: deque[Future[memoryview]] = deque()
        for part, thread in zip(parts, cycle(self._threads)):
            if len(ahead) == len(self._threads):
                yield ahead.popleft().result()
            ahead.append(thread.submit(part))
        while ahead:
            yield ahead.popleft().result()


class Copied(NamedTuple):
    """A tensor as it is in a file."""

    header: Header
    name: str

    def parts(self) -> Iterator[Part]:
        """As of every content."""
        for start in range(0, self.header.entry(self.name).nbytes, _PART):
            yield partial(read_bytes, self.header, self.name, start, _PART, _memory)


class Converted(NamedTuple):
    """A tensor in another dtype, rounded to nearest.

    Args:
        name: its name and file, for messages.
        matrix: the tensor.
        dtype: that of the result.
    """

    name: str
    matrix: StoredMatrix
    dtype: torch.dtype

    def parts(self) -> Iterator[Part]:
        """As of every content."""
        return (partial(self._converted, rows) for rows in self.matrix.row_blocks(_PART))

    def _converted(self, rows: slice) -> memoryview:
        """Some rows; a HiraError if a finite number is infinite in the other dtype."""
        with one_thread():
            exact = self.matrix.read(rows, _memory)
            converted = exact.to(self.dtype)
            lost = converted is not exact and not all_finite(converted)
            if lost and bool((exact.isfinite() & ~converted.isfinite()).any()):
                raise HiraError(f"{self.name} has numbers that are too large for {self.dtype}; choose another dtype.")
            return tensor_bytes(converted)


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
        name: the parameter's name and folder, for messages.
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

    def parts(self) -> Iterator[Part]:
        """As of every content."""
        for piece in self.pieces:
            if self.transposed:
                yield partial(self._transposed, piece)
                continue
            like = torch.empty(1, 1, dtype=self.stored, device="cpu").expand(piece.matrix.shape)
            by = modulation(like, *piece.factors(), self.dtype, dither=self.dither)
            first, last, _ = piece.rows.indices(piece.matrix.shape[0])
            for rows in row_blocks(like):
                if rows.start < last and first < rows.stop:
                    wanted = slice(max(first - rows.start, 0), last - rows.start)
                    yield partial(self._formed, piece.matrix, like, by, rows, wanted)

    def _formed(self, matrix: StoredMatrix, like: Tensor, by: Modulation, rows: slice, wanted: slice) -> memoryview:
        """What is wanted of the block of some rows, from as many rows of W0."""
        W0 = matrix.read(rows, _memory).to(self.stored)
        return self._checked(block(W0, by, Workspace(like, self.dtype), rows, alone=True)[wanted])

    def _transposed(self, piece: Piece) -> memoryview:
        """The rows of a piece of a matrix stored as (in, out), of which a block is some columns."""
        W0 = piece.matrix.read(slice(None)).to(self.stored).t()
        by = modulation(W0, *piece.factors(), self.dtype, dither=self.dither)
        workspace = Workspace(W0, self.dtype)
        out = torch.empty_like(W0, dtype=self.dtype)
        for rows in row_blocks(W0):
            out[rows] = block(W0[rows], by, workspace, rows, alone=True)
        return self._checked(out.t()[piece.rows])

    def _checked(self, formed: Tensor) -> memoryview:
        """The bytes of some rows of W', which have to be finite."""
        with one_thread():
            if all_finite(formed):
                return tensor_bytes(formed)
        raise HiraError(
            f"W0 * (1 + BA) of {self.name} is not finite in {self.dtype}: the base model's weight is damaged, or the "
            "adapter's update too large for the dtype."
        )


def _begin(threads: int) -> None:
    """Give a new thread its number of PyTorch's threads; by itself it would take what another one has just set."""
    torch.get_num_threads()  # where PyTorch takes it
    torch.set_num_threads(threads)


def _memory(nbytes: int) -> Tensor:
    """Memory that the thread's next part overwrites, as fresh pages are slow."""
    return scratch.take(nbytes, torch.uint8)[:nbytes]
