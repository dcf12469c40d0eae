"""Local files of data: which ones are meant, and every row of them checked before anything is loaded."""

from __future__ import annotations

import csv
import glob
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hira.errors import HiraError
from hira.training.finetune.rows import Columns

# the names that `datasets` has for its readers of files, by the ends of the files' names
READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
_COMPRESSED = {".gz", ".bz2", ".xz", ".zst", ".zip"}  # `datasets` unpacks these


class DataFiles(NamedTuple):
    """Files on this machine.

    Args:
        reader: the name that `datasets` has for their format.
        paths: the files.
    """

    reader: str
    paths: list[Path]


def files_of(path: str, data_files: Any) -> DataFiles | None:
    """The local files that a data set's path and data_files name; None for one on the hub or elsewhere.

    Raises:
        HiraError: a file does not exist, a pattern matches none, or a file's format cannot be told from its name.
    """
    if path in READERS.values():
        if data_files is None:
            raise HiraError(f"the data set {path!r} needs data_files, the files to read.")
        if isinstance(data_files, Mapping):
            names = [name for part in data_files.values() for name in ([part] if isinstance(part, str) else part)]
        else:
            names = [data_files] if isinstance(data_files, str) else list(data_files)
        local = [name for name in names if "://" not in name]
        return DataFiles(path, [file for name in local for file in _matching(name)]) if local else None
    where = Path(path)
    if where.is_dir():
        found = sorted(file for file in where.rglob("*") if file.suffix in READERS)
        formats = {READERS[file.suffix] for file in found}
        return DataFiles(formats.pop(), found) if len(formats) == 1 else None
    endings = set(where.suffixes) & READERS.keys()
    if where.is_file() or endings:
        if not endings:
            raise HiraError(f"{path} must end in one of {', '.join(READERS)}, by which its format is known.")
        return DataFiles(READERS[endings.pop()], _matching(path))
    return None


def _matching(name: str) -> list[Path]:
    found = [Path(file) for file in sorted(glob.glob(name, recursive=True))] if glob.has_magic(name) else [Path(name)]
    if not found:
        raise HiraError(f"no file matches {name}.")
    for file in found:
        if not file.is_file():
            raise HiraError(f"{file} is not a file; check the path of the data.")
    return found


def check_files(files: DataFiles, columns: Columns) -> int:
    """Check every row, and return how many there are; compressed files are left to `datasets`, and count as none.

    Raises:
        HiraError: a row is malformed, lacks a column that training needs, or has another type in it, or a file has no
            row. The message has the file's name and the line.
    """
    total = 0
    for path in files.paths:
        if path.suffix in _COMPRESSED:
            continue
        if files.reader == "parquet":
            total += _check_parquet(path, columns)
            continue
        try:
            count = 0
            for place, row in _rows(path, files.reader):
                columns.check(row, f"{path}:{place}")
                count += 1
        except OSError as error:
            raise HiraError(f"{path} cannot be read: {error.strerror}.") from error
        if not count:
            raise HiraError(f"{path} has no rows.")
        total += count
    return total


def _rows(path: Path, reader: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file of text, each behind its place in the file."""
    if reader == "json":
        yield from _json_rows(path)
    elif reader == "csv":
        yield from _csv_rows(path)
    else:
        yield from ((str(number), {"text": line}) for number, line in _lines(path))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines and their numbers, from 1."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise HiraError(f"{path}:{number}: not UTF-8 ({error.reason} at byte {error.start}).") from error


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """An object on each line; or one list of objects, which is the whole file."""
    with path.open("rb") as file:
        whole = file.read(64).lstrip()[:1] == b"["
    if whole:
        text = "".join(line for _, line in _lines(path))
        rows = ((f"row {number}", row) for number, row in enumerate(_parsed(text, path, 1), 1))
    else:
        rows = ((str(number), _parsed(line.rstrip(), path, number)) for number, line in _lines(path) if line.strip())
    for place, row in rows:
        if not isinstance(row, dict):
            raise HiraError(f"{path}:{place}: of type {type(row).__name__} where an object was expected.")
        yield place, row


def _parsed(text: str, path: Path, first: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        number = first + getattr(error, "lineno", 1) - 1
        raise HiraError(f"{path}:{number}: not JSON: {getattr(error, 'msg', None) or error}.") from error


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(sys.maxsize)  # long texts
    lines = csv.reader(line for _, line in _lines(path))
    header = next(lines, [])
    try:
        for values in lines:
            if not values:
                continue
            if len(values) != len(header):
                raise HiraError(f"{path}:{lines.line_num}: {len(values)} values where the header has {len(header)}.")
            # an empty field is a missing value to `datasets`
            yield str(lines.line_num), {name: value or None for name, value in zip(header, values, strict=True)}
    except csv.Error as error:
        raise HiraError(f"{path}:{lines.line_num}: not CSV: {error}.") from error


def _check_parquet(path: Path, columns: Columns) -> int:
    """The columns of a file, from its end; its values are checked once it is loaded."""
    from pyarrow import ArrowException, parquet

    try:
        found = parquet.read_metadata(path)
        names = parquet.read_schema(path).names
    except (ArrowException, OSError) as error:
        raise HiraError(f"{path} is not a readable Parquet file: {error}.") from error
    columns.needed(names, str(path))
    if not found.num_rows:
        raise HiraError(f"{path} has no rows.")
    return int(found.num_rows)
