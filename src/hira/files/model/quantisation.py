"""Weights that a model's files hold quantised, told by dtypes and names: there is no W0 in them to multiply."""

from __future__ import annotations

from collections.abc import Iterable

from hira.errors import HiraError
from hira.files.io.safetensors_file import DTYPES
from hira.files.model.parameters import Parameters

REAL = frozenset({"F64", "F32", "F16", "BF16"})
# the tensors that replace `weight` in the files of GPTQ and AWQ, HQQ, compressed-tensors, AQLM and torchao
_PACKED = ("qweight", "W_q", "weight_packed", "codes", "_weight_qdata")


def check_real(parameters: Parameters, module: str, names: Iterable[str]) -> None:
    """Refuse a module whose weight is quantised.

    Args:
        parameters: those of the base model.
        module: the module's name, for messages.
        names: the parameters that the module's factors may be on; some may be missing, as those of packed weights are.

    Raises:
        HiraError: a parameter is of integers, of float8 or of less than a byte, or it is missing and the files have
            the tensors of a method of quantisation for it.
    """
    for name in names:
        if parameters.locations.get(str(parameters.holder(name))) is not None:
            codes = [entry.code for entries in parameters.entries(name) for entry in entries if entry.code not in REAL]
            found = [f"{name} of {DTYPES.get(code, code)}" for code in codes]
        else:
            stem = name.rpartition(".")[0]
            packed = (*(f"{stem}.{end}" for end in _PACKED), f"{name}_blocks")  # the last as of MXFP4
            found = [other for other in packed if other in parameters.folder.tensors]
        if found:
            raise HiraError(
                f"The base model {parameters.folder.path} does not have the weight of module {module!r} as real "
                f"numbers, but {found[0]}: it is quantised, and there is no W0 to multiply. Pass the model as it was "
                "before it was quantised."
            )
