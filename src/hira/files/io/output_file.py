"""A file that is hashed by another thread while it is written."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

from hira.files.io.manifest import FileRecord
from hira.files.io.system import start_writing

BLOCK = 8 << 20  # bytes after which the system is asked to write


class OutputFile:
    """A file that is being written; made by `Output.create`."""

    def __init__(self, file: BinaryIO, hasher: ThreadPoolExecutor) -> None:
        self._file, self._hasher = file, hasher
        self._digest = hashlib.sha256()
        self._asked = 0
        self.size = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append bytes, all of them."""
        view = memoryview(data)
        hashed = self._hasher.submit(self._digest.update, view)
        try:
            done = 0
            while done < len(view):
                done += self._file.write(view[done:])
        finally:
            hashed.result()  # from then on the caller may change the bytes
        self.size += len(view)
        if self.size - self._asked >= BLOCK:
            self._asked = self.size
            start_writing(self._file.fileno())

    def record(self) -> FileRecord:
        """Return the size and the hash of what was written."""
        return FileRecord(self.size, self._digest.hexdigest())
