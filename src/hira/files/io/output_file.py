"""A file that is hashed and written by threads of its own, while its next bytes are made."""

from __future__ import annotations

import hashlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from hira.files.io.manifest import FileRecord
from hira.files.io.system import start_writing

BLOCK = 8 << 20
Block = npt.NDArray[np.uint8]
_BLOCKS = 3  # one that is filled, and others that are on their way


class Threads:
    """What writes files, one file at a time: a thread that writes, one that hashes, and their memory."""

    def __init__(self) -> None:
        self.write, self.hash = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self.memory = [np.empty(BLOCK, np.uint8) for _ in range(_BLOCKS)]

    def shutdown(self) -> None:
        """End the threads."""
        self.write.shutdown()
        self.hash.shutdown()


class OutputFile:
    """A file that is being written; made by `Output.create`.

    Args:
        file: the file, without a buffer.
        threads: what writes it.
    """

    def __init__(self, file: BinaryIO, threads: Threads) -> None:
        self._file, self._threads = file, threads
        self._digest = hashlib.sha256()
        self._free = list(threads.memory)
        self._block, self._filled = self._free.pop(), 0
        self._on_their_way: deque[tuple[Future[None], Future[None], Block]] = deque()
        self.size = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append bytes, all of them; they may change once this returns. An error may be one of an earlier write."""
        view = np.frombuffer(data, np.uint8)
        self.size += len(view)
        while len(view):
            part = view[: BLOCK - self._filled]
            self._block[self._filled : self._filled + len(part)] = part  # other threads run meanwhile
            self._filled += len(part)
            view = view[len(part) :]
            if self._filled == BLOCK:
                self._send()

    def finish(self) -> FileRecord:
        """Have all bytes written, and return the file's size and hash."""
        self._send()
        while self._on_their_way:
            self._receive()
        return FileRecord(self.size, self._digest.hexdigest())

    def settle(self) -> None:
        """Wait until nothing is on its way, whatever became of it."""
        # also for what an interrupt kept from being noted: each thread works in the order in which it is asked
        for thread in (self._threads.write, self._threads.hash):
            thread.submit(int).result()

    def _send(self) -> None:
        if not self._free:
            self._receive()
        block, self._block = self._block, self._free.pop()
        data, self._filled = block[: self._filled].data, 0
        written = self._threads.write.submit(self._write_out, data)
        self._on_their_way.append((written, self._threads.hash.submit(self._digest.update, data), block))

    def _receive(self) -> None:
        written, hashed, block = self._on_their_way.popleft()
        hashed.result()
        written.result()
        self._free.append(block)

    def _write_out(self, data: memoryview) -> None:
        done = 0
        while done < len(data):
            done += self._file.write(data[done:])
        start_writing(self._file.fileno())
