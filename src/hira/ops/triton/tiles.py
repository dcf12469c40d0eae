"""Shapes of the tiles in which the kernels work, and how many programs and loads are under way at once.

The bits of W' depend on these numbers through the order of sums alone, so they follow from dtypes and the device, never
from the block of the weight that is formed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tile(NamedTuple):
    """A tile of the weight, the warps that share it, and the loads of later tiles that are on their way meanwhile."""

    rows: int
    columns: int
    warps: int
    stages: int


# For products in bfloat16 on tensor cores, then for exact products of float32 outside them.
FORM, EXACT_FORM = Tile(64, 64, 4, 1), Tile(64, 64, 8, 1)
FACTOR_GRADIENTS, EXACT_FACTOR_GRADIENTS = Tile(128, 64, 4, 2), Tile(64, 64, 4, 1)
DECODE, EXACT_DECODE = Tile(64, 64, 4, 3), Tile(64, 64, 8, 2)
# In place of FACTOR_GRADIENTS where a block has less shared memory than on a data centre's GPU, or the tiles are wider.
SMALL_FACTOR_GRADIENTS = Tile(64, 64, 4, 1)

# Programs among which the columns of a weight are split, as far as there are fewer blocks of rows.
FACTOR_GRADIENTS_PROGRAMS = 264
DECODE_PROGRAMS = 528
# The most ranks that are multiplied at once.
MOST_RANKS = 64


def spacious(tensor: Tensor) -> bool:
    """Whether a block has over 160 KiB of shared memory on the tensor's device."""
    if not tensor.is_cuda or torch.version.hip is not None:  # AMD's numbers are like these, and its blocks have 64 KiB
        return False
    return torch.cuda.get_device_capability(tensor.device) in ((8, 0), (9, 0), (10, 0), (10, 3))


def factor_gradients(W0: Tensor) -> Tile:
    """The tile for the gradients of A and B in half precision."""
    return FACTOR_GRADIENTS if W0.element_size() == 2 and spacious(W0) else SMALL_FACTOR_GRADIENTS


def rank_block(r: int) -> int:
    """How many ranks are multiplied at once; 16 are a product's least depth."""
    return min(MOST_RANKS, max(16, 1 << (r - 1).bit_length()))


def strips(rows: int, columns: int, tile: Tile, programs: int) -> tuple[int, int]:
    """The number of strips into which the columns are split, and the columns of each."""
    tiles = -(-columns // tile.columns)
    count = max(1, min(tiles, programs // max(1, -(-rows // tile.rows))))
    width = max(1, -(-tiles // count)) * tile.columns
    return -(-columns // width), width
