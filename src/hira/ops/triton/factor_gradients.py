"""The gradients of A and B, with neither the weight's gradient G nor G * W0 ever in memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hira.errors import HiraError
from hira.ops.triton.arithmetic import check_dtype, check_weight, on_device_of, operand, pipeline_stages, precision

# Entries of float32 that the partial sums may take: 64 MiB.
BUFFER_ENTRIES = 1 << 24
# Tiles whose rows are computed side by side, so that they find dy and x in the cache.
GROUP = 8
BLOCK_R = 16


@triton.jit  # type: ignore[untyped-decorator]
def factor_gradients_kernel(  # type: ignore[no-untyped-def]
    dy,
    x,
    W0,
    A,
    B,
    dA,
    dB,
    tokens,
    rows,
    columns,
    r,
    dy_token,
    dy_row,
    x_token,
    x_column,
    W0_row,
    W0_column,
    A_rank,
    A_column,
    B_row,
    B_rank,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Compute one tile of dy^T x and reduce it to its part of dA, (tiles_m, r, columns), and dB, (tiles_n, rows, r)."""
    tiles_m = (rows + BLOCK_M - 1) // BLOCK_M
    tiles_n = (columns + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0)
    tile_m, tile_n = tl.swizzle2d(tile // tiles_n, tile % tiles_n, tiles_m, tiles_n, GROUP)
    tile_m, tile_n = tile_m.to(tl.int64), tile_n.to(tl.int64)
    i = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows, in_columns = i < rows, j < columns

    G = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for start in range(0, tokens, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T).to(tl.int64)
        in_tokens = t < tokens
        dy_tile = tl.load(
            dy + i[:, None] * dy_row + t[None, :] * dy_token, mask=in_rows[:, None] & in_tokens[None, :], other=0.0
        )
        x_tile = tl.load(
            x + t[:, None] * x_token + j[None, :] * x_column, mask=in_tokens[:, None] & in_columns[None, :], other=0.0
        )
        G = tl.dot(dy_tile.to(OPERAND), x_tile.to(OPERAND), G, input_precision="ieee")

    inside = in_rows[:, None] & in_columns[None, :]
    w = tl.load(W0 + i[:, None] * W0_row + j[None, :] * W0_column, mask=inside, other=0.0)
    H = G * w.to(tl.float32)
    for start in range(0, r, BLOCK_R):
        k = start + tl.arange(0, BLOCK_R).to(tl.int64)
        in_rank = k < r
        mask_A = in_columns[:, None] & in_rank[None, :]
        a = tl.load(A + j[:, None] * A_column + k[None, :] * A_rank, mask=mask_A, other=0.0)
        part = tl.dot(H, a.to(tl.float32), input_precision=PRECISION)
        tl.store(dB + (tile_n * rows + i[:, None]) * r + k[None, :], part, mask=in_rows[:, None] & in_rank[None, :])
        mask_B = in_rank[:, None] & in_rows[None, :]
        b = tl.load(B + k[:, None] * B_rank + i[None, :] * B_row, mask=mask_B, other=0.0)
        part = tl.dot(b.to(tl.float32), H, input_precision=PRECISION)
        tl.store(
            dA + (tile_m * r + k[:, None]) * columns + j[None, :], part, mask=in_rank[:, None] & in_columns[None, :]
        )


def factor_gradients(dy: Tensor, x: Tensor, W0: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of A and B of ``y = x (W0 * (1 + BA))^T``.

    Equation: with ``G = dy^T x``, ``dA = B^T (G * W0)`` and ``dB = (G * W0) A^T``. Tiles of G are summed over tokens
    in float32, multiplied by W0 there and reduced at once; the parts are added in a fixed order, so that the same
    call gives the same bits.

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

    Cost: 2 T out in operations in the dtype of x, on tensor cores if it is a half, and 4 r out in in float32, in three
    products of bfloat16 each if x is a half. Temporaries: the parts, at most 2**24 float32 (64 MiB) or, where that is
    more, the parts of one row of tiles, about 2 r in; rows of the weight are taken in turns to stay below.

    Source: docs/architecture.md.
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
    (out, into), r = W0.shape, A.shape[0]
    if x.numel() == 0 or dy.numel() == 0:
        return A.new_zeros(A.shape), B.new_zeros(B.shape)
    half = x.dtype != torch.float32
    block_m, block_n, block_t = (128, 128, 64) if half else (64, 64, 16)
    tiles_n = triton.cdiv(into, block_n)
    per_tile_row = r * into + tiles_n * block_m * r
    step = min(max(1, BUFFER_ENTRIES // per_tile_row) * block_m, out)
    buffer_A = A.new_empty(triton.cdiv(step, block_m) * r * into, dtype=torch.float32)
    buffer_B = B.new_empty(tiles_n * step * r, dtype=torch.float32)
    dA = A.new_zeros(A.shape, dtype=torch.float32)
    dB = B.new_empty(B.shape, dtype=torch.float32)
    with on_device_of(W0):
        for start in range(0, out, step):
            rows = slice(start, min(start + step, out))
            m = rows.stop - start
            tiles_m = triton.cdiv(m, block_m)
            parts_A = buffer_A[: tiles_m * r * into].view(tiles_m, r, into)
            parts_B = buffer_B[: tiles_n * m * r].view(tiles_n, m, r)
            factor_gradients_kernel[(tiles_m * tiles_n,)](
                dy[:, rows],
                x,
                W0[rows],
                A,
                B[rows],
                parts_A,
                parts_B,
                len(x),
                m,
                into,
                r,
                *dy.stride(),
                *x.stride(),
                *W0.stride(),
                *A.stride(),
                *B.stride(),
                OPERAND=operand(x.dtype),
                PRECISION=precision(x.dtype),
                BLOCK_T=block_t,
                BLOCK_M=block_m,
                BLOCK_N=block_n,
                BLOCK_R=BLOCK_R,
                GROUP=GROUP,
                num_warps=8 if half else 4,
                num_stages=pipeline_stages(W0) if half else 2,
            )
            dA += parts_A.sum(0)
            torch.sum(parts_B, 0, out=dB[rows])
    return dA.to(A.dtype), dB.to(B.dtype)


torch.library.custom_op(
    "hira::triton_factor_gradients",
    _factor_gradients,
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor W0, Tensor A, Tensor B) -> (Tensor, Tensor)",
).register_fake(lambda dy, x, W0, A, B: (A.new_empty(A.shape), B.new_empty(B.shape)))
