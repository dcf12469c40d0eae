"""Tokens with an adapter each: W0 is read once for all of them, and no W' is formed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hira.ops import heuristics
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
    if heuristics.decodes(x) and not torch.is_grad_enabled():
        from hira.ops import triton

        r = max(A.shape[0] for A, _ in adapters)
        As = torch.stack([F.pad(A, (0, 0, 0, r - A.shape[0])) for A, _ in adapters])
        Bs = torch.stack([F.pad(B, (0, r - B.shape[1])) for _, B in adapters])
        return triton.decode(x.to(dtype), W0, As, Bs, torch.arange(len(x), device=x.device), bias)
    exact = formation_dtype(W0.dtype)
    with no_autocast(x.device):
        rows = [torch.cat([t.unsqueeze(0), A.to(exact) * t]) for t, (A, _) in zip(x.to(exact), adapters, strict=True)]
        products = torch.mm(W0.to(dtype), torch.cat(rows).to(dtype).t())  # (out, sum of r_t + 1)
        parts = torch.split(products.to(exact), [len(part) for part in rows], dim=1)
        y = torch.stack([p[:, 0] + (p[:, 1:] * B.to(exact)).sum(1) for p, (_, B) in zip(parts, adapters, strict=True)])
        return (y if bias is None else y + bias.to(exact)).to(dtype)
