"""Locks, and writing to the disk, by the operating system."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hira.errors import HiraError

if sys.platform != "win32":
    import fcntl


@contextmanager
def explained(path: Path, hint: str = "") -> Iterator[None]:
    """Turn an error of the operating system into a HiraError that names the file and what was found."""
    try:
        yield
    except OSError as error:
        text = error.strerror or type(error).__name__
        raise HiraError(f"{error.filename or path} cannot be written: {text}.{hint}") from error


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Lock a folder against other writers; the system releases the lock when the process ends, even if it is killed.

    The lock is on a file beside the folder. That file is never renamed, so the lock holds while the folder is.

    Raises:
        HiraError: another process, or another thread of this one, has it.
    """
    if sys.platform == "win32":
        yield
        return
    path = target.parent / f".{target.name}.hira-lock"
    descriptor = _lock(path)
    if descriptor is None:
        raise HiraError(f"another process is writing to {target}; wait for it, or end it.")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before the lock is released, so that it is not the next writer's
        os.close(descriptor)


def _lock(path: Path) -> int | None:
    """Lock the file at a path, made if need be, and return its descriptor; None if another process has locked it."""
    while True:
        descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return descriptor
        except FileNotFoundError:
            pass  # another writer ended, and removed the file, after it was opened here
        except OSError as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                return None
            raise
        os.close(descriptor)


def sync(path: Path) -> None:
    """Write a file or a folder from the system's memory to the disk."""
    if sys.platform == "win32" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def start_writing(descriptor: int) -> None:
    """Ask the system to write a file's data to the disk now, not only when the file is synchronised."""
    if sys.platform.startswith("linux"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
