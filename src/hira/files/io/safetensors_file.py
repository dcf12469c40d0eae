"""Safetensors files: headers, which the library checks, tensors that are read in parts, and headers to be written."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hira.errors import HiraError
from hira.files.io.strict_json import MAX_BYTES, parse_object

# The format's dtypes with PyTorch's names, if it has one of the same shape, in the order in which safetensors lays
# tensors out: the widest first.
_NAMES = {
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
    "F32": "float32",
    "U32": "uint32",
    "I32": "int32",
    "BF16": "bfloat16",
    "F16": "float16",
    "U16": "uint16",
    "I16": "int16",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I8": "int8",
    "U8": "uint8",
    "F6_E3M2": None,
    "F6_E2M3": None,
    "F4": None,
    "BOOL": "bool",
}
DTYPES: dict[str, torch.dtype] = {
    c: getattr(torch, name) for c, name in _NAMES.items() if name and hasattr(torch, name)
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
_ORDER = {code: number for number, code in enumerate(_NAMES)}
_CHUNK = 1 << 30  # one system call transfers less than 2 GiB


@dataclass(frozen=True)
class TensorEntry:
    """What a header says of a tensor: `code` is its dtype as the format spells it, `begin` its offset in the file."""

    name: str
    code: str
    shape: tuple[int, ...]
    nbytes: int
    begin: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """The dtype; a HiraError for those of less than a byte, whose tensors can be copied as bytes only."""
        if self.code not in DTYPES:
            raise HiraError(f"tensor {self.name!r} is of dtype {self.code}, which this PyTorch cannot compute with.")
        return DTYPES[self.code]


@dataclass(frozen=True)
class Header:
    """A file's header: its tensors by name in the order of their bytes, its metadata, and the size of the file.

    `loaded` has the tensors that are in memory anyway, which are not read again.
    """

    path: Path
    entries: dict[str, TensorEntry]
    metadata: dict[str, str]
    size: int
    loaded: dict[str, Tensor] = field(default_factory=dict)

    def entry(self, name: str) -> TensorEntry:
        """Return what the header says of a tensor; a HiraError if it has none of that name."""
        if name not in self.entries:
            raise HiraError(f"{self.path} has no tensor {name!r}.")
        return self.entries[name]


def entry_of(name: str, dtype: torch.dtype, shape: Iterable[int]) -> TensorEntry:
    """Return the entry of a tensor that is to be written; a HiraError for a dtype that the format lacks."""
    if dtype not in CODES:
        raise HiraError(f"tensor {name!r} is of {dtype}, which a safetensors file cannot hold.")
    shape = tuple(shape)
    return TensorEntry(name, CODES[dtype], shape, math.prod(shape) * dtype.itemsize)


def safetensors_order(entry: TensorEntry) -> tuple[int, str]:
    """A key that sorts tensors as safetensors does: wider dtypes first, then by name."""
    return _ORDER[entry.code], entry.name


def header_bytes(entries: Iterable[TensorEntry], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return the bytes before the tensors of a file: the header's length and the header, padded to 8 bytes.

    Args:
        entries: the tensors in the order of their bytes; their `begin` is not used.
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

    Raises:
        HiraError: the file cannot be read or is cut off, or the header is too long, not JSON, has a name twice, an
            unknown dtype or an impossible shape, or its tensors overlap, leave holes, or do not end with the file.
    """
    path = Path(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise HiraError(f"{path} is not a plain file; a safetensors file was expected.")
        with safe_open(path, "np"):  # which compares the header with the file's size before it allocates anything
            pass
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = 8 + int.from_bytes(file.read(8), "little")
            header = parse_object(file.read(start - 8), f"the header of {path}")
    except SafetensorError as error:
        raise HiraError(
            f"{path} is cut off, damaged or not a safetensors file ({error}); download it again."
        ) from error
    except OSError as error:
        raise HiraError(f"{path} cannot be read: {error.strerror or error}.") from error
    metadata = header.pop("__metadata__", None) or {}
    entries = []
    for name, fields in header.items():
        begin, end = fields["data_offsets"]
        if len(fields["shape"]) > 64:
            raise HiraError(f"tensor {name!r} of {path} has {len(fields['shape'])} dimensions, and PyTorch at most 64.")
        entries.append(TensorEntry(name, fields["dtype"], tuple(fields["shape"]), end - begin, start + begin))
    entries.sort(key=lambda entry: (entry.begin, entry.nbytes))
    return Header(path, {entry.name: entry for entry in entries}, metadata, size)


def read_bytes(header: Header, name: str, start: int = 0, stop: int | None = None) -> Tensor:
    """Return a tensor's bytes from one offset to another, as uint8.

    This reads tensors of any dtype.

    Raises:
        HiraError: there is no such tensor, or the file changed since its header was read.
    """
    entry = header.entry(name)
    stop = entry.nbytes if stop is None else min(stop, entry.nbytes)
    if name in header.loaded:
        return header.loaded[name].reshape(-1).view(torch.uint8)[start:stop]
    return read_range(header, entry.begin + start, entry.begin + stop)


def read_range(header: Header, start: int, stop: int) -> Tensor:
    """Return a file's bytes from one offset to another, as uint8; a HiraError if the file changed since."""
    data = torch.empty(max(stop - start, 0), dtype=torch.uint8, device="cpu")
    view, done = data.numpy().data, 0
    try:
        with header.path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size != header.size:
                raise HiraError(
                    f"{header.path} had {header.size} bytes and now has {size}; leave it alone while it is read."
                )
            file.seek(start)
            while done < len(view):
                count = file.readinto(view[done : done + _CHUNK])
                if not count:
                    raise HiraError(f"{header.path} was cut off while it was read; leave it alone meanwhile.")
                done += count
    except OSError as error:
        raise HiraError(f"{header.path} cannot be read: {error.strerror}.") from error
    return data


def read_tensor(header: Header, name: str, rows: slice = slice(None), shape: tuple[int, ...] | None = None) -> Tensor:
    """Return a tensor, or some of its rows, reading no other bytes.

    Args:
        header: the file's header.
        name: the tensor's name.
        rows: which indices of the first dimension, in steps of one.
        shape: another shape of as many entries to see the tensor in; the entry's by default.

    Returns:
        The tensor, (rows, ...) of the entry's dtype.

    Raises:
        HiraError: as of `read_bytes`, or its dtype is unknown to PyTorch.
    """
    entry = header.entry(name)
    shape = entry.shape if shape is None else shape
    if not shape:
        return read_bytes(header, name).view(entry.dtype).reshape(())
    start, stop, _ = rows.indices(shape[0])
    count = max(stop - start, 0)
    row = entry.nbytes // shape[0] if shape[0] else 0
    dtype = entry.dtype  # before anything is read
    return read_bytes(header, name, start * row, (start + count) * row).view(dtype).reshape(count, *shape[1:])


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor as a file holds them, without a copy where it is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def all_finite(tensor: Tensor) -> bool:
    """Return whether all of a tensor's numbers are finite."""
    # their sum takes a tenth of the time, but may be infinite where they are not
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())
