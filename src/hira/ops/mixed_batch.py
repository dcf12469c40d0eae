"""Tokens with an adapter each: W0 is read once for all of them, and no W' is formed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hira.ops.effective_weight import no_autocast, product_dtype
from hira.ops.workspace import formation_dtype


def linear_each(x: Tensor, W0: Tensor, adapters: Sequence[tuple[Tensor, Tensor]], bias: Tensor | None = None) -> Tensor:
    """Apply a weight to tokens, each adapted by factors of its own, as one dense product.

    Equation: ``y_t = (W0 * (1 + B_t A_t)) x_t + bias = W0 x_t + sum_k B_t[:, k] * (W0 (A_t[k] * x_t)) + bias``.

    Args:
        x: (T, in).
        W0: (out, in).
        adapters: for each of the T tokens, A (r, in) and B (out, r); ranks may differ.
        bias: (out,) or None.

    Returns:
        (T, out), in the dtype that ``F.linear(x, W0)`` gives, autocast included.

    Cost: 2 m n sum_t (r_t + 1) operations, which is what forming each W' would take, without its memory. Tracked by
    autograd as the plain operations are, so meant for inference. Temporaries: (in + out) sum_t (r_t + 1) numbers.

    Source: HiRA (ICLR 2025), equation 5, with the sum over the rank taken outside.
    """
    dtype = product_dtype(x, W0.dtype)
    exact = formation_dtype(W0.dtype)
    ranks = [A.shape[0] for A, _ in adapters]
    As, Bs = torch.cat([A for A, _ in adapters]), torch.cat([B for _, B in adapters], 1)
    with no_autocast(x.device):
        owned = torch.cat([t.expand(r, -1) for t, r in zip(x.to(exact), ranks, strict=True)])
        factors = torch.cat([x.to(exact), As.to(exact) * owned]).to(dtype)
        products = torch.mm(W0.to(dtype), factors.t()).to(exact)  # (out, T + the sum of the ranks)
        base, updates = products[:, : len(x)], products[:, len(x) :] * Bs.to(exact)
        y = base.t() + torch.stack([part.sum(1) for part in torch.split(updates, ranks, dim=1)])
        y = y if bias is None else y + bias.to(exact)
        return y.to(dtype)
