"""Weights that a model's files hold quantised, told by dtypes and names: there is no W0 in them to multiply."""

from __future__ import annotations

from collections.abc import Iterable

from hira.errors import HiraError
from hira.files.io.safetensors_file import DTYPES
from hira.files.model.parameters import Parameters

REAL = frozenset({"F64", "F32", "F16", "BF16"})
# what stands in the place of `weight` in the files of GPTQ and AWQ, HQQ, compressed-tensors, AQLM and torchao
_PACKED = ("qweight", "W_q", "weight_packed", "codes", "_weight_qdata")


def check_real(parameters: Parameters, module: str, names: Iterable[str]) -> None:
    """Refuse a module whose weight is quantised.

    Args:
        parameters: those of the base model.
        module: the module's name, for messages.
        names: the parameters that the module's factors may be on; some may be missing, as those of packed weights are.

    Raises:
        HiraError: a parameter is of integers, of float8 or of less than a byte, or it is missing and the files have
            in its place what a method of quantisation writes.
    """
    for name in names:
        is_there = parameters.locations.get(str(parameters.holder(name))) is not None
        found = _narrow(parameters, name) if is_there else _packed(parameters, name)
        if found is not None:
            raise HiraError(
                f"The base model {parameters.folder.path} does not have the weight of module {module!r} as real "
                f"numbers, but {found}: it is quantised, and there is no W0 to multiply. Pass the model as it was "
                "before it was quantised."
            )


def _packed(parameters: Parameters, name: str) -> str | None:
    """The tensor that stands in the place of a parameter."""
    stem = name.rpartition(".")[0]
    others = (*(f"{stem}.{end}" for end in _PACKED), f"{name}_blocks")  # the last as of MXFP4
    return next((other for other in others if other in parameters.folder.tensors), None)


def _narrow(parameters: Parameters, name: str) -> str | None:
    """A parameter with its dtype, if that is not of real numbers."""
    codes = [entry.code for entries in parameters.entries(name) for entry in entries if entry.code not in REAL]
    return f"{name} of {DTYPES.get(codes[0], codes[0])}" if codes else None
