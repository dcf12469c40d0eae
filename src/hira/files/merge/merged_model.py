"""A merged model, planned and checked: what `hira merge` writes to a disk, and what an engine loads into its memory."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from hira.errors import HiraError
from hira.files.io.adapter_folder import Adapter, read_adapter
from hira.files.io.model_folder import ModelFolder, read_folder
from hira.files.io.safetensors_file import Header, TensorEntry
from hira.files.merge.plan import Options, Plan
from hira.files.merge.tensors import Workers
from hira.files.model.parameters import Parameters
from hira.files.model.provenance import check_base
from hira.files.model.targets import changes_of

PathLike = str | os.PathLike[str]


class MergedModel(NamedTuple):
    """A base model and adapters that fit it, and the plan of what they become.

    Args:
        folder: the base model's folder.
        adapters: the adapters, whose numbers are all finite.
        parameters: the base model's parameters.
        plan: what becomes of each of its tensors.
        notes: what a user should know.
    """

    folder: ModelFolder
    adapters: list[Adapter]
    parameters: Parameters
    plan: Plan
    notes: tuple[str, ...]

    @torch.no_grad()
    def tensors(self, base: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield the merged model's tensors with their names, one at a time in memory, as `hira merge` writes them.

        Args:
            base: tensors of the base model with their names in its files, all or some. Those that do not change are
                yielded as they are; the others are formed of them, and of what the files have beside them.

        Returns:
            The tensors in the order of the base model's, and behind them those that its files lack.

        Raises:
            HiraError: W' is not finite, a file was changed, or a tensor is not one of the base model's.
        """
        plan = self.plan
        with Workers() as workers:
            for name, tensor in base:
                if name not in self.folder.tensors:
                    raise HiraError(f"{name} is not among the tensors of {self.folder.path} that were checked.")
                planned = plan.changed.get(name)
                if planned is not None:
                    with _loaded(*self.folder.tensors[name], tensor):
                        tensor = workers.whole(planned)
                yield plan.prefix + name, tensor
            for name, planned in plan.added.items():
                yield name, workers.whole(planned)


@contextmanager
def _loaded(header: Header, entry: TensorEntry, tensor: Tensor) -> Iterator[None]:
    """Take a tensor for what a file has, unless it is elsewhere, or converted."""
    is_plain = type(tensor) is Tensor and tensor.device.type == "cpu"
    if is_plain and tensor.dtype == entry.dtype and tensor.shape == entry.shape:
        header.loaded[entry.name] = tensor.contiguous()
    try:
        yield
    finally:
        header.loaded.pop(entry.name, None)


def merged_model(
    base: PathLike,
    adapters: Sequence[PathLike],
    weights: Sequence[float],
    options: Options,
    *,
    any_base: bool = False,
    allow_pickle: bool = False,
) -> MergedModel:
    """Plan a merged model, and make all checks that need no W'; the arguments are those of `merge_checkpoint`.

    Raises:
        HiraError: as of `merge_checkpoint`, but for those of its output and of W' that is not finite.
    """
    folder, found = read_folder(base), [read_adapter(adapter, allow_pickle) for adapter in adapters]
    notes = [note for adapter in found for note in check_base(folder, adapter, any_base)]
    parameters = Parameters(folder)
    plan = Plan(parameters, changes_of(parameters, found, weights), options)
    for adapter in found:
        adapter.check_finite()
    return MergedModel(folder, found, parameters, plan, (*notes, *plan.notes))


def adapter_folders(adapters: PathLike | Sequence[PathLike]) -> list[PathLike]:
    """Return the folders of one adapter or several; a HiraError for none, or for anything else."""
    folders = [adapters] if isinstance(adapters, str | os.PathLike) else adapters
    if not isinstance(folders, Sequence) or not all(isinstance(folder, str | os.PathLike) for folder in folders):
        raise HiraError(f"adapters must be the folder of an adapter, or a list of such, not {adapters!r}.")
    if not folders:
        raise HiraError("there is no adapter to merge; pass the folder of at least one.")
    return list(folders)


def adapter_weights(adapters: Sequence[PathLike], weights: Sequence[float] | None) -> list[float]:
    """Return a weight for each adapter, 1 by default; a HiraError unless there is a finite number for each."""
    try:
        found = [1.0] * len(adapters) if weights is None else [float(weight) for weight in weights]
    except (TypeError, ValueError, OverflowError):  # no sequence, no numbers, or one that no float can hold
        found = []
    if isinstance(weights, str) or len(found) != len(adapters) or not all(math.isfinite(weight) for weight in found):
        raise HiraError(f"weights must be a finite number for each of the {len(adapters)} adapters, not {weights}.")
    return found
