"""Files written by threads: every byte in its order and in the hash, and no error or interrupt that leaves anything."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import resource
import signal
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hira.errors import HiraError
from hira.files.io import output_file
from hira.files.io.manifest import FileRecord, verify
from hira.files.io.output_file import BLOCK, OutputFile, Threads
from hira.files.io.output_folder import STATE, Output


class Written(io.RawIOBase):
    """A file in memory that takes a few bytes at a time, and that a test may stop or break."""

    def __init__(self, most=1 << 30, broken_at=1 << 60):
        super().__init__()
        self.data, self.most, self.broken_at = bytearray(), most, broken_at
        self.gate = threading.Event()
        self.gate.set()
        self.begun = threading.Event()

    def fileno(self):
        return 0

    def write(self, data):
        self.begun.set()
        assert self.gate.wait(20)
        if len(self.data) >= self.broken_at:
            raise OSError(5, "Input/output error")
        self.data += data[: self.most]
        return min(len(data), self.most)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16 bytes, and no calls to the system but those to the file."""
    monkeypatch.setattr(output_file, "BLOCK", 16)
    monkeypatch.setattr(output_file, "start_writing", lambda descriptor: None)


@contextlib.contextmanager
def threads():
    made = Threads()
    try:
        yield made
    finally:
        made.shutdown()


def record(data):
    return FileRecord(len(data), hashlib.sha256(data).hexdigest())


@given(st.lists(st.lists(st.binary(max_size=50), max_size=8), min_size=1, max_size=4), st.integers(1, 20))
def test_bytes_come_in_order_whatever_the_chunks(files, most):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output_file, "BLOCK", 16)
        patch.setattr(output_file, "start_writing", lambda descriptor: None)
        with threads() as shared:
            for chunks in files:  # one after another, with the same threads and memory
                raw = Written(most)
                file = OutputFile(raw, shared)
                reused = bytearray(50)
                for chunk in chunks:
                    reused[: len(chunk)] = chunk
                    file.write(memoryview(reused)[: len(chunk)])
                    reused[:] = b"\xff" * 50  # as a chunk may be overwritten once it is taken
                whole = b"".join(chunks)
                assert file.finish() == record(whole) and file.size == len(whole)
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


def test_writes_wait_for_a_slow_file_and_take_no_more_memory(small_blocks):
    with threads() as shared:
        raw = Written()
        raw.gate.clear()
        file = OutputFile(raw, shared)
        writer = threading.Thread(target=file.write, args=(bytes(range(256)),))
        writer.start()
        assert raw.begun.wait(20)
        writer.join(0.2)
        assert writer.is_alive()  # all blocks are full and none is written
        raw.gate.set()
        writer.join(20)
        assert file.finish() == record(bytes(range(256))) and raw.data == bytes(range(256))


@pytest.mark.parametrize("blocks", [0, 1, 2, 5])
def test_an_error_of_the_writing_thread_comes_out(small_blocks, blocks):
    with threads() as shared:
        file = OutputFile(Written(broken_at=16 * blocks), shared)
        with pytest.raises(OSError, match="Input/output error"):
            for _ in range(8):
                file.write(bytes(16))
            file.finish()
        file.settle()
        after, raw = [b"after", b"wards"], Written()
        file = OutputFile(raw, shared)  # the threads serve the next file as if nothing had been
        for chunk in after:
            file.write(chunk)
        assert file.finish() == record(b"".join(after)) and raw.data == b"afterwards"


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


def held(monkeypatch):
    """Hold the writing thread within a block; what it finds of the file when it goes on is noted."""
    begun, go_on, found = threading.Event(), threading.Event(), []

    def hold(descriptor):
        begun.set()
        assert go_on.wait(20)
        found.append(os.fstat(descriptor).st_nlink)  # fails if the file is closed, and is 0 if it is removed

    monkeypatch.setattr(output_file, "start_writing", hold)
    return begun, go_on, found


def test_an_interrupt_while_bytes_are_on_their_way(tmp_path, monkeypatch):
    """The file is neither closed nor removed before the thread is done with it."""
    begun, go_on, found = held(monkeypatch)
    with pytest.raises(KeyboardInterrupt), Output(tmp_path / "out") as out, out.create("w") as file:
        file.write(bytes(2 * BLOCK))
        assert begun.wait(20)
        threading.Timer(0.2, go_on.set).start()
        raise KeyboardInterrupt
    assert found == [1, 1] and os.listdir(tmp_path) == []


@pytest.mark.parametrize("size", [10, 5 * BLOCK], ids=["the last", "another"])
def test_an_interrupt_while_a_block_is_waited_for(tmp_path, monkeypatch, size):
    begun, go_on, found = held(monkeypatch)

    def interrupt():
        assert begun.wait(20)
        threading.Timer(0.2, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
        threading.Timer(0.6, go_on.set).start()

    interrupter = threading.Thread(target=interrupt)
    with Output(tmp_path / "out", job="job") as out:
        with pytest.raises(KeyboardInterrupt), out.create("w") as file:
            interrupter.start()
            file.write(bytes(size))
        assert found and set(found) == {1}
        assert os.listdir(out.staging) == []
        monkeypatch.setattr(output_file, "start_writing", lambda descriptor: None)
        out.write("w", b"again")  # under the same name, with the same threads
    assert (tmp_path / "out/w").read_bytes() == b"again" and verify(tmp_path / "out") == []


def test_no_thread_is_left(tmp_path):
    before = threading.active_count()
    for ends in (contextlib.nullcontext(), pytest.raises(RuntimeError)):
        with ends, Output(tmp_path / "out", overwrite=True) as out:
            out.write("a", b"a")
            assert threading.active_count() == before + 2
            if not isinstance(ends, contextlib.nullcontext):
                raise RuntimeError
    assert threading.active_count() == before
