"""The manifest of an output folder: the size and SHA-256 of every file, and the check that they hold."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from hira.errors import HiraError
from hira.files.io.safe_paths import check_basename, inside, opened_folder
from hira.files.io.strict_json import read_object

MANIFEST = "hira-manifest.json"
STATE = ".hira-state.json"  # what was finished of a folder that is being written
_BLOCK = 4 << 20


@dataclass(frozen=True)
class FileRecord:
    """A file's size in bytes and its SHA-256 in hexadecimal."""

    size: int
    sha256: str


def record_of(path: Path) -> FileRecord:
    """Return the size and the hash of a file; a HiraError if it cannot be read."""
    digest, size = hashlib.sha256(), 0
    buffer = memoryview(bytearray(_BLOCK))
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
                size += count
    except OSError as error:
        raise HiraError(f"{path} cannot be read: {error.strerror}.") from error
    return FileRecord(size, digest.hexdigest())


def check_relative(name: str, what: str) -> str:
    """Return a file's path in a folder if it stays there; else raise a HiraError that says `what` it is."""
    for part in name.split("/"):
        check_basename(part, what)
    return name


def records_to_json(records: Mapping[str, FileRecord], **more: Any) -> bytes:
    """Return the JSON of records by name, beside other fields."""
    files = {name: asdict(records[name]) for name in sorted(records)}
    return (json.dumps({**more, "files": files}, indent=2, ensure_ascii=False) + "\n").encode()


def records_of(content: Mapping[str, Any], path: Path) -> dict[str, FileRecord]:
    """Return the records of a file's JSON; a HiraError, with its path, if they are not as `records_to_json` writes."""
    files = content.get("files")
    if not isinstance(files, dict):
        raise HiraError(f"{path} has no object `files`; hira did not write it, or it was damaged.")
    records = {}
    for name, value in files.items():
        check_relative(name, f"a file in {path}")
        record = value if isinstance(value, dict) else {}
        size, sha256 = record.get("size"), record.get("sha256")
        if type(size) is not int or not isinstance(sha256, str):
            raise HiraError(f"{path} must have a size and a sha256 for {name!r}; it was damaged.")
        records[name] = FileRecord(size, sha256)
    return records


def verify(folder: str | os.PathLike[str]) -> list[str]:
    """Check a folder against its manifest, reading every file.

    Args:
        folder: the folder, as hira wrote it or as it came from elsewhere.

    Returns:
        A line for each file that is missing, has changed, or is not in the manifest; none if all is well.

    Raises:
        HiraError: there is no folder or no manifest, or the manifest is damaged.
    """
    root = opened_folder(folder, "the folder", ", or download it first")
    path = root / MANIFEST
    if not os.path.lexists(path):
        raise HiraError(f"{root} has no {MANIFEST}, so there is nothing to check it against; hira did not write it.")
    records = records_of(read_object(inside(root, MANIFEST)), path)
    present = set(files_of(root)) - {MANIFEST}
    problems = [f"{name}: not in the manifest" for name in sorted(present - records.keys())]
    for name, record in records.items():
        if name not in present:
            problems.append(f"{name}: missing")
            continue
        found = record_of(inside(root, name))
        if found.size != record.size:
            problems.append(f"{name}: has {found.size} bytes, not {record.size}")
        elif found != record:
            problems.append(f"{name}: its SHA-256 is {found.sha256}, not {record.sha256}")
    return problems


def files_of(root: Path) -> list[str]:
    """Return the paths in a folder of all that is not a folder, links included."""
    return [
        str(PurePosixPath(Path(folder, name).relative_to(root)))
        for folder, folders, files in os.walk(root)
        for name in files + [name for name in folders if os.path.islink(os.path.join(folder, name))]
    ]
