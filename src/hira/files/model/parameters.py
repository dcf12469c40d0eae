"""The parameters of a model as they lie in its folder, by their names in the model, read a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hira.errors import HiraError
from hira.files.io.model_folder import ModelFolder
from hira.files.io.safetensors_file import Header, TensorEntry, read_tensor
from hira.files.io.strict_json import read_object

if TYPE_CHECKING:
    from hira.files.model.architecture import Architecture

CONFIG = "config.json"
IN_MEMORY = (
    "Merge in memory instead: load the model with transformers and the adapter with PEFT, and save what "
    "merge_and_unload() returns. Or save the base model with save_pretrained(..., save_original_format=False), which "
    "names tensors as the model does, and pass that folder."
)


# Models whose files name and store the parameters as the modules do, with their model_type: transformers, whose import
# takes seconds, is needed only if their embeddings change. A test compares.
AS_IN_MODEL = {
    "CohereForCausalLM": "cohere",
    "Cohere2ForCausalLM": "cohere2",
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3_text",
    "GlmForCausalLM": "glm",
    "Glm4ForCausalLM": "glm4",
    "GraniteForCausalLM": "granite",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Olmo2ForCausalLM": "olmo2",
    "Olmo3ForCausalLM": "olmo3",
    "Phi3ForCausalLM": "phi3",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "SmolLM3ForCausalLM": "smollm3",
    "Starcoder2ForCausalLM": "starcoder2",
}
THEIR_EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


class Location(NamedTuple):
    """Where a parameter lies in files.

    Args:
        tensors: for each of the matrices that it stacks, the tensors whose rows follow one another in it; of a
            parameter that lies in one tensor, that one.
        stacked: whether the tensors are parts of a parameter that has one dimension more.
    """

    tensors: tuple[tuple[str, ...], ...]
    stacked: bool = False


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix whose rows are read when they are needed: `read` returns the rows of a slice."""

    rows: int
    columns: int
    dtype: torch.dtype
    read: Callable[[slice], Tensor]

    def row_blocks(self, nbytes: int) -> Iterator[slice]:
        """Split the rows into blocks of at most so many bytes, or of a single row."""
        step = max(1, nbytes // max(self.columns * self.dtype.itemsize, 1))
        return (slice(start, min(start + step, self.rows)) for start in range(0, self.rows, step))


class Parameters:
    """A model's parameters by their names in it.

    Args:
        folder: the model's folder.

    Raises:
        HiraError: `config.json` is damaged, or does not describe its architecture.
    """

    def __init__(self, folder: ModelFolder) -> None:
        self.folder = folder
        self.config: dict[str, Any] = {}
        if CONFIG in folder.other_files:
            self.config = read_object(folder.file(CONFIG))
        names = self.config.get("architectures")
        name = names[0] if isinstance(names, list) and len(names) == 1 else None
        model_type = AS_IN_MODEL.get(name) if isinstance(name, str) and "auto_map" not in self.config else None
        self._as_in_model = (
            model_type is not None
            and self.config.get("model_type") == model_type
            and all(tensor.startswith(("model.", "lm_head.")) for tensor in folder.tensors)
        )
        if self._as_in_model or self._architecture is None:
            self.locations: dict[str, Location | None] = {name: Location(((name,),)) for name in folder.tensors}
        else:
            self.locations = self._architecture.locate(folder.tensors)
            self.locations |= dict.fromkeys(self._architecture.absent(self.locations))

    @cached_property
    def _architecture(self) -> Architecture | None:
        from hira.files.model.architecture import architecture_of

        return architecture_of(self.config, str(self.folder.path / CONFIG))

    @property
    def is_known(self) -> bool:
        """Whether the architecture is one of transformers."""
        return self._as_in_model or self._architecture is not None

    def holder(self, name: str) -> str | None:
        """The parameter in the files that holds a parameter's entries: itself, or one tied to it; None for neither."""
        if name in self.locations:
            return name
        return next((other for other in self.tied(name) if other in self.locations), None)

    def tied(self, name: str) -> tuple[str, ...]:
        """The parameters that share one weight with this one, it included; to the first, the others are tied."""
        if (self._as_in_model and name not in THEIR_EMBEDDINGS) or self._architecture is None:
            return (name,)
        return self._architecture.tied(name)

    def embeddings(self) -> tuple[str, ...]:
        """The weights of the input and the output embeddings, as far as the architecture is known."""
        if self._as_in_model:
            return THEIR_EMBEDDINGS
        return () if self._architecture is None else self._architecture.embeddings()

    def locate(self, tensors: Iterable[str]) -> dict[str, Location | None]:
        """Where parameters would lie if the files had these tensors, by name; None where in another order."""
        if self._as_in_model or self._architecture is None:
            return {tensor: Location(((tensor,),)) for tensor in tensors}
        return self._architecture.locate(tensors)

    def name_of(self, tensor: str) -> str:
        """The name in the model of a tensor that the files may have besides those that are there."""
        return next(iter(self.locate([tensor])))

    def is_transposed(self, name: str) -> bool | None:
        """Whether a parameter is stored as (in, out); None where the architecture is not known."""
        if self._as_in_model:
            return False
        return None if self._architecture is None else self._architecture.is_transposed(name)

    def location(self, name: str) -> Location:
        """Where a parameter lies; a HiraError if the files have it in an unknown layout."""
        location = self.locations[str(self.holder(name))]
        if location is None:
            raise HiraError(
                f"The files of {self.folder.path} store {name} in another layout than the model does, which is not "
                f"known here. {IN_MEMORY}"
            )
        return location

    def entries(self, name: str) -> list[list[TensorEntry]]:
        """The tensors of a parameter's matrices."""
        return [[self.folder.tensors[part][1] for part in parts] for parts in self.location(name).tensors]

    def shape(self, name: str) -> tuple[int, ...]:
        """A parameter's shape in the model."""
        entries = self.entries(name)
        if not self.location(name).stacked:
            return entries[0][0].shape
        rows, columns = sum(entry.shape[0] for entry in entries[0]), entries[0][0].shape[1:]
        same = {(sum(entry.shape[0] for entry in parts), parts[0].shape[1:]) for parts in entries}
        if len(same) != 1 or {entry.shape[1:] for parts in entries for entry in parts} != {columns}:
            raise HiraError(f"The tensors of {name} in {self.folder.path} differ in shape; download the files again.")
        return (len(entries), rows, *columns)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a parameter; a HiraError for those of less than a byte."""
        return self.entries(name)[0][0].dtype

    def matrices(self, name: str, stacked: bool) -> list[StoredMatrix]:
        """A parameter as the matrices that it stacks, or as one with all but the first dimension flattened."""
        if not self.location(name).stacked:
            ((tensor,),) = self.location(name).tensors
            return matrices_of(*self.folder.tensors[tensor], stacked)
        return [
            _joined([matrices_of(*self.folder.tensors[part])[0] for part in parts])
            for parts in self.location(name).tensors
        ]


def matrices_of(header: Header, entry: TensorEntry, stacked: bool = False) -> list[StoredMatrix]:
    """A tensor in a file as the matrices that it stacks, or as one with all but the first dimension flattened."""
    shape = entry.shape or (1,)
    count, rows = shape[:2] if stacked else (1, shape[0])
    columns = prod(shape[1 + stacked :])

    def read(first: int, chosen: slice) -> Tensor:
        start, stop, _ = chosen.indices(rows)
        return read_tensor(header, entry.name, slice(first + start, first + stop), (count * rows, columns))

    return [StoredMatrix(rows, columns, entry.dtype, partial(read, i * rows)) for i in range(count)]


def _joined(parts: list[StoredMatrix]) -> StoredMatrix:
    """The matrix whose rows are those of some matrices, one after another."""
    total = sum(part.rows for part in parts)

    def read(chosen: slice) -> Tensor:
        start, stop, _ = chosen.indices(total)
        found, first = [], 0
        for part in parts:
            begin, end = max(start - first, 0), min(stop - first, part.rows)
            if begin < end:
                found.append(part.read(slice(begin, end)))
            first += part.rows
        return found[0] if len(found) == 1 else torch.cat(found)

    return StoredMatrix(total, parts[0].columns, parts[0].dtype, read)
