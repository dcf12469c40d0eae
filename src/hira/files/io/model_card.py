"""The model card of a folder that hira wrote: a README.md with its sources and the command that made it."""

from __future__ import annotations

import json
import platform
import re
import shlex
from collections.abc import Sequence
from importlib.metadata import version

import torch

from hira.files.io.printable import printable

CARD = "README.md"


def card(
    title: str,
    text: Sequence[str],
    facts: dict[str, str],
    command: Sequence[str],
    base: str | None = None,
    tags: Sequence[str] = (),
    library: str = "transformers",
) -> bytes:
    """Return a card, with a header that the hub reads, and with the versions of the libraries that made the folder.

    Args:
        title: its heading.
        text: its paragraphs.
        facts: the rows of a table; names in them are `quoted`.
        command: the arguments of the command that makes the folder again.
        base: the name of the base model, which the header has if it has an owner.
        tags: for the header.
        library: what loads the folder, for the header.
    """
    header = [f"base_model: {base}"] if base and re.fullmatch(r"[\w.-]+/[\w.-]+", base, re.ASCII) else []
    header += [f"library_name: {library}", "tags:", *(f"- {tag}" for tag in tags)]
    versions = {name: version(name) for name in ("hira", "torch", "peft", "transformers")}
    versions["python"] = platform.python_version()
    rows = {**facts, "made with": ", ".join(f"{name} {number}" for name, number in versions.items())}
    table = [f"| {name} | {value} |" for name, value in rows.items()]
    lines = [
        "---",
        *header,
        "---",
        "",
        f"# {title}",
        "",
        *(line for part in text for line in (part, "")),
    ]
    lines += ["| | |", "|---|---|", *table, "", "```sh", printable(shlex.join(command)), "```", ""]
    return "\n".join(lines).encode()


def quoted(name: str) -> str:
    """A name as code in Markdown, with nothing in it that Markdown interprets."""
    return "`" + printable(json.dumps(name)).replace("`", "\\u0060").replace("|", "\\u007c") + "`"


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype's name, such as bfloat16."""
    return str(dtype).removeprefix("torch.")
