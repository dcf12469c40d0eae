"""The plan of a merged model: the tensors of each file, the parts that make their bytes, and its configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Any, Literal, NamedTuple

import torch

from hira.errors import HiraError
from hira.files.io.adapter_folder import FLOATS, TensorFile
from hira.files.io.model_card import dtype_name
from hira.files.io.recognise import SINGLE
from hira.files.io.safetensors_file import Header, TensorEntry, entry_of, header_bytes, safetensors_order
from hira.files.merge.tensors import Part, PlannedTensor, converted, copied, copied_parts, merged_parts
from hira.files.model.parameters import IN_MEMORY, Parameters, matrices_of
from hira.files.model.quantisation import REAL
from hira.files.model.targets import Changes, SavedParameter, Target
from hira.ops.heuristics import HALF

Rounding = Literal["nearest", "dither"]


class Options(NamedTuple):
    """How a merged model is to be written.

    Args:
        dtype: that of all floating-point tensors; None to leave each as it is.
        rounding: how W' is rounded to a half precision; None to do as the layers do.
        max_shard_size: the most bytes of tensors in a file; None to keep the base model's shards.
    """

    dtype: torch.dtype | None = None
    rounding: Rounding | None = None
    max_shard_size: int | None = None


@dataclass(frozen=True)
class Shard:
    """A file that is to be written: tensors in the order of their bytes; `source` is the file that it is a copy of."""

    name: str
    tensors: tuple[PlannedTensor, ...]
    metadata: dict[str, str]
    source: Header | None = None

    @property
    def nbytes(self) -> int:
        """The bytes of its tensors."""
        return sum(tensor.entry.nbytes for tensor in self.tensors)

    @property
    def size(self) -> int:
        """The bytes of the file."""
        return self.source.size if self.source is not None else len(self.header()) + self.nbytes

    def header(self) -> bytes:
        """Return the bytes before the tensors."""
        return header_bytes((tensor.entry for tensor in self.tensors), self.metadata or None)

    def parts(self) -> Iterator[Part]:
        """Yield the parts that make its bytes."""
        if self.source is not None:
            yield from copied_parts(self.source, 0, self.source.size)
        else:
            header = self.header()
            yield Part(len(header), lambda: memoryview(header))
            for tensor in self.tensors:
                yield from tensor.parts()


class Plan:
    """The plan of a merged model, made from the headers of files; no tensor is read.

    Attributes:
        shards: its files of weights.
        index: the content of the index of the shards; None for a single file.
        config: the content of `config.json`, where it differs from the base model's; else None.
        changed: the tensors that differ from the base model's, by their names in its files.
        merged: the names in the files of the tensors with W'.
        replaced: those that an adapter saves whole.
        added: the tensors that the base model's files lack, by name.
        notes: what a user should know.

    Raises:
        HiraError: the model is quantised and a dtype asked for, a weight cannot be rounded as asked for, a parameter
            that an adapter saves is of another shape, or what has to be added to the files would not be found in them.
    """

    def __init__(self, parameters: Parameters, changes: Changes, options: Options) -> None:
        self._parameters, self._changes, self._options = parameters, changes, options
        self.changed: dict[str, PlannedTensor] = {}
        self.added: dict[str, PlannedTensor] = {}
        self.merged: list[str] = []
        self.replaced: list[str] = []
        self.notes: list[str] = []
        # few, because they are all that stays in memory from tensor to tensor
        self._pairs = lru_cache(2)(lambda name: changes.targets[name].pairs())
        if options.dtype is not None and parameters.config.get("quantization_config"):
            raise HiraError(
                f"Weights of {parameters.folder.path} are quantised (quantization_config), and the numbers that belong "
                "to them must keep their dtypes; leave out the dtype."
            )
        self._check_ties()
        for target in changes.targets.values():
            self._modulate(target)
        for name, saved in changes.saved.items():
            if name not in changes.targets:
                self._replace(name, saved)
        self._keep_shared_weights()
        self.shards = self._shards()
        self.index = _index(parameters, self.shards)
        self.config = _config(parameters, changes, options)
        self.nbytes = sum(shard.nbytes for shard in self.shards)

    def _shards(self) -> list[Shard]:
        """The files to write: the base model's, or new ones of a size, with what is added at the end of the last."""
        prefix, shards = self.prefix, []
        for name, header in self._parameters.folder.shards.items():
            tensors = [self.changed.get(e.name) or self._unchanged(e.name, header, e) for e in header.entries.values()]
            same = not self.changed.keys() & header.entries.keys() and all(tensor.copied for tensor in tensors)
            source = header if same and not prefix else None
            tensors = [
                tensor._replace(entry=replace(tensor.entry, name=prefix + tensor.entry.name)) for tensor in tensors
            ]
            shards.append(Shard(name, tuple(tensors), header.metadata, source))
        if self.added:
            last = shards[-1]
            shards[-1] = Shard(last.name, (*last.tensors, *self.added.values()), last.metadata)
        limit = self._options.max_shard_size
        if limit is not None:
            shards = _of_size([tensor for shard in shards for tensor in shard.tensors], shards[0], limit)
        return [shard if shard.source is not None else _in_order(shard) for shard in shards]

    @property
    def prefix(self) -> str:
        """What stands before the names in the files; not empty where a head is added to a model without one."""
        return self._changes.prefix if self.added else ""

    def _modulate(self, target: Target) -> None:
        """Put W' in the place of a parameter, in one tensor or in several, as those of experts are."""
        parameters, name = self._parameters, target.name
        stored = parameters.dtype(name)
        dtype = self._options.dtype or stored
        dither = self._dither(name, stored, dtype)
        saved = self._changes.saved.get(name)
        if saved is not None:
            self._check_shape(name, saved)
        matrices = parameters.matrices(name, target.experts is not None) if saved is None else [saved.matrix()]

        def plan(tensor: str, shape: tuple[int, ...], sources: list[tuple[int, slice]]) -> PlannedTensor:
            """W' of some rows of some of the matrices, one after another."""

            def parts() -> Iterator[Part]:
                for i, rows in sources:
                    yield from merged_parts(
                        matrices[i],
                        rows,
                        lambda i=i: self._pairs(name)[i],  # type: ignore[misc]
                        transposed=target.transposed,
                        stored=stored,
                        dtype=dtype,
                        dither=dither,
                        what=f"{name} of {parameters.folder.path}",
                    )

            self.merged.append(tensor)
            return PlannedTensor(entry_of(tensor, dtype, shape), parts)

        location = parameters.location(name)
        if location.stacked:
            for i, tensors in enumerate(location.tensors):
                first = 0
                for tensor in tensors:
                    shape = parameters.folder.tensors[tensor][1].shape
                    self.changed[tensor] = plan(tensor, shape, [(i, slice(first, first + shape[0]))])
                    first += shape[0]
            return
        shape = parameters.shape(name) if saved is None else saved.shape
        everything = [(i, slice(None)) for i in range(len(matrices))]
        if name in parameters.locations:
            ((tensor,),) = location.tensors
            self.changed[tensor] = plan(tensor, shape, everything)
        else:  # it shares a weight that the files have under another name
            tensor = self._name_of_new(name)
            self.added[tensor] = plan(tensor, shape, everything)

    def _replace(self, name: str, saved: SavedParameter) -> None:
        """Put a parameter that an adapter saves in the place of the base model's, or beside it."""
        parameters = self._parameters
        if name not in parameters.locations:
            tensor, dtype = self._name_of_new(name), saved.dtype
            if parameters.holder(name) is None:
                self._check_new(name, saved)
                self.notes.append(f"{tensor} is new: load the merged model by a class that has it, with its sizes")
            else:
                self._check_shape(name, saved)
                dtype = parameters.dtype(name)
            self.added[tensor] = self._of_adapter(tensor, saved, dtype)
            return
        location = parameters.location(name)
        if location.stacked or len(location.tensors[0]) > 1:
            raise HiraError(
                f"The adapter {saved.adapter.path} saves {name} whole, which {parameters.folder.path} has in parts. "
                + IN_MEMORY
            )
        ((tensor,),) = location.tensors
        self._check_shape(name, saved)
        self.changed[tensor] = self._of_adapter(tensor, saved, parameters.dtype(name))
        self.replaced.append(tensor)

    def _keep_shared_weights(self) -> None:
        """Write W0 under the names of parameters that shared a weight with one that changed, and do not change."""
        parameters = self._parameters
        changing = {*self._changes.targets, *self._changes.saved}
        for name in sorted(changing & parameters.locations.keys()):
            names = parameters.tied(name)
            others = [other for other in names if other not in changing]
            if not others or any(other in parameters.locations for other in others):
                continue
            for other in others[:1] if names[0] in others else others:
                tensor = self._name_of_new(other)
                saved = self._changes.saved.get(name) if name in self._changes.targets else None
                ((old,),) = parameters.location(name).tensors
                self.added[tensor] = (
                    self._unchanged(tensor, *parameters.folder.tensors[old])
                    if saved is None
                    else self._of_adapter(tensor, saved, parameters.dtype(name))
                )

    def _unchanged(self, name: str, header: Header, entry: TensorEntry) -> PlannedTensor:
        """A tensor of the base model's, under a name, in the dtype that is asked for."""
        dtype = self._options.dtype
        if dtype is None or entry.code not in REAL or entry.dtype == dtype:
            return copied(name, header, entry)
        (matrix,) = matrices_of(header, entry)
        return converted(name, entry.shape, matrix, dtype, f"tensor {entry.name!r} of {header.path}")

    def _of_adapter(self, tensor: str, saved: SavedParameter, dtype: torch.dtype) -> PlannedTensor:
        dtype = (self._options.dtype or dtype) if saved.dtype in FLOATS else saved.dtype
        tensors = saved.adapter.tensors
        if saved.dtype == dtype and isinstance(tensors, TensorFile):
            return copied(tensor, tensors.header, tensors.header.entry(saved.key))
        return converted(tensor, saved.shape, saved.matrix(), dtype, f"tensor {saved.key!r} of {saved.adapter.path}")

    def _dither(self, name: str, stored: torch.dtype, dtype: torch.dtype) -> bool | None:
        rounding = self._options.rounding
        if rounding == "dither" and (stored == torch.float64 or dtype not in HALF):
            raise HiraError(
                f"{name} cannot be rounded with a dither from {stored} to {dtype}: it is for bfloat16 and float16, "
                "from at most float32. Leave out the rounding, or pass a dtype."
            )
        return None if rounding is None else rounding == "dither"

    def _check_ties(self) -> None:
        """Refuse to change embeddings, or the head, that may be tied, if the architecture is unknown."""
        parameters, config = self._parameters, self._parameters.config
        if parameters.is_known or not config.get("tie_word_embeddings", bool(config)):  # true is transformers' default
            return
        vocabularies = [part.get("vocab_size") for part in (config, *config.values()) if isinstance(part, dict)]
        shapes = {name: parameters.shape(name) for name in self._changes.targets}
        shapes |= {name: saved.shape for name, saved in self._changes.saved.items()}
        names = [name for name, shape in shapes.items() if len(shape) == 2 and shape[0] in vocabularies]
        names += [name for name, target in self._changes.targets.items() if target.factors[0][0].kind == "embedding"]
        if names:
            raise HiraError(
                f"{names[0]} may share its weight with another (tie_word_embeddings), but {parameters.folder.path} is "
                f"of an architecture that this transformers does not have. {IN_MEMORY}"
            )

    def _check_shape(self, name: str, saved: SavedParameter) -> None:
        """Refuse a parameter of another shape than the base model's, but for a vocabulary that was resized."""
        parameters, shape = self._parameters, self._parameters.shape(name)
        if saved.shape == shape:
            return
        tables = [table for table in parameters.embeddings() if parameters.holder(table) is not None]
        rows = {found.shape[0] for table in tables if (found := self._changes.saved.get(table)) is not None}
        if name not in tables or saved.shape[1:] != shape[1:] or len(rows) != 1:
            raise HiraError(
                f"The adapter {saved.adapter.path} has {name} as {saved.shape}, which is {shape} in "
                f"{parameters.folder.path}: it is of another model, or of this one with other sizes."
            )
        # W0 of a target is also that of the tables that share it
        both = {name for name in self._changes.targets if name in self._changes.saved}
        shared = {other for name in both & parameters.locations.keys() for other in parameters.tied(name)}
        if any(table not in self._changes.saved and table not in shared for table in tables):
            raise HiraError(
                f"The adapter {saved.adapter.path} has a vocabulary of {saved.shape[0]} instead of {shape[0]}, "
                f"but saves only some of {', '.join(tables)}; the others are in the trained model alone. {IN_MEMORY}"
            )
        self.notes.append(f"{name} has {saved.shape[0]} rows, not {shape[0]}: use the tokenizer of the adapter")

    def _check_new(self, name: str, saved: SavedParameter) -> None:
        """Refuse a parameter that only another model can have, not this one with another head."""
        parameters = self._parameters
        own = {other.partition(".")[0] for other in parameters.locations}
        if parameters.is_known and name.partition(".")[0] in own:
            raise HiraError(
                f"The adapter {saved.adapter.path} has {name}, which {parameters.folder.path} does not have: it is of "
                f"another model. If it is not: {IN_MEMORY}"
            )

    def _name_of_new(self, name: str) -> str:
        """The name in the files for a parameter that they lack; a HiraError if a model would not find it there."""
        if self._parameters.name_of(name) != name:
            raise HiraError(
                f"{name} has to be written, but the files of {self._parameters.folder.path} name their tensors "
                f"otherwise than the model does. {IN_MEMORY}"
            )
        return name


def _in_order(shard: Shard) -> Shard:
    return replace(shard, tensors=tuple(sorted(shard.tensors, key=lambda tensor: safetensors_order(tensor.entry))))


def _of_size(tensors: list[PlannedTensor], first: Shard, limit: int) -> list[Shard]:
    """Files of at most so many bytes, or of a single tensor."""
    groups: list[list[PlannedTensor]] = [[]]
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


def _index(parameters: Parameters, shards: list[Shard]) -> dict[str, Any] | None:
    """The index of the shards, with the metadata of the base model's."""
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
    changing = {*changes.targets, *changes.saved}
    if changing.intersection(tables) and len({parameters.tied(table) for table in tables}) < len(tables):
        config["tie_word_embeddings"] = False
        _set(config, "tie_word_embeddings", {True: False})
    resized = [table for table in tables if table in changes.saved and parameters.holder(table) is not None]
    rows = {changes.saved[table].shape[0]: parameters.shape(table)[0] for table in resized}
    _set(config, "vocab_size", {old: new for new, old in rows.items()})
    if options.dtype is not None and config:
        name = dtype_name(options.dtype)
        if not {"dtype", "torch_dtype"} & config.keys():
            config["dtype"] = name
        for key in ("dtype", "torch_dtype"):
            _set(config, key, dict.fromkeys(("float64", "float32", "bfloat16", "float16"), name))
    return None if config == parameters.config else config


def _set(config: dict[str, Any], key: str, values: Mapping[Any, Any]) -> None:
    """Replace values of a key, in the configurations of parts of a model too."""
    if isinstance(config.get(key), str | int) and config[key] in values:
        config[key] = values[config[key]]
    for part in config.values():
        if isinstance(part, dict):
            _set(part, key, values)
