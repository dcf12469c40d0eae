"""HiraConfig's fields as arguments: a flat dataclass of types that a command line has."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from peft.config import PeftConfig

from hira.config.hira_config import HiraConfig
from hira.errors import HiraError


def _flat(hint: Any) -> Any:
    """The type of a field as TrlParser takes it; what has no such type is text, JSON where it can be."""
    if hint in (int, float, bool) or get_origin(hint) is Literal:
        return hint
    parts = get_args(hint)
    lists = [part for part in (list[str], list[int]) if part in parts]
    mapping = any(get_origin(part) is dict for part in parts)
    return lists[0] | None if lists and not mapping else str | None


def _hira_arguments() -> Any:
    """A dataclass with a field `hira_*` for each of HiraConfig's own."""
    hints, own = get_type_hints(HiraConfig), {}
    for item in dataclasses.fields(HiraConfig):
        if item.name not in PeftConfig.__dataclass_fields__ and item.name != "fan_in_fan_out":  # which is found out
            default = None if item.default is dataclasses.MISSING else item.default
            own[item.name] = (_flat(hints[item.name]), field(default=default, metadata=dict(item.metadata)))
    help = "LoRA's alpha, for LoRA's learning rates: a number, or 2r, twice the rank; none for the paper's HiRA."
    own["hira_alpha"] = (str | None, field(default="2r", metadata={"help": help}))
    made = dataclasses.make_dataclass("HiraArguments", [(_flag(name), *rest) for name, rest in own.items()])
    setattr(made, "_argument_group_name", "the adapter")  # noqa: B010 (mypy knows no attributes of a made class)
    return made


def _flag(name: str) -> str:
    """The argument for a field of HiraConfig."""
    return name if name.startswith("hira_") else f"hira_{name}"


HiraArguments = _hira_arguments()


def alpha_of(arguments: Any) -> float | None:
    """LoRA's alpha, or None for the paper's HiRA.

    Raises:
        HiraError: `hira_alpha` is no number, nor 2r, nor none.
    """
    text = str(arguments.hira_alpha).lower()
    if text in ("none", "null"):
        return None
    try:
        return 2 * arguments.hira_r if text == "2r" else float(text)
    except ValueError:
        raise HiraError(f"hira_alpha must be a number, 2r or none, not {arguments.hira_alpha!r}.") from None


def config_of(arguments: Any, task_type: str) -> HiraConfig:
    """The HiraConfig of HiraArguments.

    Raises:
        HiraError: a field has a value that HiraConfig refuses.
    """
    hints, values = get_type_hints(HiraConfig), {}
    for name in HiraConfig.__dataclass_fields__:
        value = getattr(arguments, _flag(name), None)
        if isinstance(value, list) and len(value) == 1 and str in get_args(hints[name]):
            value = value[0]  # a regular expression, or "all-linear"
        elif isinstance(value, str) and _flat(hints[name]) == str | None:
            value = _from_json(value)
        if value is not None:
            values[name] = value
    return HiraConfig(**{**values, "task_type": task_type, "hira_alpha": alpha_of(arguments)})


def _from_json(text: str) -> Any:
    """What a text says as JSON, or else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text
