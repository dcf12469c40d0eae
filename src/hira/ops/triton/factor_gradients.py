"""The gradients of A and B: cuBLAS computes G, a block at a time, and one kernel reads it once, with W0 beside it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hira.errors import HiraError
from hira.ops import heuristics
from hira.ops.triton import tiles
from hira.ops.triton.arithmetic import (
    DTYPES,
    check_dtype,
    check_weight,
    load_tile,
    on_device_of,
    operand,
    split,
    sum_parts,
)


@triton.jit  # type: ignore[untyped-decorator]
def factor_gradients_kernel(  # type: ignore[no-untyped-def]
    G,
    W0,
    A,
    B,
    dA,
    dB,
    rows,
    columns,
    r,
    strip_columns,
    G_row,
    G_column,
    W0_row,
    W0_column,
    A_rank,
    A_column,
    B_row,
    B_rank,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Reduce a block of rows, over a strip of columns; dA (row blocks, r, columns), dB (strips, rows, r)."""
    row_block, strip = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_rows, in_ranks = i < rows, k < r
    b, b_rest = split(load_tile(B, i, k, B_row, B_rank, in_rows, in_ranks), DTYPE)
    part_B = tl.full((BLOCK_M, BLOCK_R), 0.0, tl.float32)
    j = strip * strip_columns + tl.arange(0, BLOCK_N)
    g = load_tile(G, i, j, G_row, G_column, in_rows, j < columns)
    w = load_tile(W0, i, j, W0_row, W0_column, in_rows, j < columns)
    for start in range(0, strip_columns, BLOCK_N):
        j = strip * strip_columns + start + tl.arange(0, BLOCK_N)
        in_columns = j < columns
        ahead = j + BLOCK_N
        in_ahead = (ahead < columns) & (start + BLOCK_N < strip_columns)
        next_g = load_tile(G, i, ahead, G_row, G_column, in_rows, in_ahead)
        next_w = load_tile(W0, i, ahead, W0_row, W0_column, in_rows, in_ahead)
        a, a_rest = split(load_tile(A, j, k, A_column, A_rank, in_columns, in_ranks), DTYPE)
        h = operand(g.to(tl.float32) * w.to(tl.float32), DTYPE)
        part_B = tl.dot(h, a_rest, part_B) if tl.float32 != DTYPE else part_B
        part_B = tl.dot(h, a, part_B, input_precision="ieee")
        part_A = tl.full((BLOCK_N, BLOCK_R), 0.0, tl.float32)
        part_A = tl.dot(tl.trans(h), b_rest, part_A) if tl.float32 != DTYPE else part_A
        part_A = tl.dot(tl.trans(h), b, part_A, input_precision="ieee")
        tl.store(
            dA + (row_block * r + k[None, :]) * columns + j[:, None],
            part_A,
            mask=in_columns[:, None] & in_ranks[None, :],
        )
        g, w = next_g, next_w
    tl.store(dB + (strip * rows + i[:, None]) * r + k[None, :], part_B, mask=in_rows[:, None] & in_ranks[None, :])


def factor_gradients(dy: Tensor, x: Tensor, W0: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of A and B of ``y = x (W0 * (1 + BA))^T``.

    Equation: with ``G = dy^T x``, ``dA = B^T (G * W0)`` and ``dB = (G * W0) A^T``. A block of rows of G is computed in
    the dtype of x; tiles of G * W0 are rounded to that too, and summed in float32. The parts are added in a fixed
    order, so that the same call gives the same bits.

    Args:
        dy: (T, out), float32, bfloat16 or float16, of any strides.
        x: (T, in), of dy's dtype.
        W0: (out, in), float32, bfloat16 or float16.
        A: (r, in), any floating dtype; converted to float32.
        B: (out, r), likewise.

    Returns:
        dA (r, in) and dB (out, r), in the dtypes of A and B.

    Raises:
        HiraError: shapes or dtypes do not fit.

    Cost: the product G, 2 T out in operations, then G and W0 read once for each 64 ranks. The reductions take
    4 r out in operations in float32, or in two products each of x's half precision. Temporaries: a block of G, and
    parts of dA and dB: in half precision on a data centre's GPU r / 128 float32 for each entry of the block, and at
    most 132 times 128 r.

    Source: docs/concepts.md.
    """
    check_weight("factor_gradients", W0, A, B)
    check_dtype("factor_gradients", "x", x.dtype)
    if dy.dtype != x.dtype or dy.shape[1:] != W0.shape[:1] or x.shape[1:] != W0.shape[1:] or len(dy) != len(x):
        raise HiraError(
            f"factor_gradients: dy is {tuple(dy.shape)} {dy.dtype} and x is {tuple(x.shape)} {x.dtype}; for W0 "
            f"{tuple(W0.shape)} they must be (T, {W0.shape[0]}) and (T, {W0.shape[1]}), of one dtype"
        )
    function = torch.ops.hira.triton_factor_gradients if torch.compiler.is_compiling() else _factor_gradients
    dA, dB = function(dy, x, W0, A, B)
    return dA, dB


def _factor_gradients(dy: Tensor, x: Tensor, W0: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    if x.numel() == 0 or dy.numel() == 0:
        return A.new_zeros(A.shape), B.new_zeros(B.shape)
    dA, dB = A.new_empty(A.shape, dtype=torch.float32), B.new_empty(B.shape, dtype=torch.float32)
    step = max(1, heuristics.block_entries(W0.device) // W0.shape[1])
    with on_device_of(W0):
        for start in range(0, len(W0), step):
            rows = slice(start, start + step)
            _reduce(dy[:, rows], x, W0[rows], A, B[rows], dA, dB[rows], first=start == 0)
    return dA.to(A.dtype), dB.to(B.dtype)


def _reduce(dy: Tensor, x: Tensor, W0: Tensor, A: Tensor, B: Tensor, dA: Tensor, dB: Tensor, *, first: bool) -> None:
    """Write dB of a block of rows, and its part of dA, which is added unless the block is the first."""
    (out, into), r = W0.shape, A.shape[0]
    # in W0's layout, so that one order of reading suits both
    G = torch.mm(x.t(), dy).t() if W0.stride(0) < W0.stride(1) else torch.mm(dy.t(), x)
    exact = x.dtype == torch.float32
    tile = tiles.EXACT_FACTOR_GRADIENTS if exact else tiles.factor_gradients(W0)
    block_r, row_parts = tiles.rank_block(r), triton.cdiv(out, tile.rows)
    strips, width = tiles.strips(out, into, tile, tiles.FACTOR_GRADIENTS_PROGRAMS)
    parts_A = dA.new_empty(row_parts, r, into)
    parts_B = dB.new_empty(strips, out, r)
    factor_gradients_kernel[(triton.cdiv(r, block_r), row_parts, strips)](
        G,
        W0,
        A,
        B,
        parts_A,
        parts_B,
        out,
        into,
        r,
        width,
        *G.stride(),
        *W0.stride(),
        *A.stride(),
        *B.stride(),
        DTYPE=DTYPES[x.dtype],
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        BLOCK_R=block_r,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    sum_parts(parts_A, dA, add=not first)
    sum_parts(parts_B, dB)


torch.library.custom_op(
    "hira::triton_factor_gradients",
    _factor_gradients,
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor W0, Tensor A, Tensor B) -> (Tensor, Tensor)",
).register_fake(lambda dy, x, W0, A, B: (A.new_empty(A.shape), B.new_empty(B.shape)))
