"""What a row of training data has to have in it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from hira.errors import HiraError


class Columns(NamedTuple):
    """The columns that training takes, in the forms that TRL knows.

    Args:
        text: the column with the text.
        label: the column with the class, for a classifier; else None.
    """

    text: str
    label: str | None = None

    def needed(self, names: Collection[str], place: str) -> list[str]:
        """Those of a row's columns that training reads.

        Raises:
            HiraError: one is missing.
        """
        if self.label is not None:
            wanted = [[self.text, self.label]]
        else:
            wanted = [["messages"], ["conversations"], ["prompt", "completion"], [self.text], ["input_ids"]]
        for form in wanted:
            if set(form) <= set(names):
                return form
        options = " or ".join(" and ".join(form) for form in wanted)
        raise HiraError(f"{place}: no column {options}; the columns are {', '.join(names) or 'none'}.")

    def check(self, row: Mapping[str, Any], place: str) -> None:
        """Check the values that training reads.

        Raises:
            HiraError: one is missing, or of the wrong type.
        """
        form = self.needed(row.keys(), place)
        for name in form:
            if (expected := self._expected(name, row[name])) is not None:
                found = "empty" if row[name] is None else f"of type {type(row[name]).__name__}"
                raise HiraError(f"{place}: {name} is {found} where {expected} was expected.")
        if form == ["prompt", "completion"] and isinstance(row["prompt"], str) != isinstance(row["completion"], str):
            raise HiraError(f"{place}: prompt and completion must both be strings, or both lists of messages.")

    def _expected(self, name: str, value: Any) -> str | None:
        """What a value should have been; None if it is that."""
        if name == self.label:
            return None if isinstance(value, str | int) else "a string or an integer"
        if name in ("messages", "conversations"):
            return None if _are_messages(value) else "a list of messages"
        if name in ("prompt", "completion"):
            return None if isinstance(value, str) or _are_messages(value) else "a string or a list of messages"
        if name == "input_ids":
            return None if isinstance(value, list) else "a list of integers"
        return None if isinstance(value, str) else "a string"


def _are_messages(value: Any) -> bool:
    """Whether a value is a list of objects with a role and a content, or as ShareGPT has them, from and value."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(each, dict) and ("role" in each or {"from", "value"} <= each.keys()) for each in value)
    )
