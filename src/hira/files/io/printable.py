"""Text from files that others wrote, made safe to print."""

from __future__ import annotations


def printable(text: str) -> str:
    """Return a line with every character that is not seen, or acts on a terminal, as an escape such as ``\\x1b``."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
