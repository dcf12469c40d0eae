"""The tensors of a model that adapters change, and what their bytes are made of."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hira.errors import HiraError
from hira.files.io.adapter_folder import FLOATS, TensorFile
from hira.files.io.safetensors_file import Header, TensorEntry, entry_of
from hira.files.merge.contents import Content, Converted, Copied, Modulated, Piece
from hira.files.model.parameters import IN_MEMORY, Parameters, matrices_of
from hira.files.model.quantisation import REAL
from hira.files.model.targets import Changes, Replaced, Target
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


class Planned(NamedTuple):
    """A tensor that is to be written: its entry, and its bytes."""

    entry: TensorEntry
    content: Content


class Changed:
    """The tensors that change, by their names in the files.

    Args:
        parameters: the base model's parameters.
        changes: what the adapters do to them.
        options: how the model is to be written.

    Raises:
        HiraError: as `merge_plan.plan_of` says.
    """

    def __init__(self, parameters: Parameters, changes: Changes, options: Options) -> None:
        self._parameters, self._changes, self._options = parameters, changes, options
        self.changed: dict[str, Planned] = {}
        self.added: dict[str, Planned] = {}
        self.merged: list[str] = []
        self.replaced: list[str] = []
        self.notes: list[str] = []
        # few, because they are all that stays in memory from tensor to tensor
        self._factors = lru_cache(2)(lambda name: changes.targets[name].factors())
        self._check_ties()
        for target in changes.targets.values():
            self._modulate(target)
        for name, new in changes.replaced.items():
            if name not in changes.targets:
                self._replace(name, new)
        self._keep_shared_weights()

    def _modulate(self, target: Target) -> None:
        """Put W' in the place of a parameter."""
        parameters, name = self._parameters, target.name
        stored = parameters.dtype(name)
        dtype = self._options.dtype or stored
        dither = self._dither(name, stored, dtype)
        new = self._changes.replaced.get(name)
        if new is not None:
            self._check_shape(name, new)
        shape = parameters.shape(name) if new is None else new.shape
        stacked = target.experts is not None
        matrices = parameters.matrices(name, stacked) if new is None else [new.matrix()]
        pieces = [Piece(matrix, slice(None), partial(self._pair, name, e)) for e, matrix in enumerate(matrices)]

        def planned(tensor: str, shape: tuple[int, ...], pieces: list[Piece]) -> Planned:
            content = Modulated(
                f"{name} of {parameters.folder.path}", tuple(pieces), target.transposed, stored, dtype, dither
            )
            return Planned(entry_of(tensor, dtype, shape), content)

        location = parameters.location(name)
        if name not in parameters.locations:  # it shares a weight that is in the files under another name
            tensor = self._name_of_new(name)
            self.added[tensor] = planned(tensor, shape, pieces)
            self.merged.append(tensor)
        elif not location.stacked:
            ((tensor,),) = location.tensors
            self.changed[tensor] = planned(tensor, shape, pieces)
            self.merged.append(tensor)
        else:
            for parts, piece in zip(location.tensors, pieces, strict=True):
                first = 0
                for tensor, rows in zip(parts, piece.matrix.parts, strict=True):
                    part = piece._replace(rows=slice(first, first + rows.count))
                    self.changed[tensor] = planned(tensor, (rows.count, rows.columns), [part])
                    self.merged.append(tensor)
                    first += rows.count

    def _replace(self, name: str, new: Replaced) -> None:
        """Put a parameter that an adapter brings in the place of the base model's, or beside it."""
        parameters = self._parameters
        if name not in parameters.locations:
            tensor, dtype = self._name_of_new(name), new.dtype
            if parameters.holder(name) is None:
                self._check_new(name, new)
                self.notes.append(f"{tensor} is new: load the merged model by a class that has it, with its sizes")
            else:
                self._check_shape(name, new)
                dtype = parameters.dtype(name)
            self.added[tensor] = self._brought(tensor, new, dtype)
            return
        location = parameters.location(name)
        if location.stacked or len(location.tensors[0]) > 1:
            raise HiraError(
                f"The adapter {new.adapter.path} brings {name} whole, which the files of {parameters.folder.path} have "
                f"in parts. {IN_MEMORY}"
            )
        ((tensor,),) = location.tensors
        self._check_shape(name, new)
        self.changed[tensor] = self._brought(tensor, new, parameters.dtype(name))
        self.replaced.append(tensor)

    def _keep_shared_weights(self) -> None:
        """Write W0 under the names of parameters that shared a weight with one that changed, and do not change."""
        parameters = self._parameters
        changing = {*self._changes.targets, *self._changes.replaced}
        for name in sorted(changing & parameters.locations.keys()):
            names = parameters.tied(name)
            others = [other for other in names if other not in changing]
            if not others or any(other in parameters.locations for other in others):
                continue
            for other in others[:1] if names[0] in others else others:
                tensor = self._name_of_new(other)
                new = self._changes.replaced.get(name) if name in self._changes.targets else None
                ((old,),) = parameters.location(name).tensors
                self.added[tensor] = (
                    self.unchanged(tensor, *parameters.folder.tensors[old])
                    if new is None
                    else self._brought(tensor, new, parameters.dtype(name))
                )

    def unchanged(self, name: str, header: Header, entry: TensorEntry) -> Planned:
        """A tensor of the base model's, under a name, in the dtype that is asked for."""
        dtype = self._options.dtype
        if dtype is None or entry.code not in REAL or entry.dtype == dtype:
            return Planned(replace(entry, name=name), Copied(header, entry.name))
        (matrix,) = matrices_of(header, entry)
        return Planned(
            entry_of(name, dtype, entry.shape), Converted(f"tensor {entry.name!r} of {header.path}", matrix, dtype)
        )

    def _brought(self, tensor: str, new: Replaced, dtype: torch.dtype) -> Planned:
        dtype = (self._options.dtype or dtype) if new.dtype in FLOATS else new.dtype
        tensors = new.adapter.tensors
        if new.dtype == dtype and isinstance(tensors, TensorFile):
            return Planned(entry_of(tensor, dtype, new.shape), Copied(tensors.header, new.key))
        name = f"tensor {new.key!r} of {new.adapter.path}"
        return Planned(entry_of(tensor, dtype, new.shape), Converted(name, new.matrix(), dtype))

    def _pair(self, name: str, e: int) -> tuple[Tensor, Tensor]:
        return self._factors(name)[e]

    def _dither(self, name: str, stored: torch.dtype, dtype: torch.dtype) -> bool | None:
        rounding = self._options.rounding
        if rounding == "dither" and (stored == torch.float64 or dtype not in HALF):
            raise HiraError(
                f"{name} cannot be rounded with a dither from {stored} to {dtype}: it is for bfloat16 and float16, "
                "from at most float32. Leave out the rounding, or pass a dtype."
            )
        return None if rounding is None else rounding == "dither"

    def _check_ties(self) -> None:
        """Refuse to change embeddings, or the head, that may be tied in a way that nothing here tells."""
        parameters, config = self._parameters, self._parameters.config
        if parameters.is_known or not config.get("tie_word_embeddings", bool(config)):  # true is transformers' default
            return
        vocabularies = [part.get("vocab_size") for part in (config, *config.values()) if isinstance(part, dict)]
        shapes = {name: parameters.shape(name) for name in self._changes.targets}
        shapes |= {name: new.shape for name, new in self._changes.replaced.items()}
        names = [name for name, shape in shapes.items() if len(shape) == 2 and shape[0] in vocabularies]
        names += [name for name, target in self._changes.targets.items() if target.uses[0].factors.kind == "embedding"]
        if names:
            raise HiraError(
                f"{names[0]} may share its weight with another (tie_word_embeddings), but {parameters.folder.path} is "
                f"of an architecture that this transformers does not have. {IN_MEMORY}"
            )

    def _check_shape(self, name: str, new: Replaced) -> None:
        """Refuse a parameter of another shape than the base model's, but for a vocabulary that was resized."""
        parameters, shape = self._parameters, self._parameters.shape(name)
        if new.shape == shape:
            return
        tables = [table for table in parameters.embeddings() if parameters.holder(table) is not None]
        rows = {found.shape[0] for table in tables if (found := self._changes.replaced.get(table)) is not None}
        if name not in tables or new.shape[1:] != shape[1:] or len(rows) != 1:
            raise HiraError(
                f"The adapter {new.adapter.path} brings {name} as {new.shape}, which is {shape} in "
                f"{parameters.folder.path}: it is of another model, or of this one with other sizes."
            )
        # W0 of a target is also that of the tables that share it
        brought = {name for name in self._changes.targets if name in self._changes.replaced}
        shared = {other for name in brought & parameters.locations.keys() for other in parameters.tied(name)}
        if any(table not in self._changes.replaced and table not in shared for table in tables):
            raise HiraError(
                f"The adapter {new.adapter.path} has a vocabulary of {new.shape[0]} instead of {shape[0]}, "
                f"but brings only some of {', '.join(tables)}; the others are in the trained model alone. {IN_MEMORY}"
            )
        self.notes.append(f"{name} has {new.shape[0]} rows, not {shape[0]}: use the tokenizer of the adapter")

    def _check_new(self, name: str, new: Replaced) -> None:
        """Refuse a parameter that only another model can have, not this one with another head."""
        parameters = self._parameters
        own = {other.partition(".")[0] for other in parameters.locations}
        if parameters.is_known and name.partition(".")[0] in own:
            raise HiraError(
                f"The adapter {new.adapter.path} brings {name}, which {parameters.folder.path} does not have: it is of "
                f"another model. If it is not: {IN_MEMORY}"
            )

    def _name_of_new(self, name: str) -> str:
        """The name in the files of a parameter that they lack, once it is sure to be found there."""
        if self._parameters.name_of(name) != name:
            raise HiraError(
                f"{name} has to be written, but the files of {self._parameters.folder.path} name their tensors "
                f"otherwise than the model does. {IN_MEMORY}"
            )
        return name
