"""The base weights of an adapter's modules, found by name in a model's folder, without building the model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from torch import Tensor

from hira.checkpoint.folder import ModelFolder, read_folder
from hira.checkpoint.header import read_tensor
from hira.errors import HiraError


def weights_of(base: str | os.PathLike[str], modules: Iterable[str]) -> Callable[[str], Tensor]:
    """Find the base weight of each module of an adapter.

    Args:
        base: a model's folder, with `model.safetensors` or its index.
        modules: the modules by their names in the adapter's keys; in attention these are of wrappers.

    Returns:
        What reads the weight of a module, as it is stored.

    Raises:
        HiraError: the folder is not one of a model, or has no tensor of a module's name, as where an architecture names
            its tensors otherwise in files than in modules.
    """
    folder = read_folder(base)
    names = {module: _name(folder, module) for module in modules}
    missing = [module for module, name in names.items() if name is None]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise HiraError(
            f"{folder.path} has no weights of {', '.join(missing[:5])}{more}. Either the adapter belongs to another "
            "model, or the files of this architecture name their tensors otherwise than its modules: load the model "
            "with Transformers, save it with save_original_format=False, and pass that folder."
        )

    def weight(module: str) -> Tensor:
        header, entry = folder.tensors[str(names[module])]
        return read_tensor(header, entry.name)

    return weight


def _name(folder: ModelFolder, module: str) -> str | None:
    plain = module.replace(".base_layer", "")
    return next((name for name in (f"{plain}.weight", f"{plain}.in_proj_weight") if name in folder.tensors), None)
