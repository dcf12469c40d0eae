"""W' = W0 * (1 + BA) + L2 L1 in one pass over the weight."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hira.errors import HiraError
from hira.ops.triton import tiles
from hira.ops.triton.arithmetic import (
    DTYPES,
    check_dtype,
    check_weight,
    load_tile,
    low_rank,
    on_device_of,
    round_to,
    split,
)


@triton.jit  # type: ignore[untyped-decorator]
def _dither(exact, noise, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add noise, int16, to the bits that rounding to dtype drops, as `hira.ops.dither.round_into` does."""
    # twice the bits of the least number of full significand, and of the largest
    least: tl.constexpr = 0x01000000 if dtype == tl.bfloat16 else 0x71000000
    most: tl.constexpr = 0xFEFE0000 if dtype == tl.bfloat16 else 0x8EFFC000
    if dtype == tl.float16:  # drops 13 bits, not 16
        noise = (noise >> 3) | 1
    bits = exact.to(tl.int32, bitcast=True)
    above = (bits << 1) - least  # without the sign; wraps below the least
    ordinary = above.to(tl.uint32, bitcast=True) <= (most - least)
    return tl.where(ordinary, bits + noise.to(tl.int32), bits).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def form_kernel(  # type: ignore[no-untyped-def]
    W0,
    A,
    B,
    out,
    row_noise,
    column_noise,
    rows,
    columns,
    r,
    lora_r,
    W0_row,
    W0_column,
    A_rank,
    A_column,
    B_row,
    B_rank,
    out_row,
    out_column,
    UPDATE_ONLY: tl.constexpr,
    DITHER: tl.constexpr,
    FACTOR: tl.constexpr,
    DTYPE: tl.constexpr,
    RANK_BLOCKS: tl.constexpr,
    LORA_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Form a tile; offsets are 64 bits wide. L1 are the rows of A, and L2 the columns of B, behind the first r."""
    across = tl.cdiv(columns, BLOCK_N)
    tile = tl.program_id(0)
    i = (tile // across).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = (tile % across).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_R).to(tl.int64)
    in_rows, in_columns = i < rows, j < columns
    w = load_tile(W0, i, j, W0_row, W0_column, in_rows, in_columns)
    b, b_rest = split(load_tile(B, i, k, B_row, B_rank, in_rows, k < r), FACTOR)
    modulation = low_rank(
        A, B, b, b_rest, i, j, in_rows, in_columns, r, A_rank, A_column, B_row, B_rank, FACTOR, RANK_BLOCKS
    )
    if not UPDATE_ONLY:
        modulation += 1.0
    exact = w.to(tl.float32) * modulation
    if LORA_BLOCKS > 0:
        first = tl.cast(r, tl.int64)
        L1, L2 = A + first * A_rank, B + first * B_rank
        k = tl.arange(0, BLOCK_L).to(tl.int64)
        b, b_rest = split(load_tile(L2, i, k, B_row, B_rank, in_rows, k < lora_r), FACTOR)
        exact += low_rank(
            L1, L2, b, b_rest, i, j, in_rows, in_columns, lora_r, A_rank, A_column, B_row, B_rank, FACTOR, LORA_BLOCKS
        )
    if DITHER:
        noise_i = tl.load(row_noise + i, mask=in_rows, other=0)
        noise_j = tl.load(column_noise + j, mask=in_columns, other=0)
        exact = _dither(exact, noise_i[:, None] * noise_j[None, :], DTYPE)  # int16, wraps
    tl.store(
        out + i[:, None] * out_row + j[None, :] * out_column,
        round_to(exact, DTYPE),
        mask=in_rows[:, None] & in_columns[None, :],
    )


def form(
    W0: Tensor,
    A: Tensor,
    B: Tensor,
    dtype: torch.dtype,
    *,
    lora_r: int = 0,
    update_only: bool = False,
    noise: tuple[Tensor, Tensor] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Form an adapted weight in one pass.

    Equation: ``W' = W0 * (1 + BA) + L2 L1``, or ``W0 * BA + L2 L1`` with ``update_only``; all of it in float32, rounded
    once, to nearest even or with a dither.

    Args:
        W0: (out, in), float32, bfloat16 or float16, of any strides.
        A: (r + lora_r, in), any floating dtype, of any strides: A over L1; converted to float32.
        B: (out, r + lora_r), likewise: B beside L2.
        dtype: that of the result: float32, bfloat16 or float16.
        lora_r: the number of rows of L1; 0 for HiRA without LoRA.
        update_only: leave out the 1.
        noise: the hashes of row numbers (out,) and of column numbers (in,), odd int16, as `hira.ops.dither.noise_of`
            gives them; None to round to nearest. For bfloat16 and float16 only.
        out: (out, in), of ``dtype`` and of any strides: where W' is written; None for memory of its own.

    Returns:
        W' (out, in), of ``dtype`` and W0's memory layout; or ``out``. Not tracked by autograd.

    Raises:
        HiraError: shapes or dtypes do not fit.

    Cost: (2 (r + lora_r) + 2) out in operations in float32; for a half, BA and L2 L1 take three products of bfloat16
    each on tensor cores, which leave them within 2**-16. W0 is read once and W' written once. A is read out / 64 times,
    B in / 64 times, mostly from cache. No temporaries.

    Source: HiRA (ICLR 2025), equation 5; the dither is explained in docs/concepts.md.
    """
    check_weight("form", W0, A, B)
    check_dtype("form", "the result", dtype)
    if not 0 <= lora_r < len(A):
        raise HiraError(f"form: lora_r is {lora_r}; of the {len(A)} rows of A it leaves none to HiRA, or is negative")
    row_noise, column_noise = (None, None) if noise is None else noise
    if noise is not None:
        shapes = [(tuple(vector.shape), vector.dtype) for vector in noise]
        if shapes != [((size,), torch.int16) for size in W0.shape]:
            raise HiraError(f"form: noise is {shapes}; for W0 {tuple(W0.shape)} it must be one int16 vector for each")
        if dtype == torch.float32:
            raise HiraError("form: noise was given for a float32 result, which is not rounded")
    if out is not None and (out.shape, out.dtype) != (W0.shape, dtype):
        raise HiraError(f"form: out is {tuple(out.shape)} {out.dtype}; it must be {tuple(W0.shape)} {dtype}")
    if torch.compiler.is_compiling():
        weight: Tensor = torch.ops.hira.triton_form(W0, A, B, dtype, lora_r, update_only, row_noise, column_noise)
        return weight if out is None else out.copy_(weight)
    return _form(W0, A, B, dtype, lora_r, update_only, row_noise, column_noise, out)


def _form(
    W0: Tensor,
    A: Tensor,
    B: Tensor,
    dtype: torch.dtype,
    lora_r: int,
    update_only: bool,
    row_noise: Tensor | None,
    column_noise: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    out = torch.empty_like(W0, dtype=dtype) if out is None else out
    if out.numel() == 0:
        return out
    if row_noise is not None and column_noise is not None:
        row_noise, column_noise = row_noise.contiguous(), column_noise.contiguous()
    (rows, columns), r = W0.shape, A.shape[0] - lora_r
    exact = dtype == torch.float32
    tile = tiles.EXACT_FORM if exact else tiles.FORM
    block_r, block_l = tiles.rank_block(r), tiles.rank_block(lora_r)
    with on_device_of(W0):
        form_kernel[(triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns),)](
            W0,
            A,
            B,
            out,
            row_noise,
            column_noise,
            rows,
            columns,
            r,
            lora_r,
            *W0.stride(),
            *A.stride(),
            *B.stride(),
            *out.stride(),
            UPDATE_ONLY=update_only,
            DITHER=row_noise is not None,
            FACTOR=tl.float32 if exact else tl.bfloat16,
            DTYPE=DTYPES[dtype],
            RANK_BLOCKS=triton.cdiv(r, block_r),
            LORA_BLOCKS=triton.cdiv(lora_r, block_l),
            BLOCK_M=tile.rows,
            BLOCK_N=tile.columns,
            BLOCK_R=block_r,
            BLOCK_L=block_l,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out


torch.library.custom_op(
    "hira::triton_form",
    _form,
    mutates_args=(),
    schema=(
        "(Tensor W0, Tensor A, Tensor B, ScalarType dtype, int lora_r, bool update_only, Tensor? row_noise,"
        " Tensor? column_noise) -> Tensor"
    ),
).register_fake(lambda W0, A, B, dtype, *_: torch.empty_like(W0, dtype=dtype))
