"""JSON from files that are not trusted: of limited size, one object, no key twice, all numbers finite."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from hira.errors import HiraError

MAX_BYTES = 100_000_000  # safetensors' own limit for a header
_MAX_DEPTH = 100


def parse_object(data: bytes, what: str) -> dict[str, Any]:
    """Return the object that some bytes of JSON hold.

    Args:
        data: the bytes, UTF-8; JSON as by RFC 8259, whose numbers are finite.
        what: the file, for messages.

    Returns:
        The object. All its keys and strings can be written as UTF-8 again, and all its numbers as JSON.

    Raises:
        HiraError: it is not UTF-8, not JSON or not an object, has a key twice, is nested too deep, or has NaN,
            Infinity, or a number like 1e999 that float64 cannot hold.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise HiraError(f"{what} has the key {key!r} twice; it was damaged or tampered with.")
            found[key] = value
        return found

    def number(digits: str) -> float:
        if not math.isfinite(found := float(digits)):
            raise HiraError(
                f"{what} has {digits[:40]}, which is no finite number of float64; correct the file. Where it has to be "
                'infinite, transformers 5 writes and reads {"__float__": "Infinity"}.'
            )
        return found

    try:
        text = data.decode()
        value = json.loads(text, object_pairs_hook=unique, parse_float=number, parse_constant=number)
        if "\\u" in text:  # only an escape can give half of a surrogate pair
            json.dumps(value, ensure_ascii=False).encode()
    except HiraError:
        raise
    except (ValueError, RecursionError) as error:
        raise HiraError(f"{what} is not JSON ({error}), so it is damaged; download the file again.") from error
    if not isinstance(value, dict):
        raise HiraError(f"{what} holds a {type(value).__name__} where an object was expected; download it again.")
    if _depth(value) > _MAX_DEPTH:
        raise HiraError(f"{what} has more than {_MAX_DEPTH} objects and lists within one another; it is damaged.")
    return value


def read_object(path: Path) -> dict[str, Any]:
    """Return the object that a file of JSON holds.

    Raises:
        HiraError: the file cannot be read, has more than 100 MB, or is not as `parse_object` wants it.
    """
    try:
        if not path.is_file():
            raise HiraError(f"{path} is not a file; check the path.")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise HiraError(f"{path} cannot be read: {error.strerror}.") from error
    if len(data) > MAX_BYTES:
        raise HiraError(f"{path} has more than {MAX_BYTES} bytes, which is too much for a file of its kind.")
    return parse_object(data, str(path))


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [part for part in level if isinstance(part, dict | list)]:
        level = [part for whole in level for part in (whole.values() if isinstance(whole, dict) else whole)]
        depth += 1
    return depth
