"""y = x W'^T for a few tokens, reading W0 once and writing no W'.

W0's bytes set the pace of a product with few tokens: 2 bytes an entry in bfloat16 take 0.6 ps at the 3.35 TB/s of an
H100, time for 40 float32 operations outside its tensor cores (67 Tflop/s) or 590 of bfloat16 within (990 Tflop/s).
For T tokens of D distinct adapters, operations for each entry of W0:

    form a tile of 1 + BA for each adapter    D (2 r + 2 T)      T counted as 16, a tile's least width
    W0 (a_k * x[t]) for each k and t          2 T (r + 1)

Both need tensor cores: at r = 32 either takes more than 40. As float32 is multiplied in three products of bfloat16
(two for the second way, as W0 is exact), the first takes 0.29 ps for one adapter at r = 32, whatever T is, and 0.48 at
r = 64; the second 0.13 T and 0.26 T. So the first stays under W0's 0.6 ps for one adapter at any T, and the second for
four tokens. For many adapters with one token each the second would win, by about two; the first is used for all.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hira.errors import HiraError
from hira.ops.heuristics import DECODED_TOKENS as MOST_TOKENS
from hira.ops.triton.arithmetic import DTYPES, check_dtype, check_weight, on_device_of, precision, round_to

BLOCK_M, BLOCK_N = 64, 64
# Rows of the weight are split over this many programs, two for each processor of an H100; more than there are row
# blocks split its columns into strips.
PROGRAMS = 264


@triton.jit  # type: ignore[untyped-decorator]
def decode_kernel(  # type: ignore[no-untyped-def]
    x,
    W0,
    A,
    B,
    adapter,
    parts,
    tokens,
    adapters,
    rows,
    columns,
    r,
    strip_columns,
    x_token,
    x_column,
    W0_row,
    W0_column,
    A_adapter,
    A_rank,
    A_column,
    B_adapter,
    B_row,
    B_rank,
    MIXED: tl.constexpr,
    PRECISION: tl.constexpr,
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
    in_rows, in_tokens = i < rows, t < tokens
    first = strip * strip_columns
    y = tl.full((BLOCK_M, BLOCK_T), 0.0, tl.float32)
    if MIXED:
        owners = tl.load(adapter + t, mask=in_tokens, other=-1).to(tl.int64)
    for start in range(0, strip_columns, BLOCK_N):
        j = first + start + tl.arange(0, BLOCK_N)
        in_columns = j < columns
        w = tl.load(
            W0 + i[:, None] * W0_row + j[None, :] * W0_column, mask=in_rows[:, None] & in_columns[None, :], other=0.0
        ).to(tl.float32)
        x_tile = tl.load(
            x + j[:, None] * x_column + t[None, :] * x_token, mask=in_columns[:, None] & in_tokens[None, :], other=0.0
        ).to(tl.float32)
        if MIXED:
            for token in range(tokens):
                own = tl.load(adapter + token).to(tl.int64)
                # an adapter is served at its first token, for all of its tokens
                if tl.sum(((owners == own) & (t < token)).to(tl.int32), 0) == 0:
                    exists = (own >= 0) & (own < adapters)
                    modulation = _modulation(
                        A + own * A_adapter,
                        B + own * B_adapter,
                        i,
                        j,
                        r,
                        in_rows & exists,
                        in_columns & exists,
                        A_rank,
                        A_column,
                        B_row,
                        B_rank,
                        PRECISION,
                        RANK_BLOCKS,
                        BLOCK_R,
                    )
                    # chosen after the product: 0 times another adapter's infinity would be NaN
                    served = tl.dot(w * modulation, x_tile, y, input_precision=PRECISION)
                    y = tl.where(owners[None, :] == own, served, y)
        else:
            modulation = _modulation(
                A,
                B,
                i,
                j,
                r,
                in_rows,
                in_columns,
                A_rank,
                A_column,
                B_row,
                B_rank,
                PRECISION,
                RANK_BLOCKS,
                BLOCK_R,
            )
            y = tl.dot(w * modulation, x_tile, y, input_precision=PRECISION)
    tl.store(parts + (strip * tokens + t[None, :]) * rows + i[:, None], y, mask=in_rows[:, None] & in_tokens[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _modulation(  # type: ignore[no-untyped-def]
    A,
    B,
    i,
    j,
    r,
    in_rows,
    in_columns,
    A_rank,
    A_column,
    B_row,
    B_rank,
    PRECISION: tl.constexpr,
    RANK_BLOCKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """1 + BA at rows i and columns j; 1 where they are masked out."""
    BLOCK_M: tl.constexpr = i.shape[0]
    BLOCK_N: tl.constexpr = j.shape[0]
    modulation = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for block in range(RANK_BLOCKS):
        k = block * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
        in_rank = k < r
        b = tl.load(B + i[:, None] * B_row + k[None, :] * B_rank, mask=in_rows[:, None] & in_rank[None, :], other=0.0)
        a = tl.load(
            A + k[:, None] * A_rank + j[None, :] * A_column, mask=in_rank[:, None] & in_columns[None, :], other=0.0
        )
        modulation = tl.dot(b.to(tl.float32), a.to(tl.float32), modulation, input_precision=PRECISION)
    return 1.0 + modulation


@triton.jit  # type: ignore[untyped-decorator]
def sum_kernel(  # type: ignore[no-untyped-def]
    parts,
    bias,
    adapter,
    y,
    strips,
    tokens,
    adapters,
    rows,
    BIAS: tl.constexpr,
    MIXED: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add a token's parts and the bias, and round; NaN for the token of an adapter that does not exist."""
    token = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < rows
    exact = tl.full((BLOCK,), 0.0, tl.float32)
    for strip in range(strips):
        exact += tl.load(parts + (strip * tokens + token) * rows + i, mask=inside, other=0.0)
    if BIAS:
        exact += tl.load(bias + i, mask=inside, other=0.0).to(tl.float32)
    if MIXED:
        own = tl.load(adapter + token)
        exact = tl.where((own >= -1) & (own < adapters), exact, float("nan"))
    tl.store(y + token * rows + i, round_to(exact, DTYPE), mask=inside)


def decode(
    x: Tensor, W0: Tensor, A: Tensor, B: Tensor, adapter: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Apply an adapted weight to a few tokens, each with an adapter of its own.

    Equation: ``y[t] = (W0 * (1 + B_a A_a)) x[t] + bias`` with ``a = adapter[t]``, or ``y[t] = W0 x[t] + bias`` where
    that is -1; all in float32, rounded once at the end.

    Args:
        x: (T, in) with T at most 16, float32, bfloat16 or float16, of any strides.
        W0: (out, in), float32, bfloat16 or float16, of any strides.
        A: (k, r, in) for k adapters, any floating dtype; converted to float32.
        B: (k, out, r), likewise.
        adapter: (T,), int64 or int32, from -1 to k - 1; None for adapter 0 throughout. It is not read on the host: a
            token with a number outside gets NaN.
        bias: (out,), any floating dtype, or None.

    Returns:
        y (T, out), in x's dtype. Not tracked by autograd.

    Raises:
        HiraError: shapes or dtypes do not fit.

    Cost: W0 is read once. 2 (r + T) out in operations for each distinct adapter, in float32, or in three products of
    bfloat16 each if x is a half. An adapter is read out / 64 times, mostly from cache. Temporaries: parts of y, at most
    264 T times 64 float32 or T out, whichever is more.

    Source: HiRA (ICLR 2025), equation 5.
    """
    if A.dim() != 3:
        raise HiraError(f"decode: A is {tuple(A.shape)}; it must be (k, r, in), stacked over k adapters")
    check_weight("decode", W0, A, B)
    check_dtype("decode", "x", x.dtype)
    if x.shape[1:] != W0.shape[1:] or len(x) > MOST_TOKENS:
        raise HiraError(
            f"decode: x is {tuple(x.shape)}; for W0 {tuple(W0.shape)} it must be (T, {W0.shape[1]}) "
            f"with T at most {MOST_TOKENS}: use hira.ops.linear for more"
        )
    if bias is not None and bias.shape != W0.shape[:1]:
        raise HiraError(f"decode: bias is {tuple(bias.shape)}; for W0 {tuple(W0.shape)} it must be ({W0.shape[0]},)")
    if adapter is None:
        if len(A) == 0:
            raise HiraError("decode: A holds no adapter; give adapter = -1 for tokens without one")
    elif adapter.shape != x.shape[:1] or adapter.dtype not in (torch.int64, torch.int32):
        raise HiraError(
            f"decode: adapter is {tuple(adapter.shape)} {adapter.dtype}; it must be one int64 or int32 for each of "
            f"the {len(x)} tokens"
        )
    function = torch.ops.hira.triton_decode if torch.compiler.is_compiling() else _decode
    y: Tensor = function(x, W0, A, B, adapter, bias)
    return y


def _decode(x: Tensor, W0: Tensor, A: Tensor, B: Tensor, adapter: Tensor | None, bias: Tensor | None) -> Tensor:
    (out, into), (adapters, r, _), tokens = W0.shape, A.shape, len(x)
    y = x.new_empty(tokens, out)
    if y.numel() == 0:
        return y
    # a tile of A as high as r where registers allow; r is then not looped over, and W0's loads are pipelined
    block_r = min(64 if x.dtype != torch.float32 else 32, max(16, triton.next_power_of_2(r)))
    row_blocks = triton.cdiv(out, BLOCK_M)
    strips = max(1, min(PROGRAMS // row_blocks, triton.cdiv(into, BLOCK_N)))
    strip_columns = triton.cdiv(triton.cdiv(into, BLOCK_N), strips) * BLOCK_N
    strips = triton.cdiv(into, strip_columns) if into else 0
    parts = x.new_empty(strips, tokens, out, dtype=torch.float32)
    mixed = adapter is not None
    if adapter is not None:
        adapter = adapter.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    with on_device_of(W0):
        if strips:
            decode_kernel[(row_blocks, strips)](
                x,
                W0,
                A,
                B,
                adapter,
                parts,
                tokens,
                adapters,
                out,
                into,
                r,
                strip_columns,
                *x.stride(),
                *W0.stride(),
                *A.stride(),
                *B.stride(),
                MIXED=mixed,
                PRECISION=precision(x.dtype),
                RANK_BLOCKS=triton.cdiv(r, block_r),
                BLOCK_M=BLOCK_M,
                BLOCK_N=BLOCK_N,
                BLOCK_R=block_r,
                BLOCK_T=MOST_TOKENS,
                num_warps=4 if x.dtype != torch.float32 else 8,
                num_stages=3,
            )
        sum_kernel[(triton.cdiv(out, 256), tokens)](
            parts,
            bias,
            adapter,
            y,
            strips,
            tokens,
            adapters,
            out,
            BIAS=bias is not None,
            MIXED=mixed,
            DTYPE=DTYPES[x.dtype],
            BLOCK=256,
            num_warps=4,
        )
    return y


torch.library.custom_op(
    "hira::triton_decode",
    _decode,
    mutates_args=(),
    schema="(Tensor x, Tensor W0, Tensor A, Tensor B, Tensor? adapter, Tensor? bias) -> Tensor",
).register_fake(lambda x, W0, A, B, adapter, bias: x.new_empty(x.shape[0], W0.shape[0]))
