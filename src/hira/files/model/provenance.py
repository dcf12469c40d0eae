"""Whether a model is the one that an adapter was trained on, as far as their files tell, and what is merged into it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hira.errors import HiraError
from hira.files.io.adapter_folder import Adapter
from hira.files.io.hub import hub_id, name_of
from hira.files.io.manifest import MANIFEST
from hira.files.io.model_folder import ModelFolder, read_folder
from hira.files.io.safe_paths import inside
from hira.files.io.safetensors_file import read_bytes, tensor_bytes
from hira.files.io.strict_json import read_object

MERGED = "merged"  # the manifest's field
_SAMPLE = 64 << 10  # bytes of a tensor that are compared
_COMMIT = re.compile(r"[0-9a-f]{40}")


def merge_record(model: ModelFolder, adapters: Sequence[Adapter]) -> dict[str, Any]:
    """Return the manifest's record of a merge.

    It has the names of the base model and of all adapters in the weights, those that had been merged into the base
    model too, each with a SHA-256 of its factors.
    """
    before = _record(model.path)
    own = [{"name": name_of(adapter.path), "sha256": _fingerprint(adapter)} for adapter in adapters]
    return {"base": before.get("base", name_of(model.path)), "adapters": [*before.get("adapters", ()), *own]}


def check_base(model: ModelFolder, adapter: Adapter, any_base: bool = False) -> list[str]:
    """Compare the model that an adapter was trained on with another.

    Compared are what the adapter's configuration names (`base_model_name_or_path`, `revision`), and of the model its
    path, its name in the hub's cache, its configuration, and the manifest of a merge. Where the configuration names
    another folder that is here, samples of the weights decide.

    Args:
        model: the model that it is to be applied to.
        adapter: the adapter.
        any_base: report a contradiction instead of raising.

    Returns:
        Notes: a contradiction that `any_base` allows, or why it is not known whether the model is the right one.

    Raises:
        HiraError: the model is certainly another one, or has the adapter in its weights already.
    """
    is_certain, finding = _compare(model, adapter)
    if is_certain and not any_base:
        raise HiraError(f"{finding}. If it is meant: --any-base (any_base=True).")
    return [finding] if finding else []


def _compare(model: ModelFolder, adapter: Adapter) -> tuple[bool, str]:
    """Whether a model is certainly not the right one for an adapter, and why it is not, or is not known to be."""
    path, revision = model.path, adapter.config.get("revision")
    unknown = f"not checked whether {path} is the base model of {adapter.path}, because"
    record = _record(path)
    merged = {entry["sha256"]: entry["name"] for entry in record.get("adapters", ())}
    if merged and _fingerprint(adapter) in merged:
        return True, f"the adapter {adapter.path} is in the weights of {path} already: `hira merge` wrote that model"
    named = adapter.config.get("base_model_name_or_path")
    if not isinstance(named, str) or not named or "\0" in named:
        return False, f"{unknown} its configuration names none (base_model_name_or_path)"
    if os.path.realpath(os.path.expanduser(named)) == str(path):
        return False, ""
    if merged and (not _alike(named, str(path)) or _alike(named, record["base"])):
        return True, (
            f"`hira merge` wrote {path} from {record['base']} with {', '.join(merged.values())}, and the adapter "
            f"{adapter.path} was trained on {named}. Adapters of one model are merged together: hira merge BASE "
            "ADAPTER ADAPTER -o OUT"
        )
    # the repositories of the hub that the model is from, and that the name means
    here, wanted = hub_id(str(path)), None if os.path.isdir(named) else hub_id(named)
    if here and wanted and not _alike(here, wanted):
        return True, f"the adapter {adapter.path} was trained on {wanted}, and {path} is {here}, another model"
    same = _same_weights(model, named)
    if same is False:
        trained = f"the adapter {adapter.path} was trained on {named}"
        return True, f"{trained}, and the weights of {path} are others: it is another model"
    if not same and not _alike(named, str(path)) and _loaded_from(path) != named:
        return False, f"{unknown} its configuration names {named!r}, and nothing here says that this model is that one"
    if here and wanted and here.lower() != wanted.lower():
        return False, f"{unknown} it was trained on {wanted}, which is another repository than {here}"
    if _COMMIT.fullmatch(str(revision)) and _COMMIT.fullmatch(path.name) and revision != path.name:
        return False, f"the adapter {adapter.path} was trained on revision {revision} of {named}, this is {path.name}"
    return False, ""


def _loaded_from(path: Path) -> object:
    """What a model's configuration says that it was loaded from."""
    config = path / "config.json"
    return read_object(inside(path, config.name)).get("_name_or_path") if os.path.lexists(config) else None


def _alike(first: str, second: str) -> bool:
    """Whether two names, of the hub or paths, end alike, which they do for a model that was moved or downloaded."""
    ends = [(hub_id(name) or re.sub(r"[/\\]+$", "", name)).lower() for name in (first, second)]
    return re.split(r"[/\\]", ends[0])[-1] == re.split(r"[/\\]", ends[1])[-1]


def _same_weights(model: ModelFolder, named: str) -> bool | None:
    """Whether samples of the tensors that two folders share are the same; None if they share none."""
    if not os.path.isdir(named):
        return None
    try:
        other = read_folder(named)
    except HiraError:  # not a model, or not one in safetensors
        return None
    same = None
    for name, (header, entry) in model.tensors.items():
        theirs, counterpart = other.tensors.get(name, (None, None))
        if theirs is None or counterpart is None or (entry.code, entry.shape) != (counterpart.code, counterpart.shape):
            continue
        if not torch.equal(read_bytes(header, name, 0, _SAMPLE), read_bytes(theirs, name, 0, _SAMPLE)):
            return False
        same = True
    return same


def _record(path: Path) -> dict[str, Any]:
    """What the manifest of a model says of a merge; empty if there is none, or no manifest."""
    if not os.path.lexists(path / MANIFEST):
        return {}
    record = read_object(inside(path, MANIFEST)).get(MERGED, {})
    adapters = record.get("adapters") if isinstance(record, dict) else None
    if record == {}:
        return {}
    if (
        not isinstance(adapters, list)
        or not isinstance(record.get("base"), str)
        or not all(isinstance(entry, dict) for entry in adapters)
        or not all(isinstance(entry.get(key), str) for entry in adapters for key in ("name", "sha256"))
    ):
        raise HiraError(f"{path / MANIFEST} must have a base and adapters under {MERGED!r}; it was damaged.")
    return dict(record)


def _fingerprint(adapter: Adapter) -> str:
    """A SHA-256 of an adapter's factors, which does not depend on the file that holds them."""
    digest = hashlib.sha256()
    for module, factors in sorted(adapter.modules.items()):
        for pair in (factors, *([factors.lora] if factors.lora is not None else [])):
            for factor in pair.pair():
                digest.update(json.dumps([module, str(factor.dtype), *factor.shape]).encode())
                digest.update(tensor_bytes(factor))
    return digest.hexdigest()
