"""All or nothing: puts a model's modules back as they were when a change to them fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from hira.base_weights import offloaded


@contextmanager
def unchanged_on_error(model: nn.Module, only_if: Callable[[nn.Module], bool] = lambda model: True) -> Iterator[None]:
    """Undo what the body did to a model's structure if the body raises.

    What is put back: which modules, parameters and buffers every module has, its other attributes, the contents of
    those that are dicts, lists or sets, those of accelerate's hooks on it, and which parameters require gradients. The
    values of tensors are not: the body has to check before it writes any.

    Args:
        model: the model.
        only_if: asked with the model after an error; False leaves it as the body left it.
    """
    containers = [(container, _items(container)) for container in _containers(model)]
    requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        if only_if(model):
            for container, content in containers:
                if _same(_items(container), content):
                    continue
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(content)
            for parameter, flag in requires_grad:
                parameter.requires_grad_(flag)
        raise


def _items(container: Any) -> list[Any]:
    """What a dict, list or set contains, past the class of a dict: reading ZeRO-3's gathers parameters."""
    if isinstance(container, dict):
        return [(key, dict.__getitem__(container, key)) for key in container]
    return list(container)


def _same(now: list[Any], before: list[Any]) -> bool:
    """Whether the items of a container are those it had, in their order."""
    return len(now) == len(before) and all(_same_item(*items) for items in zip(now, before, strict=True))


def _same_item(new: Any, old: Any) -> bool:
    if isinstance(new, tuple) and isinstance(old, tuple) and len(new) == len(old) == 2:  # of a dict
        return new[0] is old[0] and new[1] is old[1]
    return new is old


def _containers(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        yield module.__dict__
        yield from (hook.__dict__ for hook in offloaded.hooks(module))
        yield from (value for value in module.__dict__.values() if isinstance(value, dict | list | set))
