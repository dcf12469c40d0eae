"""Restores the structure of a model when a change to it fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from hira.base_weights import offloaded


@contextmanager
def unchanged_on_error(model: nn.Module, only_if: Callable[[nn.Module], object] = lambda model: True) -> Iterator[None]:
    """Undo what the body did to a model's structure if the body raises.

    Every module gets back its modules, parameters, buffers and other attributes, the contents of those that are dicts,
    lists or sets, and the attributes of accelerate's hooks on it; parameters get back whether they require gradients.
    The values of tensors are not restored, so the body has to check before it writes any.

    Args:
        model: the model.
        only_if: called with the model after an error; where its result is false, nothing is undone.
    """
    containers = [(container, _items(container)) for container in _containers(model)]
    requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        if only_if(model):
            for container, content in containers:
                if not _same(_items(container), content):
                    container.clear()
                    restore = container.extend if isinstance(container, list) else container.update
                    restore(content if isinstance(container, dict) else [item for item, _ in content])
            for parameter, flag in requires_grad:
                parameter.requires_grad_(flag)
        raise


def _items(container: Any) -> list[tuple[Any, Any]]:
    """Keys and values of a dict, a list or a set. `dict.__getitem__` is used because ZeRO-3 gathers what is read."""
    if isinstance(container, dict):
        return [(key, dict.__getitem__(container, key)) for key in container]
    return [(item, item) for item in container]


def _same(now: list[tuple[Any, Any]], before: list[tuple[Any, Any]]) -> bool:
    """Whether items are the same objects in the same order."""
    return [(id(key), id(value)) for key, value in now] == [(id(key), id(value)) for key, value in before]


def _containers(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        yield module.__dict__
        yield from (hook.__dict__ for hook in offloaded.hooks(module))
        yield from (value for value in module.__dict__.values() if isinstance(value, dict | list | set))
