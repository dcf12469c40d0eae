"""JSON from files that are not trusted: of limited size, one object, no key twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hira.errors import HiraError

MAX_BYTES = 100_000_000  # safetensors' own limit for a header
MAX_DEPTH = 100


def parse_object(data: bytes, what: str) -> dict[str, Any]:
    """Return the object that some bytes of JSON hold.

    Args:
        data: the bytes, UTF-8; JSON as by RFC 8259, that is without NaN and Infinity.
        what: the file, for messages.

    Returns:
        The object. All its keys and strings can be written as UTF-8 again.

    Raises:
        HiraError: it is not UTF-8, not JSON or not an object, has a key twice, or is nested too deep.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise HiraError(f"{what} is not UTF-8 (byte {error.start}), so it is damaged; get the file anew.") from error

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise HiraError(f"{what} has the key {_first_repeated(pairs)!r} twice; it was damaged or tampered with.")
        return found

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=_refuse_constant)
        if "\\u" in text:  # only an escape can give half of a surrogate pair
            json.dumps(value, ensure_ascii=False).encode()
    except HiraError:
        raise
    except (ValueError, RecursionError) as error:
        raise HiraError(f"{what} is not JSON ({error}), so it is damaged; get the file anew.") from error
    if _depth(value) > MAX_DEPTH:
        raise HiraError(
            f"{what} is nested more than {MAX_DEPTH} deep, which no honest file of its kind is; get it anew."
        )
    if not isinstance(value, dict):
        raise HiraError(f"{what} holds a {type(value).__name__} where an object was expected; get the file anew.")
    return value


def read_object(path: Path, limit: int = MAX_BYTES) -> dict[str, Any]:
    """Return the object that a file of JSON holds.

    Args:
        path: the file.
        limit: the most bytes that are read.

    Returns:
        The object, as from `parse_object`.

    Raises:
        HiraError: the file cannot be read, is larger than the limit, or is not as `parse_object` wants it.
    """
    try:
        if not path.is_file():
            raise HiraError(f"{path} is not a file; check the path.")
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise HiraError(f"{path} cannot be read: {error.strerror}.") from error
    if len(data) > limit:
        raise HiraError(f"{path} has more than {limit} bytes, which no honest file of its kind has; get it anew.")
    return parse_object(data, str(path))


def _depth(value: Any) -> int:
    """How deep objects and lists are nested, level by level."""
    depth, level = 0, [value]
    while level := [part for part in level if isinstance(part, dict | list)]:
        level = [part for whole in level for part in (whole.values() if isinstance(whole, dict) else whole)]
        depth += 1
    return depth


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _first_repeated(pairs: list[tuple[str, Any]]) -> str:
    seen: set[str] = set()
    return next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
