"""What the kernels share: how tiles are multiplied and rounded, and which arguments they take."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hira.errors import HiraError

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit  # type: ignore[untyped-decorator]
def round_to(exact, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Round float32 to nearest even."""
    if dtype == tl.bfloat16:
        # on the bits, because Triton's interpreter cuts bfloat16 off instead of rounding it
        bits = exact.to(tl.int32, bitcast=True)
        up = bits + 0x7FFF + ((bits >> 16) & 1)
        bits = tl.where(exact == exact, up, bits | 0x400000)  # NaN stays NaN
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return exact.to(dtype)


INTERPRETED = not isinstance(round_to, triton.runtime.JITFunction)


def operand(dtype: torch.dtype) -> Any:
    """The dtype in which tiles of ``dtype`` are multiplied; the interpreter would multiply the bits of bfloat16."""
    return tl.float32 if INTERPRETED and dtype == torch.bfloat16 else DTYPES[dtype]


def precision(dtype: torch.dtype) -> str:
    """How float32 tiles are multiplied for a result of ``dtype``: in three bfloat16 products to 2**-16, or exactly."""
    return "ieee" if INTERPRETED or dtype == torch.float32 else "bf16x3"


def pipeline_stages(tensor: Tensor) -> int:
    """How many tiles are on their way at once; three take the shared memory of a data centre's GPU, over 100 KiB."""
    spacious = tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) in ((8, 0), (9, 0), (10, 0), (10, 3))
    return 3 if spacious else 2


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """A context in which kernels run on the tensor's device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def check_weight(function: str, W0: Tensor, A: Tensor, B: Tensor) -> None:
    """Raise unless W0 is (out, in), B (..., out, r) and A (..., r, in), of dtypes that a kernel computes with."""
    out, into = W0.shape
    r = A.shape[-2]
    if A.shape[-1] != into or B.shape[-2:] != (out, r) or A.shape[:-2] != B.shape[:-2] or r == 0:
        raise HiraError(
            f"{function}: A is {tuple(A.shape)} and B is {tuple(B.shape)}; for W0 {tuple(W0.shape)} "
            f"they must end in (r, {into}) and ({out}, r), with one r of at least 1"
        )
    check_dtype(function, "W0", W0.dtype)
    for name, tensor in (("A", A), ("B", B)):
        if not tensor.is_floating_point():
            raise HiraError(f"{function}: {name} is {tensor.dtype}; it must be of a floating dtype")


def check_dtype(function: str, name: str, dtype: torch.dtype) -> None:
    """Raise unless dtype is one that tiles are loaded in."""
    if dtype not in DTYPES:
        raise HiraError(
            f"{function}: {name} is {dtype}; the kernels compute in float32 and take float32, bfloat16 and float16: "
            "use the functions of hira.ops for others"
        )
