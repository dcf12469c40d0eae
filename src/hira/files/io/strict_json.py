"""JSON from files that are not trusted: of limited size, one object, no key twice, all numbers finite."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from hira.errors import HiraError

MAX_BYTES = 100_000_000  # safetensors' own limit for a header
MAX_DEPTH = 100


def parse_object(data: bytes, what: str) -> dict[str, Any]:
    """Return the object that some bytes of JSON hold.

    Args:
        data: the bytes, UTF-8; JSON as by RFC 8259, whose numbers are finite.
        what: the file, for messages.

    Returns:
        The object. All its keys and strings can be written as UTF-8 again, and all its numbers as JSON.

    Raises:
        HiraError: it is not UTF-8, not JSON or not an object, has a key twice, is nested too deep, or has NaN,
            Infinity, or a number like 1e999 that float64 cannot hold; the message names its field.
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

    not_finite: list[str] = []

    def number(digits: str) -> float:
        found = float(digits)
        if not math.isfinite(found):
            not_finite.append(digits)
        return found

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_float=number, parse_constant=number)
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
    if not_finite:
        raise HiraError(
            f"{what} has {not_finite[0][:40]} for {_field(value)!r}, which is no finite number of float64; correct the "
            'file. Where it has to be infinite, transformers 5 writes and reads {"__float__": "Infinity"}.'
        )
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


def _field(value: Any) -> str:
    """Where in an object the first number is that is not finite, such as `rope_parameters.rope_theta`."""
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in parts:
        if isinstance(part, float) and not math.isfinite(part):
            return str(key)
        if isinstance(part, dict | list) and (field := _field(part)):
            return f"{key}.{field}"
    return ""


def _first_repeated(pairs: list[tuple[str, Any]]) -> str:
    seen: set[str] = set()
    return next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
