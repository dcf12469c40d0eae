"""y = x W'^T for a few tokens, reading W0 once and writing no W'.

W0's bytes set the pace of a product with few tokens: 2 bytes an entry in bfloat16 take 0.5 ps at the 4 TB/s that an
H200 reads, time for 30 float32 operations outside its tensor cores (67 Tflop/s) or 500 of bfloat16 within
(990 Tflop/s). For T tokens, operations for each entry of W0:

    form a tile of W0 * BA                    2 r + 2 T      T counted as 16, a tile's least width
    W0 (a_k * x[t]) for each k and t          2 T (r + 1)

Both need tensor cores: at r = 32 either takes more than 30. As float32 is multiplied in three products of bfloat16, the
first takes 0.26 ps at r = 32, whatever T is. So it stays under W0's 0.5 ps at any T, and the second for few tokens.

In half precision W0's own part is multiplied as it is stored, and the update W0 * BA is formed in float32 and rounded
by itself. That is finer than a W' that is rounded, and no update is lost, however small.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hira.errors import HiraError
from hira.ops.heuristics import DECODED_TOKENS as MOST_TOKENS
from hira.ops.triton import tiles
from hira.ops.triton.arithmetic import (
    DTYPES,
    check_dtype,
    check_weight,
    load_tile,
    low_rank,
    on_device_of,
    operand,
    split,
    sum_parts,
)


@triton.jit  # type: ignore[untyped-decorator]
def decode_kernel(  # type: ignore[no-untyped-def]
    x,
    W0,
    A,
    B,
    parts,
    tokens,
    rows,
    columns,
    r,
    strip_columns,
    x_token,
    x_column,
    W0_row,
    W0_column,
    A_rank,
    A_column,
    B_row,
    B_rank,
    DTYPE: tl.constexpr,
    FACTOR: tl.constexpr,
    RANK_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Multiply a block of rows, over a strip of columns, with all tokens; parts (strips, tokens, rows)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    strip = tl.program_id(1).to(tl.int64)
    t = tl.arange(0, BLOCK_T).to(tl.int64)
    k = tl.arange(0, BLOCK_R).to(tl.int64)
    in_rows, in_tokens = i < rows, t < tokens
    b, b_rest = split(load_tile(B, i, k, B_row, B_rank, in_rows, k < r), FACTOR)
    y = tl.full((BLOCK_M, BLOCK_T), 0.0, tl.float32)
    for start in range(0, strip_columns, BLOCK_N):
        j = strip * strip_columns + start + tl.arange(0, BLOCK_N)
        in_columns = j < columns
        w = load_tile(W0, i, j, W0_row, W0_column, in_rows, in_columns)
        x_tile = operand(load_tile(x, j, t, x_column, x_token, in_columns, in_tokens), DTYPE)
        BA = low_rank(
            A, B, b, b_rest, i, j, in_rows, in_columns, r, A_rank, A_column, B_row, B_rank, FACTOR, RANK_BLOCKS
        )
        exact = w.to(tl.float32)
        if tl.float32 == DTYPE:
            y = tl.dot(exact * (1.0 + BA), x_tile, y, input_precision="ieee")
        else:
            stored = operand(w, DTYPE)
            rest = exact * BA
            if w.dtype != DTYPE:
                rest += exact - stored.to(tl.float32)
            y = tl.dot(stored, x_tile, y)
            y = tl.dot(operand(rest, DTYPE), x_tile, y)
    tl.store(parts + (strip * tokens + t[None, :]) * rows + i[:, None], y, mask=in_rows[:, None] & in_tokens[None, :])


def decode(x: Tensor, W0: Tensor, A: Tensor, B: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply an adapted weight to a few tokens.

    Equation: ``y = x (W0 * (1 + BA))^T + bias``, in float32. For x in half precision ``W0 * BA`` is rounded to x's
    dtype before it is multiplied, and y at the end.

    Args:
        x: (T, in) with T at most 16, float32, bfloat16 or float16, of any strides.
        W0: (out, in), float32, bfloat16 or float16, of any strides.
        A: (r, in), any floating dtype; converted to float32.
        B: (out, r), likewise.
        bias: (out,), any floating dtype, or None.

    Returns:
        y (T, out), in x's dtype. Not tracked by autograd.

    Raises:
        HiraError: shapes or dtypes do not fit.

    Cost: W0 is read once. 2 (r + T) out in operations in float32, or if x is a half in bfloat16, with three products
    for BA and two for x. A is read out / 64 times, mostly from cache. Temporaries: parts of y, at most 528 T times 64
    float32 or T out, whichever is more.

    Source: HiRA (ICLR 2025), equation 5.
    """
    check_weight("decode", W0, A, B)
    check_dtype("decode", "x", x.dtype)
    if x.shape[1:] != W0.shape[1:] or len(x) > MOST_TOKENS:
        raise HiraError(
            f"decode: x is {tuple(x.shape)}; for W0 {tuple(W0.shape)} it must be (T, {W0.shape[1]}) "
            f"with T at most {MOST_TOKENS}: use hira.ops.linear for more"
        )
    if bias is not None and bias.shape != W0.shape[:1]:
        raise HiraError(f"decode: bias is {tuple(bias.shape)}; for W0 {tuple(W0.shape)} it must be ({W0.shape[0]},)")
    function = torch.ops.hira.triton_decode if torch.compiler.is_compiling() else _decode
    y: Tensor = function(x, W0, A, B, bias)
    return y


def _decode(x: Tensor, W0: Tensor, A: Tensor, B: Tensor, bias: Tensor | None) -> Tensor:
    (out, into), r, tokens = W0.shape, A.shape[0], len(x)
    y = x.new_empty(tokens, out)
    if y.numel() == 0:
        return y
    exact = x.dtype == torch.float32
    tile = tiles.EXACT_DECODE if exact else tiles.DECODE
    block_r = tiles.rank_block(r)
    strips, width = tiles.strips(out, into, tile, tiles.DECODE_PROGRAMS)
    parts = x.new_empty(strips, tokens, out, dtype=torch.float32)
    with on_device_of(W0):
        if strips:
            decode_kernel[(triton.cdiv(out, tile.rows), strips)](
                x,
                W0,
                A,
                B,
                parts,
                tokens,
                out,
                into,
                r,
                width,
                *x.stride(),
                *W0.stride(),
                *A.stride(),
                *B.stride(),
                DTYPE=DTYPES[x.dtype],
                FACTOR=tl.float32 if exact else tl.bfloat16,
                RANK_BLOCKS=triton.cdiv(r, block_r),
                BLOCK_M=tile.rows,
                BLOCK_N=tile.columns,
                BLOCK_R=block_r,
                BLOCK_T=MOST_TOKENS,
                num_warps=tile.warps,
                num_stages=tile.stages,
            )
        sum_parts(parts, y, None if bias is None else bias.contiguous())
    return y


torch.library.custom_op(
    "hira::triton_decode",
    _decode,
    mutates_args=(),
    schema="(Tensor x, Tensor W0, Tensor A, Tensor B, Tensor? bias) -> Tensor",
).register_fake(lambda x, W0, A, B, bias: x.new_empty(x.shape[0], W0.shape[0]))
