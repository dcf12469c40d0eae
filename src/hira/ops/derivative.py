"""A guard for backward passes that have no derivative of their own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def first_derivative_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make the backward of an autograd function refuse to be differentiated, instead of counting as a constant.

    PyTorch's `once_differentiable` refuses only where the incoming gradient depends on something. A gradient penalty
    starts from a constant, and would silently miss what the gradient owes to the saved tensors.
    """

    @functools.wraps(backward)
    def guarded(ctx: Any, *gradients: Tensor | None) -> Any:
        with torch.no_grad():
            results = backward(ctx, *gradients)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return results
        sources = (*gradients, *ctx.saved_tensors)
        if not any(isinstance(source, Tensor) and source.requires_grad for source in sources):
            return results
        message = b"a HiRA layer has no second derivative: its gradients cannot be differentiated"
        refuse: Any = torch._C._functions.DelayedError(message, len(results))
        return refuse(*(None if r is None else r.detach().requires_grad_() for r in results))

    return guarded
