"""The output of a layer whose base layer does more than multiply: the base layer's own call, with W' for its weight.

A base layer does more if it is another tuner's layer, has hooks or a forward of its own, multiplies quantised numbers,
or gathers its weight from other processes. `HiraLayer` asks `is_plain` once for each call, and comes here if the answer
is no.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hira.base_weights import offloaded
from hira.base_weights.dense import Storage
from hira.distributed import tensor_parallel
from hira.distributed.detection import is_gathered_by_call, is_laid_out_by_call, only_gathers
from hira.distributed.interception import Product, intercept
from hira.distributed.tensor_parallel import Layout, layout_of
from hira.errors import HiraError
from hira.layers import merging
from hira.layers.substitution import exclusive, substituted
from hira.ops.recompute import formed, recomputed

if TYPE_CHECKING:
    from hira.layers.base import HiraLayer


def is_plain(base: nn.Module, storage: Storage) -> bool:
    """Whether the call of a layer is the product with its weight, and nothing else happens in it.

    Args:
        base: the layer, or another tuner's layer around it.
        storage: how its weight is stored.
    """
    if type(base).forward not in storage.plain_forwards or not offloaded.is_own_forward(base):
        return False
    if is_laid_out_by_call(storage.layer, storage.name) and not torch.compiler.is_compiling():
        return False
    before_and_after = (base._forward_hooks, base._forward_pre_hooks, base._backward_hooks, base._backward_pre_hooks)
    return not any(before_and_after) or all(only_gathers(hook) for kind in before_and_after for hook in kind.values())


def output(layer: HiraLayer, x: Tensor, names: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
    """The layer's output under some adapters, computed in the base layer's own call.

    Args:
        layer: the layer.
        x, *args, **kwargs: the base layer's input.
        names: the adapters, at least one.
    """
    storage = layer.storage
    base_output = partial(layer._base_output, x, *args, **kwargs)
    compiling = torch.compiler.is_compiling()
    is_laid_out = is_laid_out_by_call(storage.layer, storage.name)
    one_product = _has_one_product(layer)
    if is_laid_out and one_product and not compiling:
        return _output_of_intercepted_call(layer, x, names, base_output)
    if not storage.takes_dense:
        return layer._with_updates(base_output(), x, names)
    dropped = layer._dropped(names)
    if dropped and one_product and offloaded.is_own_forward(storage.layer):
        # what is around the plain layer, hooks and another tuner's dropout, runs once
        if compiling:
            return layer._with_updates(base_output(), x, names)
        return _output_of_intercepted_call(layer, x, names, base_output)
    y = _call(layer, [name for name in names if name not in dropped], x, *args, **kwargs)
    for name in dropped:
        y = y + layer._dropped_change(name, x, *args, **kwargs)
    return y


@torch.compiler.disable  # type: ignore[untyped-decorator]
def output_beside_merged(layer: HiraLayer, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
    """The output under adapters of which some are merged, that of W0 with all of them; compiled, a graph break."""
    if not layer.others_merged:
        with merging.holding_W0(layer):
            return layer._adapted(x, names, *args, **kwargs)
    if layer.storage.takes_dense and not is_plain(layer.get_base_layer(), layer.storage):
        raise HiraError(
            f"Of {names} in {layer.name or 'a layer'}, which has a forward of its own, only {layer.merged_adapters} "
            "are merged, and so are adapters of another tuner. Merge all active adapters, or unmerge first."
        )
    y = layer._base_output(x, *args, **kwargs)
    with merging.holding_W0(layer):
        return layer._with_updates(y, x, [name for name in names if name not in layer.merged_adapters])


# W' in the place of the weight


def _call(layer: HiraLayer, names: Sequence[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The base layer's own call, in which it finds W' of some adapters in the place of its weight."""
    if not names:
        return layer._base_output(x, *args, **kwargs)
    storage = layer.storage
    with exclusive(storage.layer), ExitStack() as stack:
        if storage.is_computed_by_hook():
            # the weight to adapt is there once the layer's hooks have run, of which this is the last
            stack.enter_context(substituted(storage.layer, **{storage.name: storage.stored}))
            hook = partial(_substitute_computed, layer, layer._factors(names))
            stack.callback(storage.layer.register_forward_pre_hook(hook).remove)
        else:
            stack.enter_context(layer._substituted(names))
        y: Tensor = layer.base_layer(x, *args, **kwargs)
        return y


@contextmanager
def substituted_weight(layer: HiraLayer, names: Sequence[str]) -> Iterator[None]:
    """Have the base layer find W' of some adapters for its weight; autograd keeps W0, A and B of it."""
    storage = layer.storage
    W0 = storage.read()
    weight = formed(*layer._matrices(W0, *layer._factors(names)))
    stored = layer._stored_orientation(weight.weight.view(W0.shape))
    with substituted(storage.layer, **{storage.name: stored}), recomputed(weight):
        yield


def _substitute_computed(layer: HiraLayer, factors: tuple[Tensor, Tensor], base: nn.Module, args: Any) -> None:
    weight = layer._effective_weight(layer.storage.read(), *factors)
    base.__dict__[layer.storage.name] = layer._stored_orientation(weight)


def change(layer: HiraLayer, name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What an adapter changes of the base layer's output, both computed with the same random numbers."""
    with _random_numbers_again(x.device):
        adapted = _call(layer, [name], x, *args, **kwargs)
    return adapted - layer._base_output(x, *args, **kwargs)


def _random_numbers_again(device: torch.device) -> AbstractContextManager[None]:
    """A context behind which random numbers are those of its body again."""
    if torch.compiler.is_compiling():
        return nullcontext()
    if device.type == "cpu":
        return torch.random.fork_rng([])
    return torch.random.fork_rng([device], device_type=device.type)


# Another product in the base layer's call


def _has_one_product(layer: HiraLayer) -> bool:
    """Whether the base layer's own call computes one product with its weight, on x as it is."""
    base = layer.storage.layer
    return type(base).forward in layer.storage.plain_forwards and getattr(base, "padding_mode", "zeros") == "zeros"


def _output_of_intercepted_call(
    layer: HiraLayer, x: Tensor, names: Sequence[str], base_output: Callable[[], Tensor]
) -> Tensor:
    """The output of the base layer's call with the product with W' in the place of its own."""
    storage = layer.storage
    # before the call, which may take this process's own part of the weight
    layout = None if is_gathered_by_call(storage.layer) else layout_of(storage.stored)
    y, met = intercept(storage.layer, base_output, partial(_product_for, layer, names, layout))
    return y if met else layer._with_updates(y, x, names)


def _product_for(layer: HiraLayer, names: Sequence[str], layout: Layout | None, product: Product) -> Tensor:
    layout = layout_of(product.weight) or layout
    if layout is None:
        return layer._combined(product.x, names, product.compute)
    tensor_parallel.check_laid_out(product.x, product.weight)
    if product.weight.requires_grad or layer._dropped(names):
        raise HiraError(
            f"{layer.name or 'A layer'} has a base weight that trains, or hira_dropout, which HiRA does not serve "
            "under tensor parallelism: freeze the weight and set hira_dropout=0."
        )
    for name in names:
        if name not in layer.equal_on_all_processes:
            tensor_parallel.broadcast(layout, list(layer._parameters_of(name)))
            layer.equal_on_all_processes.add(name)
    return tensor_parallel.compute(product, layout, *layer._factors(names))
