"""What an output folder asks of the operating system: a lock, data on the disk, two folders exchanged at once."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hira.errors import HiraError

if sys.platform != "win32":
    import fcntl

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux's renameat2


@contextmanager
def explained(path: Path, hint: str = "") -> Iterator[None]:
    """Turn an error of the operating system into a HiraError that names the file and what was found."""
    try:
        yield
    except OSError as error:
        text = error.strerror or type(error).__name__
        raise HiraError(f"{error.filename or path} cannot be written: {text}.{hint}") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes of ours out of a folder; the system lifts the lock when the process ends, however it does.

    Raises:
        HiraError: another process has it.
    """
    if sys.platform == "win32":
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not folder.exists() or os.stat(folder).st_ino != os.fstat(descriptor).st_ino:
                raise BlockingIOError  # it was another process's, which has just renamed it
        except BlockingIOError as error:
            raise HiraError(f"another process is writing to {folder}; wait for it, or end it.") from error
        yield
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Have a file or a folder on the disk, not in memory only."""
    if sys.platform == "win32" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def start_writing(descriptor: int) -> None:
    """Have the system write a file's data to the disk from now on, not all of it when it is synchronised."""
    if sys.platform.startswith("linux"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def exchange(first: Path, second: Path) -> bool:
    """Exchange two folders of one file system in one step; False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    status = renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    return bool(status == 0)
