"""What the kernels share: how tiles are loaded, multiplied and rounded, and which arguments they take."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hira.errors import HiraError

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def load_tile(tensor, i, j, stride_i, stride_j, in_i, in_j):  # type: ignore[no-untyped-def]
    """Entries (i, j), zero where either is outside."""
    return tl.load(
        tensor + i[:, None] * stride_i + j[None, :] * stride_j, mask=in_i[:, None] & in_j[None, :], other=0.0
    )


@triton.jit  # type: ignore[untyped-decorator]
def round_to(exact, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Round float32 to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:  # on the bits, because the interpreter cuts bfloat16 off
        bits = exact.to(tl.int32, bitcast=True)
        up = bits + 0x7FFF + ((bits >> 16) & 1)
        bits = tl.where(exact == exact, up, bits | 0x400000)  # NaN stays NaN
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return exact.to(dtype)


@triton.jit  # type: ignore[untyped-decorator]
def operand(tile, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile rounded to the dtype in which it is multiplied."""
    rounded = tile if tile.dtype == dtype else round_to(tile.to(tl.float32), dtype)
    if INTERPRETED:  # the interpreter would multiply the bits of bfloat16
        return rounded.to(tl.float32)
    else:
        return rounded


@triton.jit  # type: ignore[untyped-decorator]
def split(tile, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile as the sum of two in a half precision, of twice its digits; the tile itself for float32."""
    exact = tile.to(tl.float32)
    if dtype == tl.float32:
        return exact, exact
    elif dtype == tl.bfloat16:
        # rounded on the bits, to nearest: Hopper converts single numbers at a quarter of the pace
        bits = (exact.to(tl.int32, bitcast=True) + 0x8000) & -0x10000
        head = bits.to(tl.float32, bitcast=True)
        return operand(head, dtype), operand(exact - head, dtype)
    else:
        head = operand(exact, dtype)
        return head, operand(exact - head.to(tl.float32), dtype)


@triton.jit  # type: ignore[untyped-decorator]
def multiply(left, left_rest, right, right_rest, total, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add the product of two split tiles: exactly in float32, or in three products of halves."""
    if dtype == tl.float32:
        return tl.dot(left, right, total, input_precision="ieee")
    else:
        total = tl.dot(left_rest, right, total)
        total = tl.dot(left, right_rest, total)
        return tl.dot(left, right, total)


@triton.jit  # type: ignore[untyped-decorator]
def low_rank(  # type: ignore[no-untyped-def]
    A,
    B,
    b,
    b_rest,
    i,
    j,
    in_rows,
    in_columns,
    r,
    A_rank,
    A_column,
    B_row,
    B_rank,
    FACTOR: tl.constexpr,
    RANK_BLOCKS: tl.constexpr,
):
    """BA at rows i and columns j; b and b_rest are B there, split to FACTOR's dtype, for the first block of ranks."""
    BLOCK_R: tl.constexpr = b.shape[1]
    k = tl.arange(0, BLOCK_R).to(tl.int64)
    a, a_rest = split(load_tile(A, k, j, A_rank, A_column, k < r, in_columns), FACTOR)
    total = multiply(b, b_rest, a, a_rest, tl.full((i.shape[0], j.shape[0]), 0.0, tl.float32), FACTOR)
    for block in range(1, RANK_BLOCKS):
        further = k + block * BLOCK_R
        b, b_rest = split(load_tile(B, i, further, B_row, B_rank, in_rows, further < r), FACTOR)
        a, a_rest = split(load_tile(A, further, j, A_rank, A_column, further < r, in_columns), FACTOR)
        total = multiply(b, b_rest, a, a_rest, total, FACTOR)
    return total


@triton.jit  # type: ignore[untyped-decorator]
def sum_kernel(  # type: ignore[no-untyped-def]
    parts,
    bias,
    out,
    count,
    entries,
    columns,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add parts (count, entries) in their order, a bias for each of the columns, and with ADD what is there."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < entries
    total = tl.full((BLOCK,), 0.0, tl.float32)
    for part in range(count):
        total += tl.load(parts + part * entries + at, mask=inside, other=0.0)
    if BIAS:
        total += tl.load(bias + at % columns, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        total += tl.load(out + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, round_to(total, DTYPE), mask=inside)


def sum_parts(parts: Tensor, out: Tensor, bias: Tensor | None = None, *, add: bool = False) -> None:
    """Write the sum over the first dimension of contiguous float32 parts to out, contiguous, rounded once."""
    entries = out.numel()
    sum_kernel[(triton.cdiv(entries, 512),)](
        parts,
        bias,
        out,
        len(parts),
        entries,
        out.shape[-1],
        BIAS=bias is not None,
        ADD=add,
        DTYPE=DTYPES[out.dtype],
        BLOCK=512,
        num_warps=4,
    )


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """A context in which kernels run on the tensor's device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def check_weight(function: str, W0: Tensor, A: Tensor, B: Tensor) -> None:
    """Raise unless W0 is (out, in), A (r, in) and B (out, r), of dtypes that a kernel computes with."""
    out, into = W0.shape
    r = A.shape[0]
    if A.shape != (r, into) or B.shape != (out, r) or r == 0:
        raise HiraError(
            f"{function}: A is {tuple(A.shape)} and B is {tuple(B.shape)}; for W0 {tuple(W0.shape)} "
            f"they must be (r, {into}) and ({out}, r), with one r of at least 1"
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
