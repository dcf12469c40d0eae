"""The one error type of this package."""

from __future__ import annotations


class HiraError(ValueError):
    """Raised for bad input: the message names the thing, what was found, what was expected and what to do."""
