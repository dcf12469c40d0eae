"""Rounding to half precision with a fixed dither, so that updates smaller than a weight's spacing are not lost.

The noise of entry (i, j) is the product of two odd 16-bit integers, hashes of i and of j, wrapped to 16 bits. It is
added to the bits that rounding drops: an entry is rounded up with the probability that its distance from the number
below demands, over the entries of a weight, and always in the same way. The argument is in docs/concepts.md.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hira.ops import heuristics
from hira.ops.workspace import is_concrete

_COLUMN_SALT = 0x9E3779B9
# For bfloat16, of numbers of 16 bits that count from -2**15: what leads from twice the upper half of a float32, its
# sign shifted out, to its distance from the least of full significand, and that of the last below the largest.
_BELOW_LEAST, _TO_LARGEST = 0x8000 - 0x0100, 0x7F7E * 2 - 0x0100 - 0x8000


class Noise(NamedTuple):
    """The hashes of a weight's row and column numbers, odd int16."""

    rows: Tensor  # (out,)
    columns: Tensor  # (in,)


def noise_of(W0: Tensor) -> Noise:
    """The noise for a weight W0 (out, in), the same for every weight of this shape."""
    return Noise(_hashes(W0, 0, 0), _hashes(W0, 1, _COLUMN_SALT))


def round_into(out: Tensor, exact: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Round exact (m, n), float32, to out's dtype, bfloat16 or float16, and return out; exact is overwritten.

    Zeros, numbers too small for a full significand, infinities and NaN are rounded to nearest, and so is every number
    that out's dtype has: the noise is less than half a unit in the last place.

    Args:
        out: (m, n).
        exact: (m, n), of any strides.
        rows: (m,), the hashes of the rows' numbers.
        columns: (n,), those of the columns'.
    """
    if exact.stride(-1) != 1 and exact.stride(0) == 1:
        return round_into(out.t(), exact.t(), columns, rows).t()
    for chunk in heuristics.chunks(exact):
        part, noise = exact[chunk], rows[chunk, None] * columns
        bits = part.view(torch.int32)
        if out.dtype == torch.float16:  # drops 13 bits, not 16
            noise = noise.bitwise_right_shift_(3).bitwise_or_(1)
        elif _can_look(out):
            bits += noise
            if _all_ordinary(out[chunk].copy_(part)):
                continue
            bits -= noise
        bits.addcmul_(noise, _are_ordinary(part, out.dtype))
        out[chunk].copy_(part)
    return out


def _are_ordinary(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether numbers of float32 are neither below the least of dtype's full significand nor above its largest."""
    if dtype == torch.bfloat16 and exact.stride(-1) == 1:
        # by the upper 16 bits; those of the largest can be left out, as it is rounded to itself with noise and without
        upper = exact.view(torch.int16)[:, 1::2]
        above = torch.add(_BELOW_LEAST, upper, alpha=2)  # twice the magnitude less the least's, less 2**15; wraps
        return above <= _TO_LARGEST
    size, limits = exact.abs(), torch.finfo(dtype)
    return (size >= limits.tiny) & (size <= limits.max)


def rounded(exact: Tensor, dtype: torch.dtype, noise: Noise) -> Tensor:
    """What `round_into` gives, by plain arithmetic without bits; derivatives are those of a cast.

    Args:
        exact: (m, n), float32.
        dtype: bfloat16 or float16.
        noise: the hashes of the rows' and columns' numbers.

    Returns:
        (m, n), of dtype.
    """
    fixed, limits = exact.detach(), torch.finfo(dtype)
    size = fixed.abs().double()
    product = noise.rows.double()[:, None] * noise.columns.double()
    added = product - 2.0**16 * torch.floor((product + 2.0**15) / 2.0**16)  # wrapped to 16 bits
    dropped = 2.0**16
    if dtype == torch.float16:
        added, dropped = 2 * torch.floor(added / 2.0**4) + 1, 2.0**13
    large = size * 2.0**52
    power = (large + size) - large  # size rounded to one digit
    power = torch.where(power > size, power / 2, power)
    unit = power * limits.eps
    below = torch.floor(size / unit)
    part = size / unit - below + added / dropped
    up = (part > 0.5) | ((part == 0.5) & (torch.remainder(below, 2) == 1))
    noisy = torch.where(fixed < 0, -1.0, 1.0) * (below + up.double()) * unit
    # the difference is a number of float32: both are of one size
    ordinary = (size >= limits.tiny) & (size <= limits.max)
    return (exact + torch.where(ordinary, noisy - fixed, 0.0).to(exact.dtype)).to(dtype)


def _can_look(tensor: Tensor) -> bool:
    """Whether values can be looked at: there are some, and no device has to be waited for."""
    return heuristics.on_cpu(tensor.device) and tensor.numel() > 0 and is_concrete(tensor)


def _all_ordinary(rounded: Tensor) -> bool:
    """Whether bfloat16 numbers are such that none of them can come from one that is to be rounded to nearest.

    What the noise makes of zeros, of numbers below the least of full significand, and of those above the largest, are
    numbers up to that least one, from the largest on, or NaN.
    """
    smallest, largest = (rounded.view(torch.int16) & 0x7FFF).aminmax()
    return int(smallest) > 0x0080 and int(largest) < 0x7F7F


# Vectors of hashes by device and salt, as long as was needed; shorter weights take their beginning.
_vectors: dict[tuple[torch.device, int], Tensor] = {}


def _hashes(W0: Tensor, dim: int, salt: int) -> Tensor:
    length = W0.shape[dim]
    if heuristics.plain():  # a constant for those who trace
        return torch.tensor(_numbers(length, salt), dtype=torch.int16, device=W0.device)
    if not is_concrete(W0):
        return hashes(torch.arange(length, device=W0.device), salt)
    vector = _vectors.get((W0.device, salt))
    if vector is None or len(vector) < length:
        with torch.inference_mode(False):
            vector = _vectors[W0.device, salt] = hashes(torch.arange(length, device=W0.device), salt)
    return vector[:length]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
@lru_cache(64)
def _numbers(length: int, salt: int) -> list[int]:
    return [_hash(number, salt) for number in range(length)]


def hashes(numbers: Tensor, salt: int) -> Tensor:
    """Hash integers to odd 16-bit ones: multiplications and shifts that let every bit reach every other."""
    hashed: Tensor = _hash(numbers, salt).to(torch.int16)
    return hashed


def _hash(numbers: Any, salt: int) -> Any:
    h = (numbers + salt) & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        h = ((h ^ (h >> shift)) * factor) & 0xFFFFFFFF
    h = h ^ (h >> 16)
    return (h & 0xFFFF) - 0x8000 | 1
