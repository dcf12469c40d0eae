"""Text out of files that others wrote, made fit for a terminal and for a page."""

from __future__ import annotations

import re

# what Unicode counts as printable although nothing is seen of it: fillers, joiners and selectors of variants
_UNSEEN = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)


def printable(text: str) -> str:
    """Return a line with every character that is not seen, or acts on a terminal, as an escape such as ``\\x1b``.

    These are control characters, line ends, marks that turn the direction of text around, characters of no width,
    spaces other than the plain one, and halves of surrogate pairs, as of a file's name that is no UTF-8.
    """
    if text.isprintable() and _UNSEEN.search(text) is None:
        return text
    return "".join(c if c.isprintable() and _UNSEEN.match(c) is None else _escaped(c) for c in text)


def printable_lines(text: str) -> str:
    """Return text of several lines, each `printable`."""
    return "\n".join(map(printable, text.split("\n")))


def _escaped(character: str) -> str:
    code = ord(character)
    if character in "\n\r\t":
        return character.encode("unicode_escape").decode()
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
