"""Headers of safetensors files: the format's own writer is the oracle, and no damage goes unnoticed."""

from __future__ import annotations

import json
import os
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save

from hira.errors import HiraError
from hira.files.io import safetensors_file as header_module
from hira.files.io.safetensors_file import (
    CODES,
    entry_of,
    header_bytes,
    read_bytes,
    read_header,
    read_tensor,
    safetensors_order,
    tensor_bytes,
)

DTYPES = sorted(set(CODES), key=str)


def all_bytes(header, name, count):
    """A tensor's bytes, read so many at a time."""
    starts = range(0, header.entry(name).nbytes, count)
    return b"".join(read_bytes(header, name, start, start + count).numpy().tobytes() for start in starts)


def some_tensor(dtype, shape, seed=0):
    size = torch.empty(0, dtype=dtype).element_size()
    count = int(torch.tensor(shape).prod()) if shape else 1
    data = torch.randint(0, 2, (count * size,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return data.view(dtype).reshape(shape)


def same(some, other):
    return some.dtype == other.dtype and some.shape == other.shape and tensor_bytes(some) == tensor_bytes(other)


def file_of(header, data=b"", pad=0):
    text = (header if isinstance(header, bytes) else json.dumps(header).encode()) + b" " * pad
    return len(text).to_bytes(8, "little") + text + data


def one(dtype="F32", shape=(2, 3), offsets=(0, 24), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)} | more


tensors_strategy = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3).map(tuple)),
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(tensors_strategy, st.none() | st.just({"format": "pt é\n\x01"}))
def test_headers_are_those_of_safetensors_and_tensors_come_back(tmp_path_factory, described, metadata):
    tensors = {name: some_tensor(dtype, shape) for name, (dtype, shape) in described.items()}
    entries = [entry_of(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
    entries.sort(key=safetensors_order)
    ours = header_bytes(entries, metadata) + b"".join(tensor_bytes(tensors[entry.name]) for entry in entries)
    assert ours == save(tensors, metadata)
    path = tmp_path_factory.mktemp("file") / "x.safetensors"
    path.write_bytes(ours)
    header = read_header(path)
    assert header.metadata == (metadata or {})
    assert list(header.entries) == [entry.name for entry in entries]
    for name, tensor in load_file(path).items():
        assert same(read_tensor(header, name), tensor)
        assert all_bytes(header, name, 7) == tensor_bytes(tensor)
        if tensor.dim():
            for rows in (slice(1, 3), slice(0, 0), slice(-1, None)):
                assert same(read_tensor(header, name, rows), tensor[rows])


def test_rows_read_no_other_bytes(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    tensor = torch.arange(1000 * 8, dtype=torch.float32).reshape(1000, 8)
    path.write_bytes(save({"other": torch.ones(5), "w": tensor}))
    header = read_header(path)
    read = []
    monkeypatch.setattr(header_module, "read_bytes", lambda *args: read.append(args[1:]) or read_bytes(*args))
    rows = read_tensor(header, "w", slice(10, 12))
    assert torch.equal(rows, tensor[10:12])
    assert rows.untyped_storage().nbytes() == 2 * 8 * 4
    assert read == [("w", 10 * 32, 12 * 32)]


@pytest.mark.parametrize("code", ["F4", "F6_E2M3", "F6_E3M2"])
def test_dtypes_of_less_than_a_byte_are_copied_as_bytes(tmp_path, code):
    bits = 4 if code == "F4" else 6
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_of({"w": one(code, (2, 4), (0, bits))}, bytes(range(bits))))
    header = read_header(path)
    assert all_bytes(header, "w", 10**9) == bytes(range(bits))
    assert read_header(path).entries == header.entries
    path.write_bytes(header_bytes(header.entries.values()) + bytes(range(bits)))
    assert all_bytes(read_header(path), "w", 10**9) == bytes(range(bits))
    with pytest.raises(HiraError, match=f"'w' is of dtype {code}"):
        read_tensor(header, "w")


DATA = bytes(24)
DEEP = b'{"a":' * 200_000 + b"1" + b"}" * 200_000
BAD = {
    "empty": b"",
    "short": b"\x01\x00",
    "long_header": (2**63).to_bytes(8, "little") + b"{}",
    "not_utf8": file_of(b"\xff{}"),
    "not_json": file_of(b"{nope}"),
    "nan": file_of(b'{"a": NaN}'),
    "deep": file_of(DEEP),
    "list": file_of(b"[]"),
    "surrogate": file_of(b'{"\\ud800": 1}'),
    "twice": file_of(b'{"w": %s, "w": %s}' % ((json.dumps(one()).encode(),) * 2), DATA),
    "inner_twice": file_of(b'{"w": {"dtype":"F32","dtype":"F32"}}'),
    "no_object": file_of({"w": 3}),
    "dtype": file_of({"w": one("F33")}, DATA),
    "dtype_list": file_of({"w": one(["F32"])}, DATA),
    "negative": file_of({"w": one(shape=(-2, -3))}, DATA),
    "boolean": file_of({"w": one(shape=(True, 6))}, DATA),
    "float": file_of({"w": one(shape=(2.0, 3))}, DATA),
    "huge": file_of({"w": one(shape=(2**62, 2**62, 0), offsets=(0, 0))}),
    "huge_size": file_of({"w": one(shape=(2**70,))}, DATA),
    "absurd": file_of({"w": one(shape=(2**40,), offsets=(0, 2**42))}, DATA),
    "dimensions": file_of({"w": one(shape=(1,) * 65, offsets=(0, 4))}, DATA[:4]),
    "mismatch": file_of({"w": one(shape=(2, 2))}, DATA),
    "part_of_a_byte": file_of({"w": one("F4", (3,), (0, 1))}, DATA[:1]),
    "backwards": file_of({"w": one(offsets=(24, 0))}, DATA),
    "offsets": file_of({"w": one(offsets=(0, 12, 24))}, DATA),
    "overlap": file_of({"v": one(), "w": one(offsets=(12, 36))}, DATA + DATA),
    "same": file_of({"v": one(), "w": one()}, DATA),
    "hole": file_of({"v": one(), "w": one(offsets=(28, 52))}, DATA * 3),
    "hole_first": file_of({"w": one(offsets=(8, 32))}, DATA * 2),
    "truncated": file_of({"w": one()}, DATA[:-1]),
    "trailing": file_of({"w": one()}, DATA + b"x"),
    "metadata": file_of({"__metadata__": {"a": 1}}),
    "metadata_list": file_of({"__metadata__": []}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_headers(tmp_path, case):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(BAD[case])
    with pytest.raises(HiraError, match=re.escape(str(path))):
        read_header(path)


def test_a_header_over_the_limit(tmp_path):
    path = tmp_path / "bad.safetensors"
    with path.open("wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(200_000_000)  # sparse
    with pytest.raises(HiraError, match=r"bad\.safetensors is .*not a safetensors file"):
        read_header(path)


def test_what_is_no_plain_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, message in {"pipe": "plain file", ".": "plain file", "absent": "cannot be read"}.items():
        with pytest.raises(HiraError, match=message):
            read_header(tmp_path / name)


def test_a_file_that_changes_while_it_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(save({"w": torch.ones(8)}))
    header = read_header(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(HiraError, match="leave it alone"):
        read_tensor(header, "w")
    path.unlink()
    with pytest.raises(HiraError, match="cannot be read"):
        read_tensor(header, "w")


VALID = save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4), "c": torch.ones(3).bool()}, {"k": "v"})


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_file_gives_an_error_or_what_safetensors_reads(tmp_path_factory, data):
    """Bytes changed, put in, left out: if it passes here, the format's own reader agrees with us on every tensor."""
    damaged = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(damaged) - 1) | st.integers(0, 250))
        kind = data.draw(st.sampled_from(["change", "insert", "delete", "cut"]))
        if kind == "change":
            damaged[at : at + 1] = data.draw(st.binary(min_size=1, max_size=1) | st.sampled_from([b"0", b"9", b"1"]))
        elif kind == "insert":
            damaged[at:at] = data.draw(st.binary(max_size=3))
        elif kind == "delete":
            del damaged[at : at + 2]
        elif len(damaged) > at + 1:
            del damaged[at + 1 :]
        if not damaged:
            break
    path = tmp_path_factory.mktemp("file") / "x.safetensors"
    path.write_bytes(damaged)
    try:
        header = read_header(path)
    except HiraError as error:
        assert str(path) in str(error)
        return
    expected = load(bytes(damaged))
    assert header.entries.keys() == expected.keys()
    assert all(same(read_tensor(header, name), tensor) for name, tensor in expected.items())


def test_what_cannot_be_written():
    with pytest.raises(HiraError, match="complex128"):
        entry_of("w", torch.complex128, (1,))
    entry = entry_of("w", torch.float32, (1,))
    for entries in ([entry, entry], [entry_of("__metadata__", torch.float32, (1,))]):
        with pytest.raises(HiraError, match="cannot be written twice"):
            header_bytes(entries)
