"""Measures of the adapters in a model, from a sample of the rows of each weight, cheap enough for training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hira.distributed.detection import sharded_by
from hira.errors import HiraError
from hira.layers.base import HiraLayer
from hira.ops.effective_weight import split
from hira.ops.measures import bfloat16_keeps, effective_rank, product_singular_values
from hira.ops.workspace import formation_dtype

# entries of a weight that are looked at, and rows at least: of a whole layer, and of each matrix of stacked ones
ENTRIES, ROWS, ROWS_OF_EACH = 1 << 19, 64, 8
# a matrix with this many times more rows than columns is an embedding's or an output layer's, with a row for each token
TALL = 8


class Measures(NamedTuple):
    """Measures of a layer's update, U = W0 * BA + L2 L1, with the active adapters as one.

    Args:
        relative_norm: ``||U|| / ||W0||``, Frobenius norms over the sampled rows.
        effective_rank: that of BA, ``exp(-sum_i p_i ln p_i)`` with ``p_i = s_i / sum_j s_j`` for its singular values s,
            between 1 and r; 0 while BA is zero. Of stacked experts, the mean.
        below_bfloat16: the share of the sampled entries with ``bfloat16(W0 + U) = bfloat16(W0)``, rounded to nearest.
    """

    relative_norm: float
    effective_rank: float
    below_bfloat16: float


@torch.no_grad()
def measure(layer: HiraLayer, names: Sequence[str]) -> Measures:
    """Measure the update of some adapters of a layer, acting as one.

    Cost: W0 is read, or dequantised, and of some `ENTRIES` of its entries a float32 copy and five temporaries like it
    are made. The effective rank is exact: QR of A and B in float64 on the CPU.
    """
    weight = update = 0.0
    kept = entries = 0
    ranks = []
    for W0, joined_A, joined_B, lora_r, rows in samples(layer, names):
        A, B, lora = split(joined_A, joined_B, lora_r)
        U = (B[rows] @ A).mul_(W0)
        if lora is not None:
            U.addmm_(lora[1][rows], lora[0])
        weight += float(torch.linalg.vector_norm(W0)) ** 2
        update += float(torch.linalg.vector_norm(U)) ** 2
        kept += int(bfloat16_keeps(W0, U).sum())
        entries += U.numel()
        ranks.append(effective_rank(product_singular_values(B.cpu(), A.cpu())))
    return Measures(
        relative_norm=math.sqrt(update / weight) if weight else 0.0,
        effective_rank=sum(ranks) / len(ranks),
        below_bfloat16=1 - kept / entries if entries else 1.0,
    )


@torch.no_grad()
def samples(layer: HiraLayer, names: Sequence[str]) -> Iterator[tuple[Tensor, Tensor, Tensor, int, Tensor]]:
    """Yield rows of each matrix that a layer adapts, the same ones at every call.

    Yields:
        W0[rows] (k, n), A (r + lora_r, n) and B (m, r + lora_r) as `ops.linear` takes them, in the dtype of formation,
        lora_r, and rows (k,).
    """
    matrices = layer.weight_matrices(names)
    for W0, A, B, lora_r in matrices:
        if W0.shape[0] > TALL * W0.shape[1]:  # what trains most is rows of their own, so all of them are looked at
            W0, A, B = W0.t(), B.t(), A.t()
        m, n = W0.shape
        count = max(ROWS, ENTRIES // max(n, 1)) // len(matrices)
        chosen = torch.randperm(m, generator=torch.Generator().manual_seed(0))[: max(count, ROWS_OF_EACH)]
        rows = chosen.sort().values.to(W0.device)
        dtype = formation_dtype(W0.dtype)
        yield W0[rows].to(dtype), A.to(dtype), B.to(dtype), lora_r, rows


def check_whole(layers: Sequence[HiraLayer]) -> None:
    """Raise a HiraError if weights of some layers are divided over processes, so that none of them can measure one."""
    for layer in layers:
        storage = layer.storage
        if by := sharded_by(storage.layer, storage.name):
            raise HiraError(
                f"The {storage.name} of {layer.name or type(storage.layer).__name__} is divided over processes by "
                f"{by}, and HiraCallback measures whole weights in one process. Leave the callback out, and look at "
                "saved checkpoints with `hira inspect`."
            )
