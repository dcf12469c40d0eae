"""The product G = dy^T x in 8-bit integers: G serves dA and dB alone, whose sums average its rounding away.

Why it may be rounded, and how much it costs and saves, is in docs/architecture.md.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hira.ops import heuristics
from hira.ops.workspace import is_concrete

# Sums of so many products of two codes stay within 32 bits.
TOKENS_AT_ONCE = (2**31 - 1) // 127**2
_LEAST = 1e-30  # of a column's largest entry, so that its reciprocal is finite


class Codes(NamedTuple):
    """A matrix rounded to 8 bits, ``codes * scale``, with a scale for each column."""

    codes: Tensor  # (T, n), int8
    scale: Tensor  # (n,), float32


def quantize(x: Tensor) -> Codes:
    """Round x (T, n) to integers from -127 to 127 times a scale for each column, its largest absolute value / 127.

    A column that is not finite has a scale that is not, so that what is computed from it is not finite either.
    """
    largest = torch.maximum(x.amax(0), -x.amin(0)) if len(x) else x.new_zeros(x.shape[1])
    largest = largest.float().clamp_min(_LEAST)
    inverse = 127 / largest
    codes = torch.empty_like(x, dtype=torch.int8, memory_format=torch.contiguous_format)
    for part in heuristics.chunks(x):
        codes[part] = (x[part] * inverse).round_()
    return Codes(codes, largest / 127)


class _Last(threading.local):
    """The codes of the last input: the layers behind one, such as q, k and v, keep them for backward together."""

    codes: list[weakref.ref[Tensor]] | None = None


_last = _Last()


def quantize_shared(x: Tensor) -> Codes:
    """`quantize` of x (..., n) over its last dimension; on a CPU, the tensors of the call before where they are equal.

    They are compared by value. What is shared is memory: every call quantises.
    """
    codes = quantize(x.detach().reshape(-1, x.shape[-1]))
    # on a device the comparison would wait for it
    if not is_concrete(codes.codes) or not heuristics.on_cpu(x.device):
        return codes
    before = [part for reference in _last.codes or () if (part := reference()) is not None]
    if len(before) == len(codes) and all(map(torch.equal, before, codes)):
        return Codes(*before)
    _last.codes = [weakref.ref(part) for part in codes]
    return codes


class Link(torch.autograd.Function):
    """Zeros of x's shape in the memory of one number, whose gradient is x's: they keep x's place without its values."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return x.new_zeros(()).expand(x.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> Tensor | None:
        return gradient


def product(dy: Tensor, x: Tensor, out: Tensor, integers: Tensor) -> Tensor:
    """``dy^T x`` of codes dy (T, m) and x (T, n) as floating-point numbers in out (m, n).

    Args:
        dy, x: int8.
        out: the result, of any floating dtype.
        integers: int32 memory of out's shape and layout.
    """
    if not integers.is_contiguous():  # the integer product writes rows
        product(x, dy, out.t(), integers.t())
        return out
    for start in range(0, max(len(x), 1), TOKENS_AT_ONCE):
        part = slice(start, start + TOKENS_AT_ONCE)
        torch._int_mm(dy[part].t(), x[part], out=integers)
        out = out.add_(integers) if start else out.copy_(integers)
    return out
