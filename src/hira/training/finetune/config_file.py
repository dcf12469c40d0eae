"""The YAML file of `hira finetune`: its keys, and the lines that they are on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from hira.errors import HiraError


class ConfigFile(NamedTuple):
    """A file's keys; none if no file is given.

    Args:
        path: the file.
        values: what it says.
        lines: the line of each key, from 1.
    """

    path: Path | None
    values: dict[str, Any]
    lines: dict[str, int]

    @classmethod
    def of(cls, arguments: Sequence[str]) -> ConfigFile:
        """Read the file that is named behind --config.

        Raises:
            HiraError: it cannot be read, is not YAML or no mapping of names, or has a key twice.
        """
        if "--config" not in arguments:
            return cls(None, {}, {})
        if arguments[-1] == "--config":
            raise HiraError("--config needs a file.")
        path = Path(arguments[arguments.index("--config") + 1])
        try:
            text = path.read_text(encoding="utf-8")
            root = yaml.compose(text)
            values = yaml.safe_load(text)
        except (OSError, UnicodeDecodeError) as error:
            raise HiraError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            place = f"{path}:{mark.line + 1}" if mark else str(path)
            raise HiraError(f"{place}: not YAML: {getattr(error, 'problem', None) or error}.") from error
        if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
            raise HiraError(f"{path} must map names of arguments to values.")
        lines: dict[str, int] = {}
        for key, _ in root.value:
            line = key.start_mark.line + 1
            if key.value in lines:
                raise HiraError(f"{path}:{line}: {key.value} is there already, on line {lines[key.value]}.")
            lines[key.value] = line
        return cls(path, values, lines)

    def without(self, arguments: Sequence[str]) -> list[str]:
        """The arguments but --config and its file."""
        if self.path is None:
            return list(arguments)
        position = list(arguments).index("--config")
        return [*arguments[:position], *arguments[position + 2 :]]

    def place(self, name: str) -> str:
        """`file:line: ` of a key, for messages; nothing where the file does not have it."""
        return f"{self.path}:{self.lines[name]}: " if name in self.lines else ""
