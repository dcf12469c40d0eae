"""An adapter for each row of a model's batch: the names reach every layer, in generate() with repeated rows too."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from hira.errors import HiraError
from hira.layers.base import HiraLayer
from hira.layers.conv import ConvNd
from hira.layers.mixed_batch import adapters_of_rows

_EXPAND = "_expand_inputs_for_generation"
# for the model's call in this context: the names of adapters, by the number of rows
_rows_of_call: ContextVar[dict[int, list[str]] | None] = ContextVar("rows_of_call", default=None)
_lock = threading.Lock()


@contextmanager
def passing(tuner: Any, adapter_names: Sequence[str]) -> Iterator[None]:
    """Pass an adapter's name for each row to every HiRA layer, and to each copy of a module that adapters train.

    Args:
        tuner: the HiraModel.
        adapter_names: the names, in the order of the rows.
    """
    by_rows = {len(adapter_names): list(adapter_names)}
    pass_names = partial(_pass_adapter_names, by_rows=by_rows)
    layers = [module for module in tuner.modules() if isinstance(module, HiraLayer | AuxiliaryTrainingWrapper)]
    handles = [layer.register_forward_pre_hook(pass_names, with_kwargs=True) for layer in layers]
    token, token_of_rows = adapters_of_rows.set(list(adapter_names)), _rows_of_call.set(by_rows)
    try:
        with _names_repeated_by_generate(tuner.model):
            yield
    finally:
        adapters_of_rows.reset(token)
        _rows_of_call.reset(token_of_rows)
        for handle in handles:
            handle.remove()


def check_rows_can_differ(layers: Sequence[HiraLayer], adapter_names: Sequence[str]) -> None:
    """Refuse a mixed batch where the model multiplies by a layer's weight itself, one weight for all rows."""
    for layer in layers:
        active = layer._present(layer.active_adapters)
        wanted = {tuple(layer._present([name])) for name in adapter_names}
        if layer.weight_is_read and not isinstance(layer, ConvNd) and wanted != {tuple(active)}:
            raise HiraError(
                f"adapter_names asks for other adapters than the active {active}, but the model multiplies by the "
                f"weight of {layer.name} itself, which is one for all rows; set the adapter and pass no names."
            )


class _Expansion:
    """A model's `_expand_inputs_for_generation` while a thread runs generate() with `adapter_names`.

    Args:
        expand: the model's own method, which repeats each sample.
        before: the instance's own attribute; None where the method is the class's.
    """

    def __init__(self, expand: Callable[..., Any], before: Any) -> None:
        self.expand, self.before, self.calls = expand, before, 0

    def __call__(self, expand_size: int = 1, **kwargs: Any) -> Any:
        by_rows = _rows_of_call.get()
        if by_rows is not None:
            names = next(iter(by_rows.values()))
            by_rows[len(names) * expand_size] = [name for name in names for _ in range(expand_size)]
        return self.expand(expand_size=expand_size, **kwargs)


@contextmanager
def _names_repeated_by_generate(model: nn.Module) -> Iterator[None]:
    """Repeat the names of adapters where generate() repeats samples, for beams or several returned sequences."""
    model = getattr(model, "_orig_mod", model)
    expand = getattr(model, _EXPAND, None)
    if expand is None:
        yield
        return
    with _lock:
        expansion = vars(model).get(_EXPAND)
        if not isinstance(expansion, _Expansion):
            expansion = _Expansion(expand, expansion)
            setattr(model, _EXPAND, expansion)
        expansion.calls += 1
    try:
        yield
    finally:
        with _lock:
            expansion.calls -= 1
            if expansion.calls == 0 and expansion.before is None:
                delattr(model, _EXPAND)
            elif expansion.calls == 0:
                setattr(model, _EXPAND, expansion.before)


def _pass_adapter_names(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], by_rows: dict[int, list[str]]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pass a layer a name for each row: an encoder gets each sample once, a decoder the repeated samples."""
    of_call = _rows_of_call.get()
    if of_call is not None and of_call is not by_rows:  # this is another thread's hook
        return args, kwargs
    rows = next((len(value) for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim()), 0)
    return args, {**kwargs, "adapter_names": by_rows.get(rows, next(iter(by_rows.values())))}
