"""Headers of safetensors files, checked in full against the file's size before anything is allocated; and tensors."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from hira.errors import HiraError
from hira.files.io.strict_json import MAX_BYTES, parse_object

# The format's dtypes: bits of an element, and PyTorch's name, if it has one of the same shape. In the order in which
# safetensors lays tensors out, the widest first.
DTYPES: dict[str, tuple[int, str | None]] = {
    "U64": (64, "uint64"),
    "I64": (64, "int64"),
    "F64": (64, "float64"),
    "C64": (64, "complex64"),
    "F32": (32, "float32"),
    "U32": (32, "uint32"),
    "I32": (32, "int32"),
    "BF16": (16, "bfloat16"),
    "F16": (16, "float16"),
    "U16": (16, "uint16"),
    "I16": (16, "int16"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E5M2": (8, "float8_e5m2"),
    "I8": (8, "int8"),
    "U8": (8, "uint8"),
    "F6_E3M2": (6, None),
    "F6_E2M3": (6, None),
    "F4": (4, None),
    "BOOL": (8, "bool"),
}
CODES = {getattr(torch, name): code for code, (_, name) in DTYPES.items() if name and hasattr(torch, name)}
_TORCH_DTYPES: dict[str, torch.dtype] = {code: dtype for dtype, code in CODES.items()}
_RANKS = {code: rank for rank, code in enumerate(DTYPES)}
_MAX_DIMENSIONS = 64  # what PyTorch can work with
_CHUNK = 1 << 30  # one system call transfers less than 2 GiB


@dataclass(frozen=True)
class TensorEntry:
    """What a header says of a tensor.

    Args:
        name: the tensor's name.
        code: its dtype as the format spells it, such as "BF16".
        shape: its shape, in elements.
        begin: the offset of its first byte in the file.
        end: the offset after its last byte.
    """

    name: str
    code: str
    shape: tuple[int, ...]
    begin: int = 0
    end: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """The dtype; a HiraError for those of less than a byte, whose tensors can be copied as bytes only."""
        if self.code not in _TORCH_DTYPES:
            raise HiraError(f"tensor {self.name!r} is of dtype {self.code}, which this PyTorch cannot compute with.")
        return _TORCH_DTYPES[self.code]

    @property
    def nbytes(self) -> int:
        """The number of bytes that dtype and shape ask for."""
        return _nbytes(self.code, self.shape)


@dataclass(frozen=True)
class Header:
    """A checked header: the tensors cover the file after it without gap or overlap.

    Args:
        path: the file.
        entries: its tensors by name, in the order of the header.
        metadata: what its `__metadata__` says.
        size: the file's size in bytes.
    """

    path: Path
    entries: dict[str, TensorEntry]
    metadata: dict[str, str]
    size: int

    def by_offset(self) -> list[TensorEntry]:
        """The tensors in the order of their bytes."""
        return sorted(self.entries.values(), key=lambda entry: (entry.begin, entry.end))

    def entry(self, name: str) -> TensorEntry:
        """Return what the header says of a tensor; a HiraError if it has none of that name."""
        if name not in self.entries:
            raise HiraError(f"{self.path} has no tensor {name!r}.")
        return self.entries[name]


def entry_of(name: str, dtype: torch.dtype, shape: Iterable[int]) -> TensorEntry:
    """Return the entry of a tensor that is to be written; a HiraError for a dtype that the format lacks."""
    if dtype not in CODES:
        raise HiraError(f"tensor {name!r} is of {dtype}, which a safetensors file cannot hold.")
    return TensorEntry(name, CODES[dtype], tuple(shape))


def in_safetensors_order(entries: Iterable[TensorEntry]) -> list[TensorEntry]:
    """Return tensors in the order in which safetensors writes them: wider dtypes first, then by name."""
    return sorted(entries, key=lambda entry: (_RANKS[entry.code], entry.name))


def header_bytes(entries: Iterable[TensorEntry], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return the bytes before the tensors of a file: the header's length and the header, padded to 8 bytes.

    Args:
        entries: the tensors in the order in which their bytes will follow, one after another; their `begin` and `end`
            are not looked at.
        metadata: what goes to `__metadata__`; no such entry by default.

    Returns:
        The bytes, those that safetensors itself writes for tensors in its order.

    Raises:
        HiraError: a name comes twice or is `__metadata__`, or the header would be too long to be read again.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    begin = 0
    for entry in entries:
        if entry.name in header or entry.name == "__metadata__":
            raise HiraError(f"tensor {entry.name!r} cannot be written twice, or under a name that means metadata.")
        end = begin + entry.nbytes
        header[entry.name] = {"dtype": entry.code, "shape": list(entry.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_BYTES:
        raise HiraError(f"a header of {len(text)} bytes is more than the {MAX_BYTES} allowed; write smaller shards.")
    return len(text).to_bytes(8, "little") + text


def read_header(path: str | os.PathLike[str]) -> Header:
    """Return the header of a safetensors file, every claim of it checked.

    Args:
        path: the file; a plain one, so that reading ends.

    Returns:
        The header, with offsets in the file.

    Raises:
        HiraError: the file cannot be read or is cut off, or the header is too long, not JSON, has a name twice, an
            unknown dtype or an impossible shape, or its tensors overlap, leave holes, or do not end with the file. The
            message names file and tensor.

    Source: the format as safetensors documents it, with its limits.
    """
    path = Path(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise HiraError(f"{path} is not a plain file; a safetensors file was expected.")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise HiraError(
                    f"{path} has {size} bytes, but its header alone would end at {length + 8}: it is cut off, or not a "
                    "safetensors file; get it anew."
                )
            if length > MAX_BYTES:
                raise HiraError(f"{path} claims a header of {length} bytes, more than the {MAX_BYTES} allowed.")
            text = file.read(length)
    except OSError as error:
        raise HiraError(f"{path} cannot be read: {error.strerror}.") from error
    return _checked(path, parse_object(text, f"the header of {path}"), 8 + length, size)


def read_tensor(
    header: Header,
    name: str,
    rows: slice | None = None,
    shape: tuple[int, ...] | None = None,
    memory: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """Return a tensor, or some of its rows, reading no other bytes.

    Args:
        header: the file's header.
        name: the tensor's name.
        rows: which indices of the first dimension, in steps of one; all by default.
        shape: another shape of as many entries to see the tensor in; the entry's by default.
        memory: gives memory of so many bytes, uint8, to read into; new memory by default.

    Returns:
        The tensor, (rows, ...) of the entry's dtype.

    Raises:
        HiraError: there is no such tensor, its dtype is unknown to PyTorch, or the file changed since its header was
            read.
    """
    entry = header.entry(name)
    dtype, begin, end = entry.dtype, entry.begin, entry.end
    shape = entry.shape if shape is None else shape
    if rows is not None:
        if not shape:
            raise HiraError(f"tensor {name!r} of {header.path} is a scalar and has no rows.")
        start, stop, step = rows.indices(shape[0])
        if step != 1:
            raise HiraError(f"rows of tensor {name!r} of {header.path} are read in steps of one, not of {step}.")
        count = max(stop - start, 0)
        row = (end - begin) // shape[0] if shape[0] else 0
        begin, shape = begin + start * row, (count, *shape[1:])
        end = begin + count * row
    data = torch.empty(end - begin, dtype=torch.uint8, device="cpu") if memory is None else memory(end - begin)
    with _opened(header) as file:
        _fill(file, begin, data.numpy().data, header, name)
    return data.view(dtype).reshape(shape)


def read_bytes(header: Header, name: str, start: int, count: int, memory: Callable[[int], Tensor]) -> memoryview:
    """Return at most so many of a tensor's bytes, from one of them on, in what `memory` gives.

    This reads tensors of any dtype; errors are those of `read_tensor`, the dtype apart.
    """
    entry = header.entry(name)
    begin = entry.begin + start
    data: memoryview = memory(max(min(count, entry.end - begin), 0)).numpy().data
    with _opened(header) as file:
        _fill(file, begin, data, header, name)
    return data


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor as a file holds them, without a copy where it is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def all_finite(tensor: Tensor) -> bool:
    """Return whether all of a tensor's numbers are finite."""
    # their sum takes a tenth of the time, but may be infinite where they are not
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def _opened(header: Header) -> BinaryIO:
    """The header's file, if it is still of the size that was checked."""
    try:
        file = header.path.open("rb", buffering=0)
    except OSError as error:
        raise HiraError(f"{header.path} cannot be read: {error.strerror}.") from error
    size = os.fstat(file.fileno()).st_size
    if size != header.size:
        file.close()
        raise HiraError(f"{header.path} had {header.size} bytes and now has {size}; leave it alone while it is read.")
    return file


def _fill(file: BinaryIO, begin: int, memory: memoryview, header: Header, name: str) -> None:
    """Fill memory from the file's bytes at an offset."""
    done = 0
    try:
        file.seek(begin)
        while done < len(memory):
            count = file.readinto(memory[done : done + _CHUNK])  # type: ignore[attr-defined]
            if not count:
                raise HiraError(f"{header.path} ended within tensor {name!r}; it was cut off while it was read.")
            done += count
    except OSError as error:
        raise HiraError(f"tensor {name!r} of {header.path} cannot be read: {error.strerror}.") from error


def _checked(path: Path, header: dict[str, Any], start: int, size: int) -> Header:
    """The header of a file of a size whose tensors begin at start."""
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise HiraError(f"the metadata of {path} must be strings by name; the file is damaged, get it anew.")
    checked = Header(path, {name: _entry(path, name, value, start) for name, value in header.items()}, metadata, size)
    position, before = start, "the header"
    for entry in checked.by_offset():
        if entry.begin != position:
            how = "overlaps" if entry.begin < position else "leaves a hole after"
            raise HiraError(f"tensor {entry.name!r} of {path} {how} {before}; the file is damaged, get it anew.")
        position, before = entry.end, f"tensor {entry.name!r}"
    if position != size:
        how = "is cut off" if position > size else "has bytes that belong to no tensor"
        raise HiraError(f"{path} {how}: its tensors end at byte {position} with {before}, the file at {size}.")
    return checked


def _entry(path: Path, name: str, value: Any, start: int) -> TensorEntry:
    """One tensor's entry, in itself as it should be."""
    what = f"tensor {name!r} of {path}"
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise HiraError(f"{what} must be described by dtype, shape and data_offsets, and nothing else.")
    code, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise HiraError(f"{what} has the dtype {_brief(code)}; known are {', '.join(DTYPES)}.")
    if not _are_counts(shape) or len(shape) > _MAX_DIMENSIONS:
        raise HiraError(
            f"{what} has the shape {_brief(shape)}; a list of at most {_MAX_DIMENSIONS} sizes was expected."
        )
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise HiraError(f"{what} has the offsets {_brief(offsets)}; a begin and an end after it were expected.")
    begin, end = offsets
    if math.prod(size for size in shape if size) >= 2**63:
        raise HiraError(f"{what} has the shape {_brief(shape)}, which has more elements than can be counted.")
    if math.prod(shape) * DTYPES[code][0] % 8 or _nbytes(code, shape) != end - begin:
        raise HiraError(
            f"{what}, {code} of shape {_brief(shape)}, should take {_nbytes(code, shape)} bytes, but has {end - begin}."
        )
    return TensorEntry(name, code, tuple(shape), start + begin, start + end)


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _nbytes(code: str, shape: Iterable[int]) -> int:
    return math.prod(shape) * DTYPES[code][0] // 8


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
