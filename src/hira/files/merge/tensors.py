"""The tensors of a merged model, and the functions that make their bytes part by part."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import cycle
from typing import NamedTuple

import torch
from torch import Tensor

from hira.errors import HiraError
from hira.files.io.safetensors_file import Header, TensorEntry, all_finite, entry_of, read_range, tensor_bytes
from hira.files.model.parameters import StoredMatrix
from hira.ops.effective_weight import block, modulation, row_blocks
from hira.ops.heuristics import one_thread
from hira.ops.workspace import Workspace

# bytes of a tensor that are copied or converted at a time
_PART = 16 << 20


class Part(NamedTuple):
    """Some bytes of a tensor, and what makes them. W' is in memory of the thread, which its next part overwrites."""

    nbytes: int
    make: Callable[[], memoryview]


class PlannedTensor(NamedTuple):
    """A tensor of the merged model: its name, dtype and shape, and the parts that make its bytes, in their order.

    `copied` says whether its bytes are those of a tensor in a file.
    """

    entry: TensorEntry
    parts: Callable[[], Iterator[Part]]
    copied: bool = False


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

    def results(self, parts: Iterable[Part]) -> Iterator[memoryview]:
        """Yield the bytes of parts in order; they stay until the next ones are asked for."""
        ahead: deque[Future[memoryview]] = deque()
        for part, thread in zip(parts, cycle(self._threads)):
            if len(ahead) == len(self._threads):
                yield ahead.popleft().result()
            ahead.append(thread.submit(part.make))
        while ahead:
            yield ahead.popleft().result()

    def whole(self, planned: PlannedTensor) -> Tensor:
        """Make a tensor in memory, from the parts of which a file would be made."""
        entry, begin, jobs = planned.entry, 0, []
        tensor = torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
        into = tensor_bytes(tensor)
        for part, thread in zip(planned.parts(), cycle(self._threads)):
            jobs.append(thread.submit(_fill, into[begin : begin + part.nbytes], part))
            begin += part.nbytes
        for job in jobs:
            job.result()
        if begin != len(into):
            raise HiraError(f"{entry.name} should have {len(into)} bytes, but {begin} were made: an error of hira.")
        return tensor


def copied(name: str, header: Header, entry: TensorEntry) -> PlannedTensor:
    """Plan a tensor with the bytes of one in a file."""
    begin, end = entry.begin, entry.begin + entry.nbytes
    return PlannedTensor(replace(entry, name=name), lambda: copied_parts(header, begin, end), copied=True)


def copied_parts(header: Header, begin: int, end: int) -> Iterator[Part]:
    """Yield the parts that read a file's bytes from one offset to another."""

    def part(start: int, stop: int) -> memoryview:
        data: memoryview = read_range(header, start, stop).numpy().data
        return data

    for start in range(begin, end, _PART):
        stop = min(start + _PART, end)
        yield Part(stop - start, partial(part, start, stop))


def converted(name: str, shape: tuple[int, ...], matrix: StoredMatrix, dtype: torch.dtype, what: str) -> PlannedTensor:
    """Plan a tensor with the entries of a matrix, rounded to nearest in a dtype; `what` names it in messages."""

    def part(rows: slice) -> memoryview:
        with one_thread():
            exact = matrix.read(rows)
            result = exact.to(dtype)
            overflows = result is not exact and not all_finite(result)
            if overflows and bool((exact.isfinite() & ~result.isfinite()).any()):
                raise HiraError(f"{what} has numbers that are too large for {dtype}; choose another dtype.")
            return tensor_bytes(result)

    return PlannedTensor(
        entry_of(name, dtype, shape),
        lambda: (Part(_size(matrix, rows, dtype), partial(part, rows)) for rows in matrix.row_blocks(_PART)),
    )


def merged_parts(
    matrix: StoredMatrix,
    rows: slice,
    factors: Callable[[], tuple[Tensor, Tensor, int]],
    *,
    transposed: bool,
    stored: torch.dtype,
    dtype: torch.dtype,
    dither: bool | None,
    what: str,
) -> Iterator[Part]:
    """Yield the parts of some rows of ``W' = W0 * (1 + BA) + L2 L1``, formed by the blocks by which the layers form it.

    Args:
        matrix: W0, as it is stored.
        rows: which of its rows to form.
        factors: returns A (r + lora_r, in), A over L1, B (out, r + lora_r), B beside L2, and lora_r.
        transposed: whether W0 is stored as (in, out); such a matrix is read whole.
        stored: the dtype in which the base layer has W0.
        dtype: the dtype of W'.
        dither: whether to round with a dither; None rounds as the layers do.
        what: the parameter and its folder, for messages.
    """
    first, last, _ = rows.indices(matrix.rows)

    def checked(formed: Tensor) -> memoryview:
        with one_thread():
            if all_finite(formed):
                return tensor_bytes(formed)
        raise HiraError(
            f"W0 * (1 + BA) of {what} is not finite in {dtype}: the base model's weight is damaged, or the adapter's "
            "update is too large for the dtype."
        )

    def whole() -> memoryview:
        W0 = matrix.read(slice(None)).to(stored).t()
        by, workspace = modulation(W0, *factors(), dtype, dither=dither), Workspace(W0, dtype)
        out = torch.empty_like(W0, dtype=dtype)
        for block_rows in row_blocks(W0):
            out[block_rows] = block(W0[block_rows], by, workspace, block_rows, single_threaded=True)
        return checked(out.t()[rows])

    if transposed:
        yield Part(_size(matrix, rows, dtype), whole)
        return
    # W0's shape and dtype, from which the layers choose their blocks, in the memory of one number
    like = torch.empty(1, 1, dtype=stored, device="cpu").expand(matrix.rows, matrix.columns)
    by = modulation(like, *factors(), dtype, dither=dither)

    def part(block_rows: slice, kept: slice) -> memoryview:
        formed = block(matrix.read(block_rows).to(stored), by, Workspace(like, dtype), block_rows, single_threaded=True)
        return checked(formed[kept.start - block_rows.start : kept.stop - block_rows.start])

    for block_rows in row_blocks(like):
        kept = slice(max(first, block_rows.start), min(last, block_rows.stop))
        if kept.start < kept.stop:
            yield Part(_size(matrix, kept, dtype), partial(part, block_rows, kept))


def _size(matrix: StoredMatrix, rows: slice, dtype: torch.dtype) -> int:
    """The bytes of some rows of a matrix in a dtype."""
    return len(range(*rows.indices(matrix.rows))) * matrix.columns * dtype.itemsize


def _fill(into: memoryview, part: Part) -> None:
    into[:] = part.make()


def _begin(threads: int) -> None:
    """Give a new thread its number of PyTorch's threads; by itself it would take what another one has just set."""
    torch.get_num_threads()  # where PyTorch takes it
    torch.set_num_threads(threads)
