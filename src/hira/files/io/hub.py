"""Models and adapters by their names on the hub: what is needed of a repository is downloaded to the hub's cache."""

from __future__ import annotations

import os
import re
from glob import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from hira.errors import HiraError
from hira.files.io.recognise import (
    ADAPTER_CONFIG,
    ADAPTER_PICKLE,
    ADAPTER_TENSORS,
    INDEX,
    PICKLES,
    SINGLE,
    WEIGHTS,
)
from hira.files.io.safe_paths import inside
from hira.files.io.strict_json import read_object

PathLike = str | os.PathLike[str]
ON_HUB = ", or pass a name on the hub such as owner/name"
_ID = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@([\w./-]{1,200}))?", re.ASCII)
_CACHED = re.compile(r"models--([^/]+)/snapshots/[^/]+/?$")


def hub_id(name: str) -> str | None:
    """Return the repository that a name means: `owner/name`, with a revision or not, or a path in the hub's cache."""
    if (cached := _CACHED.search(name)) is not None:
        return cached[1].replace("--", "/", 1)
    match = _ID.fullmatch(name)
    return match and match[1]


def name_of(folder: Path) -> str:
    """Return a model's or adapter's name: its repository's where it lies in the hub's cache, else its folder's."""
    return hub_id(str(folder)) or folder.name


def located(path: PathLike, kind: Literal["model", "adapter"]) -> PathLike:
    """Return the folder of a repository of the hub, downloaded unless it is in the cache; else the path as it is.

    Args:
        path: a folder, or where there is none of that name, `owner/name` or `owner/name@revision`.
        kind: what is needed of it: an adapter's configuration and tensors, or all of a model but for pickles and
            copies of its weights in other formats.

    Raises:
        HiraError: there is no such repository or revision, or the hub cannot be reached and the cache does not have it.
    """
    match = _ID.fullmatch(os.fspath(path))
    if match is None or os.path.lexists(path):
        return path
    if kind == "adapter":
        root = _download(match, kind, allow_patterns=[ADAPTER_CONFIG, ADAPTER_TENSORS, f"*/{ADAPTER_CONFIG}"])
        pickled = not os.path.lexists(root / ADAPTER_TENSORS) and os.path.lexists(root / ADAPTER_CONFIG)
        return _download(match, kind, allow_patterns=[ADAPTER_PICKLE]) if pickled else root
    root = _download(match, kind, ignore_patterns=[f"*{suffix}" for suffix in sorted(PICKLES | WEIGHTS)])
    names: set[object] = {SINGLE}
    if os.path.lexists(root / INDEX):
        weight_map = read_object(inside(root, INDEX)).get("weight_map")
        names |= {*(weight_map.values() if isinstance(weight_map, dict) else ())}
    return _download(match, kind, allow_patterns=[escape(name) for name in names if isinstance(name, str)])


def _download(match: re.Match[str], kind: str, **patterns: Any) -> Path:
    from huggingface_hub import snapshot_download

    patterns |= {"library_name": "hira", "library_version": version("hira")}
    try:
        return Path(snapshot_download(match[1], revision=match[2], **patterns))
    except Exception as error:  # of the network's library, the hub's, or the system
        reason = " ".join(str(error).split())[:400]
        raise HiraError(
            f"the {kind} {match[0]!r} is not a folder here, and {match[1]} could not be downloaded from the hub "
            f"({type(error).__name__}: {reason}). Check the path, or the name and the revision; `hf auth login` gives "
            "access to what is private, and HF_HUB_OFFLINE=1 takes what the cache has."
        ) from error
