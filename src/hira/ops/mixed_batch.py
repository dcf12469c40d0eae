"""Tokens with an adapter each: W0 is read once for all of them, and no W' is formed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hira.ops.effective_weight import no_autocast, product_dtype, split
from hira.ops.workspace import formation_dtype


def linear_each(
    x: Tensor, W0: Tensor, adapters: Sequence[tuple[Tensor, Tensor, int]], bias: Tensor | None = None
) -> Tensor:
    """Apply a weight to tokens, each adapted by factors of its own, as one dense product.

    Equation: ``y_t = (W0 * (1 + B A) + L2 L1) x_t + bias = W0 x_t + sum_k B[:, k] * (W0 (A[k] * x_t)) + L2 (L1 x_t) +
    bias``, with the factors of token t.

    Args:
        x: (T, in).
        W0: (out, in).
        adapters: for each of the T tokens, A (r + lora_r, in), B (out, r + lora_r) and lora_r, as for `linear`, with
            ranks of its own.
        bias: (out,) or None.

    Returns:
        (T, out), in the dtype that ``F.linear(x, W0)`` gives, autocast included.

    Cost: 2 m n sum_t (r_t + 1) operations, which is what forming each W' would take, without its memory. Tracked by
    autograd as the plain operations are, so meant for inference. Temporaries: (in + out) sum_t (r_t + 1) numbers.

    Source: HiRA (ICLR 2025), equation 5, with the sum over the rank taken outside.
    """
    dtype = product_dtype(x, W0.dtype)
    exact = formation_dtype(W0.dtype)
    parts = [split(*adapter) for adapter in adapters]
    ranks = [A.shape[0] for A, *_ in parts]
    As, Bs = torch.cat([A for A, *_ in parts]), torch.cat([B for _, B, *_ in parts], 1)
    with no_autocast(x.device):
        owned = torch.cat([t.expand(r, -1) for t, r in zip(x.to(exact), ranks, strict=True)])
        factors = torch.cat([x.to(exact), As.to(exact) * owned]).to(dtype)
        products = torch.mm(W0.to(dtype), factors.t()).to(exact)  # (out, T + the sum of the ranks)
        base, updates = products[:, : len(x)], products[:, len(x) :] * Bs.to(exact)
        y = base.t() + torch.stack([part.sum(1) for part in torch.split(updates, ranks, dim=1)])
        for t, (*_, lora) in enumerate(parts):
            if lora is not None:
                y[t] += lora[1].to(exact) @ (lora[0].to(exact) @ x[t].to(exact))
        y = y if bias is None else y + bias.to(exact)
        return y.to(dtype)
