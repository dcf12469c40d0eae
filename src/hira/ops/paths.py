"""Which way a product takes, decided from sizes and devices, here and nowhere else.

The measurements behind the numbers are in docs/architecture.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Entries of one block of W'. On a CPU 16 MiB of float32: products over less than that run slower. Elsewhere launches
# cost more than memory traffic, so blocks are larger.
CPU_BLOCK_ENTRIES = 1 << 22
DEVICE_BLOCK_ENTRIES = 1 << 25

# Numbers of tokens for which W' x^T is faster on a CPU than x W'^T, though y is then transposed.
TRANSPOSED_TOKENS = range(8, 33)

HALF = (torch.bfloat16, torch.float16)
DITHER = False


def block_entries(device: torch.device) -> int:
    """The number of entries that a block may have."""
    return CPU_BLOCK_ENTRIES if device.type == "cpu" else DEVICE_BLOCK_ENTRIES


def transposed(x: Tensor) -> bool:
    """Whether y (T, out) for x (T, in) is computed as the transpose of ``W' x^T``."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and x.shape[0] in TRANSPOSED_TOKENS


def dithers(stored: torch.dtype, product: torch.dtype) -> bool:
    """Whether W' is rounded with a dither: where W0 has few bits, so that its own do not spread the rounding."""
    return DITHER and product in HALF and stored in HALF
