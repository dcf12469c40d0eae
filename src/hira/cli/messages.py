"""What the commands print: lines, errors as messages, and nothing that libraries log while they are imported."""

from __future__ import annotations

import logging
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from hira.errors import HiraError


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """Print a HiraError as a message, and fail with status 1."""
    try:
        yield
    except HiraError as error:
        print_line(f"hira: {error}", error=True)
        raise typer.Exit(1) from error


def print_line(line: str, error: bool = False, width: int | None = None) -> None:
    """Print a line, broken between words for a width, without the control characters of names from files."""
    from hira.files.io.printable import printable

    shown = printable(line)
    if width is not None:
        shown = textwrap.fill(shown, width, break_long_words=False, break_on_hyphens=False)
    print(shown, file=sys.stderr if error else sys.stdout)


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Leave out what quantisation libraries log while PEFT imports them; errors are still shown."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
