"""Products with W' where each process holds a part of W0: its rows, its columns, or a part of the vocabulary.

A and B stay whole and equal on all processes, so a checkpoint needs no gathering. One factor belongs to the divided
dimension: a process uses a slice of it, and the gradients of the slices are gathered. The other factor is used whole,
and its gradients, each from a part of W0, are summed:

    rows of W0 divided        W'_k = W0_k * (1 + B_k A)        y_k of y
    columns of W0 divided     W'_k = W0_k * (1 + B A_k)        y = sum_k x_k W'_k^T
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hira import ops
from hira.distributed.detection import is_dtensor
from hira.distributed.interception import Product
from hira.errors import HiraError


class Layout(NamedTuple):
    """How a weight is divided over the processes of a mesh."""

    mesh: Any
    placement: Any  # Shard(0) or Shard(1)
    shape: torch.Size  # of the whole weight

    @property
    def dim(self) -> int:
        dim: int = self.placement.dim
        return dim


def layout_of(weight: Any) -> Layout | None:
    """The layout of a weight; None if it is no DTensor.

    Raises:
        HiraError: it is divided over a mesh of more than one dimension, or not by rows or columns.
    """
    if not is_dtensor(weight):
        return None
    from torch.distributed.tensor import Shard

    placement, *more = weight.placements
    if more or not isinstance(placement, Shard) or weight.dim() != 2:
        raise HiraError(
            f"A weight of shape {tuple(weight.shape)} is placed as {weight.placements}. HiRA serves linear and "
            "embedding layers whose weight is divided by rows or by columns over one dimension of a mesh; leave the "
            "module out with exclude_modules."
        )
    return Layout(weight.device_mesh, placement, weight.shape)


def check_laid_out(x: Any, weight: Any) -> None:
    """Raise a HiraError if one of x and weight is a DTensor and the other is not."""
    if is_dtensor(x) != is_dtensor(weight):
        raise HiraError(
            f"A layer with a weight of type {type(weight).__name__} was called with an input of type "
            f"{type(x).__name__}. Call the model, not a part of it that FSDP has not gathered or whose inputs no "
            "parallel style redistributes."
        )


def broadcast(layout: Layout, parameters: Iterable[Tensor]) -> None:
    """Copy parameters from the first process of the mesh to all others, in place."""
    group = layout.mesh.get_group()
    with torch.no_grad():
        for parameter in parameters:
            torch.distributed.broadcast(parameter, torch.distributed.get_global_rank(group, 0), group=group)


def linear(layout: Layout, A: Tensor, B: Tensor, lora_r: int, x: Any, weight: Any, bias: Any = None) -> Tensor:
    """y = x W'^T + bias for this process's part of W0.

    Args:
        layout: that of W0.
        A: (r + lora_r, in), A over L1, whole.
        B: (out, r + lora_r), B beside L2, whole.
        lora_r: the rank of LoRA in them.
        x: (..., in), a DTensor; or this process's part of it, where `weight` is a part too.
        weight: W0, a DTensor or this process's part of it.
        bias: a DTensor or a part, as `weight`; None where `weight` is a part and the columns of W0 are divided.

    Returns:
        (..., out) as a DTensor, divided by its last dimension or to be summed; this process's part where x is one.
    """
    from torch.distributed.tensor import Partial, Replicate, Shard

    by_rows, distributed = layout.dim == 0, is_dtensor(weight)
    if distributed:
        summed = [Partial()] if by_rows else None
        x = x.redistribute(placements=[Replicate() if by_rows else Shard(-1)]).to_local(grad_placements=summed)
    A_, B_ = (_shared(A, layout), _slice(B, layout, 0)) if by_rows else (_slice(A, layout, 1), _shared(B, layout))
    y = ops.linear(x, _local(weight), A_, B_, _local(bias) if by_rows else None, lora_r=lora_r)
    if not distributed:
        return y
    y = _whole(y, layout, Shard(-1) if by_rows else Partial(), layout.shape[0])
    return y if by_rows or bias is None else y + bias


def embedding(
    layout: Layout,
    A: Tensor,
    B: Tensor,
    lora_r: int,
    ids: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Look up rows of W' in this process's part of the table; ids outside it give zeros, to be summed.

    Args:
        layout: that of W0.
        A: (r + lora_r, num_embeddings), A over L1, whole.
        B: (dim, r + lora_r), B beside L2, whole.
        lora_r: the rank of LoRA in them.
        ids: integers, a DTensor.
        weight: W0, a DTensor.
        padding_idx, scale_grad_by_freq, sparse: those of `F.embedding`.
        max_norm, norm_type: those of `F.embedding`; `max_norm` is refused, since a process has a part of each norm.

    Returns:
        (*ids.shape, dim), a DTensor.

    Raises:
        HiraError: there is a `max_norm`.
    """
    from torch.distributed.tensor import Partial, Replicate, Shard

    if max_norm is not None or sparse:
        raise HiraError(
            f"An embedding has max_norm={max_norm} and sparse={sparse}, which HiRA does not serve under tensor "
            "parallelism; leave the module out with exclude_modules."
        )
    local = _local(weight)
    ids = ids.redistribute(placements=[Replicate()]).to_local()
    if layout.dim == 1:
        A_, B_ = _shared(A, layout), _slice(B, layout, 0)
        y = ops.embedding(ids, local, A_, B_, lora_r, padding_idx=padding_idx, scale_grad_by_freq=scale_grad_by_freq)
        return _whole(y, layout, Shard(-1), layout.shape[1])
    _, start = layout.placement.local_shard_size_and_offset(layout.shape[0], layout.mesh.size(), _rank(layout))
    here = (ids >= start) & (ids < start + len(local))
    if padding_idx is not None:
        padding_idx = padding_idx - start if start <= padding_idx < start + len(local) else None
    # ids from elsewhere look the first row up; their gradients are zeros
    A_, B_ = _slice(A, layout, 1), _shared(B, layout)
    y = ops.embedding((ids - start).where(here, 0), local, A_, B_, lora_r, padding_idx=padding_idx)
    return _whole(y.masked_fill(~here.unsqueeze(-1), 0), layout, Partial(), layout.shape[1])


def compute(product: Product, layout: Layout, A: Tensor, B: Tensor, lora_r: int) -> Tensor:
    """Compute the product with W' in the place of one with W0, from the arguments of the parallel style.

    Args:
        product: the base layer's product.
        layout: that of W0.
        A, B, lora_r: the factors, whole, and the rank of LoRA in them.

    Returns:
        The output, a DTensor where the base layer's is one.

    Raises:
        HiraError: the kind of layer, or an option of it, is not served.
    """
    function = _PRODUCTS.get(product.function)
    if function is None:
        raise HiraError(
            f"A weight is divided over processes in a layer that computes {product.function.__name__}; HiRA serves "
            "linear and embedding layers there. Leave the module out with exclude_modules."
        )
    return function(layout, A, B, lora_r, *product.args, **product.kwargs)


# by the functions that they replace
_PRODUCTS: dict[Any, Callable[..., Tensor]] = {F.linear: linear, F.embedding: embedding}


def _rank(layout: Layout) -> int:
    rank: int = layout.mesh.get_local_rank()
    return rank


def _local(tensor: Any) -> Any:
    return tensor.to_local() if is_dtensor(tensor) else tensor


def _shared(factor: Tensor, layout: Layout) -> Tensor:
    """A factor used whole, whose gradient is the sum over processes."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    whole: Any = DTensor.from_local(factor, layout.mesh, [Replicate()], run_check=False)
    local: Tensor = whole.to_local(grad_placements=[Partial()])
    return local


def _slice(factor: Tensor, layout: Layout, dim: int) -> Tensor:
    """This process's slice of a factor, whose gradient is that of all slices."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    whole: Any = DTensor.from_local(factor, layout.mesh, [Replicate()], run_check=False)
    local: Tensor = whole.redistribute(placements=[Shard(dim)]).to_local()
    return local


def _whole(y: Tensor, layout: Layout, placement: Any, size: int) -> Tensor:
    """y of all processes, of which the last dimension is of some size in all."""
    from torch.distributed.tensor import DTensor

    shape = torch.Size((*y.shape[:-1], size))
    stride = torch.empty(shape, device="meta").stride()
    whole: Tensor = DTensor.from_local(y, layout.mesh, [placement], run_check=False, shape=shape, stride=stride)
    return whole
