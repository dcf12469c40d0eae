"""A model's folder: its shards, what their headers say, and the files beside them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hira.errors import HiraError
from hira.files.io.hub import ON_HUB, located
from hira.files.io.manifest import MANIFEST, STATE, check_relative
from hira.files.io.recognise import INDEX, PICKLES, SINGLE, WEIGHTS, not_a_model
from hira.files.io.safe_paths import check_basename, inside, opened_folder
from hira.files.io.safetensors_file import Header, TensorEntry, read_header
from hira.files.io.strict_json import read_object

_NOT_COPIED = frozenset({".git", ".cache", "__pycache__", MANIFEST, STATE, f"{STATE}.new", SINGLE, INDEX})


@dataclass(frozen=True)
class ModelFolder:
    """A model as it lies on a disk, every header checked and no tensor read.

    Args:
        path: the folder's real path.
        shards: the header of each file of weights, by the file's name, in the order of the index.
        tensors: each tensor's header and entry, by its name.
        index: the index of the shards, None for a single file.
        metadata: what the index says of the model as a whole; each shard's own is in its header.
        other_files: the files to be copied with the weights, by their paths in the folder.
        skipped: the files that are not, each with the reason.
    """

    path: Path
    shards: dict[str, Header]
    tensors: dict[str, tuple[Header, TensorEntry]]
    index: str | None
    metadata: dict[str, Any]
    other_files: list[str]
    skipped: dict[str, str]

    def file(self, name: str) -> Path:
        """Return the real path of one of the other files; a HiraError if a link leads outside."""
        return inside(self.path, name)


def read_folder(path: str | os.PathLike[str]) -> ModelFolder:
    """Read a model's folder, or its snapshot in the hub's cache.

    Args:
        path: the folder, with `model.safetensors`, or else with `model.safetensors.index.json` and its shards; or its
            name on the hub, `owner/name` or `owner/name@revision`, where there is no such folder.

    Returns:
        What it holds.

    Raises:
        HiraError: there is no folder, no safetensors file, an index that names files elsewhere or does not agree with
            the shards' headers, a link of another file that leads outside, or a bad header.
    """
    root = opened_folder(located(path, "model"), "the model", ON_HUB)
    index: str | None = None
    metadata: dict[str, Any] = {}
    if os.path.lexists(root / SINGLE):  # which transformers, too, prefers to an index
        shards = {SINGLE: read_header(inside(root, SINGLE, weights=True))}
        tensors = {name: (shards[SINGLE], entry) for name, entry in shards[SINGLE].entries.items()}
    elif os.path.lexists(root / INDEX):
        index = INDEX
        shards, tensors, metadata = _read_index(root)
    else:
        raise HiraError(not_a_model(root))
    other_files, skipped = _other_files(root, shards)
    return ModelFolder(root, shards, tensors, index, metadata, other_files, skipped)


def _read_index(root: Path) -> tuple[dict[str, Header], dict[str, tuple[Header, TensorEntry]], dict[str, Any]]:
    """Shards and tensors that an index names, checked against the headers, and the index's metadata."""
    path = root / INDEX
    content = read_object(inside(root, INDEX))
    weight_map, metadata = content.get("weight_map"), content.get("metadata", {})
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(metadata, dict):
        raise HiraError(f"{path} must have a weight_map of names to files, and metadata that is an object, if any.")
    for tensor, shard in weight_map.items():
        what = f"the file of tensor {tensor!r} in {path}"
        if not check_basename(shard, what).endswith(".safetensors"):
            raise HiraError(f"{what} is {shard!r}, which is not a safetensors file.")
    shards = {name: read_header(inside(root, name, weights=True)) for name in dict.fromkeys(weight_map.values())}
    tensors: dict[str, tuple[Header, TensorEntry]] = {}
    for shard, header in shards.items():
        for name, entry in header.entries.items():
            if name not in weight_map:
                raise HiraError(f"tensor {name!r} of {header.path} is not in {path}; the two do not belong together.")
            if name in tensors or weight_map[name] != shard:
                raise HiraError(
                    f"tensor {name!r} is in {shard}, but {path} has it in {weight_map[name]}; one of them is of "
                    "another model."
                )
            tensors[name] = header, entry
    missing = [name for name in weight_map if name not in tensors]
    if missing:
        raise HiraError(
            f"{path} names {len(missing)} tensors that their shards lack, such as {missing[0]!r} of "
            f"{weight_map[missing[0]]}; download the files again."
        )
    return shards, tensors, metadata


def _other_files(root: Path, shards: dict[str, Header]) -> tuple[list[str], dict[str, str]]:
    """The files to be copied, and those not to be with the reasons, by their paths in the folder."""
    found: list[str] = []
    skipped: dict[str, str] = {}
    for folder, folders, files in os.walk(root, onerror=_unreadable):
        folders[:] = sorted(name for name in folders if name not in _NOT_COPIED)
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in sorted(files) + links:
            path = Path(folder, name).relative_to(root).as_posix()
            suffix = Path(name).suffix.lower()
            if path in shards or path in _NOT_COPIED:
                continue
            if path == "adapter_config.json":
                skipped[path] = "of an adapter, which would be loaded with the model"
            elif suffix in PICKLES:
                skipped[path] = "a pickle"
            elif suffix in WEIGHTS or name.endswith(".safetensors.index.json"):
                skipped[path] = "another copy of the weights"
            else:
                inside(root, check_relative(path, f"a file in {root}"))
                found.append(path)
    return found, skipped


def _unreadable(error: OSError) -> None:
    raise HiraError(f"{error.filename} cannot be read: {error.strerror}.") from error
