"""Files that are hashed while they are written: every byte in its order, and nothing left by an error or interrupt."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import resource
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hira.errors import HiraError
from hira.files.io.manifest import FileRecord, verify
from hira.files.io.output_file import BLOCK, OutputFile
from hira.files.io.output_folder import STATE, Output


class Written(io.RawIOBase):
    """A file in memory that takes a few bytes at a time."""

    def __init__(self, most):
        super().__init__()
        self.data, self.most = bytearray(), most

    def write(self, data):
        self.data += data[: self.most]
        return min(len(data), self.most)


@given(st.lists(st.lists(st.binary(max_size=50), max_size=8), min_size=1, max_size=4), st.integers(1, 20))
def test_bytes_come_in_order_whatever_the_chunks(files, most):
    with ThreadPoolExecutor(1) as hasher:
        for chunks in files:  # one after another, with the same thread
            raw = Written(most)
            file = OutputFile(raw, hasher)
            reused = bytearray(50)
            for chunk in chunks:
                reused[: len(chunk)] = chunk
                file.write(memoryview(reused)[: len(chunk)])
                reused[:] = b"\xff" * 50  # as a chunk may be overwritten once it is taken
            whole = b"".join(chunks)
            assert file.record() == FileRecord(len(whole), hashlib.sha256(whole).hexdigest())
            assert raw.data == whole


def test_files_larger_than_all_blocks(tmp_path):
    """Chunks that are smaller and larger than a block, and end with one or near it."""
    contents = {
        "large": [os.urandom(3 * BLOCK + 5)],
        "even": [os.urandom(BLOCK), os.urandom(BLOCK)],
        "odd": [os.urandom(BLOCK - 1), b"ab", os.urandom(2 * BLOCK - 1), b""],
        "empty": [],
    }
    with Output(tmp_path / "out") as out:
        for name, chunks in contents.items():
            with out.create(name) as file:
                for chunk in chunks:
                    file.write(chunk)
    for name, chunks in contents.items():
        assert (tmp_path / "out" / name).read_bytes() == b"".join(chunks)
    assert verify(tmp_path / "out") == []  # the hashes were taken from the blocks, not from the files


@contextlib.contextmanager
def files_of_at_most(size):
    """The system refuses to let a file grow beyond a size, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [10, BLOCK - 1, BLOCK + 1, 3 * BLOCK])
@pytest.mark.parametrize("chunk", [BLOCK // 2 + 1, 4 * BLOCK])
def test_an_error_of_the_system_is_a_hira_error_and_leaves_nothing(tmp_path, size, chunk):
    with (
        pytest.raises(HiraError, match=r"\.out\.hira-staging/w cannot be written: File too large.*as it was"),
        Output(tmp_path / "out") as out,
        files_of_at_most(size),
        out.create("w") as file,
    ):
        for _ in range(5 * BLOCK // chunk):
            file.write(bytes(chunk))
    assert os.listdir(tmp_path) == []


def test_finished_files_stay_where_a_later_one_fails(tmp_path):
    with pytest.raises(HiraError, match="File too large"), Output(tmp_path / "out", job="job") as out:
        out.write("a", b"a" * 100)
        with files_of_at_most(1000):
            out.write("b", bytes(2000))
    assert sorted(os.listdir(tmp_path / ".out.hira-staging")) == [STATE, "a"]
    with Output(tmp_path / "out", job="job") as out:
        assert out.resumed("a") and not out.resumed("b")
        out.write("b", bytes(2000))
    assert verify(tmp_path / "out") == [] and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("size", [10, 5 * BLOCK])
def test_an_interrupt_within_a_file_leaves_nothing_of_it(tmp_path, size):
    with Output(tmp_path / "out", job="job") as out:
        with pytest.raises(KeyboardInterrupt), out.create("w") as file:
            file.write(bytes(size))
            raise KeyboardInterrupt
        assert os.listdir(out.staging) == []
        out.write("w", b"again")  # under the same name, with the same thread
    assert (tmp_path / "out/w").read_bytes() == b"again" and verify(tmp_path / "out") == []


def test_no_thread_is_left(tmp_path):
    before = threading.active_count()
    for ends in (contextlib.nullcontext(), pytest.raises(RuntimeError)):
        with ends, Output(tmp_path / "out", overwrite=True) as out:
            out.write("a", b"a")
            assert threading.active_count() == before + 1
            if not isinstance(ends, contextlib.nullcontext):
                raise RuntimeError
    assert threading.active_count() == before
