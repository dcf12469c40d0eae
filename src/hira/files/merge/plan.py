"""What a merged model will consist of: the tensors of each shard, where their bytes come from, and its config."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from hira.errors import HiraError
from hira.files.io.model_card import dtype_name
from hira.files.io.recognise import SINGLE
from hira.files.io.safetensors_file import Header, in_safetensors_order
from hira.files.merge.changed import Changed, Options, Planned
from hira.files.merge.contents import Copied
from hira.files.model.parameters import Parameters
from hira.files.model.targets import Changes


@dataclass(frozen=True)
class Shard:
    """A file that is to be written.

    Args:
        name: its name.
        tensors: its tensors, in the order of their bytes.
        metadata: what its `__metadata__` says.
        source: the file that it is a copy of, if all of it is.
    """

    name: str
    tensors: tuple[Planned, ...]
    metadata: dict[str, str]
    source: Header | None = None

    @property
    def nbytes(self) -> int:
        """The bytes of its tensors."""
        return sum(tensor.entry.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class Plan:
    """A merged model before it is written.

    Args:
        shards: its files of weights.
        index: what the index of the shards says; None for a single file.
        config: what `config.json` says, where it differs from the base model's; else None.
        merged: the names in the files of the tensors with W'.
        replaced: those that an adapter brings whole.
        added: those that the base model's files lack.
        notes: what a user should know.
    """

    shards: tuple[Shard, ...]
    index: dict[str, Any] | None
    config: dict[str, Any] | None
    merged: tuple[str, ...]
    replaced: tuple[str, ...]
    added: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        return sum(shard.nbytes for shard in self.shards)


def plan_of(parameters: Parameters, changes: Changes, options: Options) -> Plan:
    """Plan a merged model.

    Args:
        parameters: those of the base model.
        changes: what the adapters do to them.
        options: how it is to be written.

    Returns:
        The plan; no tensor is read for it.

    Raises:
        HiraError: the model is quantised and a dtype asked for, a weight cannot be rounded as asked for, a parameter
            that an adapter brings is of another shape, or what has to be added to the files would not be found in them.
    """
    if options.dtype is not None and parameters.config.get("quantization_config"):
        raise HiraError(
            f"Weights of {parameters.folder.path} are quantised (quantization_config), and the numbers that belong to "
            "them must keep their dtypes; leave out the dtype."
        )
    found = Changed(parameters, changes, options)
    shards = _shards(parameters, changes, found, options)
    return Plan(
        shards,
        _index(parameters, shards),
        _config(parameters, changes, options),
        tuple(found.merged),
        tuple(found.replaced),
        tuple(found.added),
        tuple(found.notes),
    )


def _shards(parameters: Parameters, changes: Changes, found: Changed, options: Options) -> tuple[Shard, ...]:
    """The files to write: the base model's, or new ones of a size, with what is added at the end of the last."""
    folder = parameters.folder
    # the names of a model without its head, where the head is added
    prefix = changes.prefix if found.added else ""
    shards = []
    for name, header in folder.shards.items():
        entries = header.by_offset()
        tensors = [found.changed.get(e.name) or found.unchanged(e.name, header, e) for e in entries]
        same = all(isinstance(tensor.content, Copied) for tensor in tensors) and not prefix
        shards.append(Shard(name, tuple(_prefixed(tensors, prefix)), header.metadata, header if same else None))
    if found.added:
        last = shards[-1]
        shards[-1] = Shard(last.name, (*last.tensors, *found.added.values()), last.metadata)
    if options.max_shard_size is not None:
        shards = _of_size([tensor for shard in shards for tensor in shard.tensors], shards[0], options.max_shard_size)
    return tuple(shard if shard.source is not None else replace(shard, tensors=_ordered(shard)) for shard in shards)


def _prefixed(tensors: list[Planned], prefix: str) -> list[Planned]:
    return [tensor._replace(entry=replace(tensor.entry, name=prefix + tensor.entry.name)) for tensor in tensors]


def _ordered(shard: Shard) -> tuple[Planned, ...]:
    by_name = {tensor.entry.name: tensor for tensor in shard.tensors}
    return tuple(by_name[entry.name] for entry in in_safetensors_order(tensor.entry for tensor in shard.tensors))


def _of_size(tensors: list[Planned], first: Shard, limit: int) -> list[Shard]:
    """Files of at most some bytes, where single tensors allow it, with the tensors in their order."""
    groups: list[list[Planned]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.entry.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.entry.nbytes
    if len(groups) == 1:
        return [Shard(SINGLE, tuple(tensors), first.metadata)]
    names = (f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1))
    return [Shard(name, tuple(group), first.metadata) for name, group in zip(names, groups, strict=True)]


def _index(parameters: Parameters, shards: tuple[Shard, ...]) -> dict[str, Any] | None:
    """The index of the shards, with what the base model's says of it as a whole."""
    if [shard.name for shard in shards] == [SINGLE]:
        return None
    before = [entry for header in parameters.folder.shards.values() for entry in header.entries.values()]
    after = [tensor.entry for shard in shards for tensor in shard.tensors]
    metadata = {**parameters.folder.metadata, "total_size": sum(entry.nbytes for entry in after)}
    if isinstance(metadata.get("total_parameters"), int):
        metadata["total_parameters"] += sum(prod(e.shape) for e in after) - sum(prod(e.shape) for e in before)
    weight_map = {tensor.entry.name: shard.name for shard in shards for tensor in shard.tensors}
    return {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}


def _config(parameters: Parameters, changes: Changes, options: Options) -> dict[str, Any] | None:
    """The configuration of the merged model, if it differs from the base model's."""
    config: dict[str, Any] = deepcopy(parameters.config)
    tables = parameters.embeddings()
    changing = {*changes.targets, *changes.replaced}
    if changing.intersection(tables) and len({parameters.tied(table) for table in tables}) < len(tables):
        config["tie_word_embeddings"] = False
        _set(config, "tie_word_embeddings", {True: False})
    resized = [table for table in tables if table in changes.replaced and parameters.holder(table) is not None]
    rows = {changes.replaced[table].shape[0]: parameters.shape(table)[0] for table in resized}
    _set(config, "vocab_size", {old: new for new, old in rows.items()})
    if options.dtype is not None and config:
        name = dtype_name(options.dtype)
        if not {"dtype", "torch_dtype"} & config.keys():
            config["dtype"] = name
        for key in ("dtype", "torch_dtype"):
            _set(config, key, dict.fromkeys(("float64", "float32", "bfloat16", "float16"), name))
    return None if config == parameters.config else config


def _set(config: dict[str, Any], key: str, values: Mapping[Any, Any]) -> None:
    """Exchange values of a key, in the configurations of parts of a model too."""
    if isinstance(config.get(key), str | int) and config[key] in values:
        config[key] = values[config[key]]
    for part in config.values():
        if isinstance(part, dict):
            _set(part, key, values)
