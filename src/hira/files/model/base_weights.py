"""The base weights of an adapter's modules, found in a model's folder as `hira merge` finds them."""

from __future__ import annotations

import os

from torch import Tensor

from hira.errors import HiraError
from hira.files.io.adapter_folder import Adapter
from hira.files.io.model_folder import read_folder
from hira.files.model.parameters import Parameters
from hira.files.model.provenance import check_base
from hira.files.model.targets import changes_of


class BaseWeights:
    """The base weight of each module of an adapter, read where it is asked for.

    Args:
        base: the folder of a model, with `model.safetensors` or its index.
        adapter: the adapter.
        any_base: take the model although the adapter was trained on another.

    Raises:
        HiraError: the folder is not one of a model, or of another than the adapter was trained on, lacks the weight of
            a module or has it in another shape, or the weight is quantised.
    """

    def __init__(self, base: str | os.PathLike[str], adapter: Adapter, any_base: bool = False) -> None:
        model = read_folder(base)
        self.notes = check_base(model, adapter, any_base)
        self._parameters, self._adapter = Parameters(model), adapter
        self._changes = changes_of(self._parameters, [adapter], [1.0], merging=False)
        self._targets = {
            keys: target
            for target in self._changes.targets.values()
            for factors, _ in target.factors
            for keys in factors.all_keys
        }

    def name(self, module: str) -> str:
        """The name of a module's weight in the model."""
        return self._targets[self._adapter.modules[module].keys].name

    def __call__(self, module: str) -> Tensor:
        """Return a module's weight as it is stored; a square one as the adapter's `fan_in_fan_out` says."""
        factors = self._adapter.modules[module]
        target = self._targets[factors.keys]
        if target.experts is not None:
            raise HiraError(
                f"The weight of module {module!r}, {target.name}, is a stack of {target.experts} matrices; such "
                "adapters are only merged, with `hira merge`."
            )
        saved = self._changes.saved.get(target.name)  # a resized embedding is in its adapter's file
        matrix = self._parameters.matrices(target.name, stacked=False)[0] if saved is None else saved.matrix()
        shape = self._parameters.shape(target.name) if saved is None else saved.shape
        W0 = matrix.read(slice(None)).reshape(shape)
        # which side of a square matrix is its inputs is known from the architecture; see `layer_matrices`
        assumed = bool(self._adapter.config.get("fan_in_fan_out"))
        is_square = factors.kind == "matrix" and W0.shape == W0.shape[::-1]
        return W0.t() if is_square and target.transposed != assumed else W0
