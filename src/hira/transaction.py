"""All or nothing: puts a model's modules back as they were when a change to them fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from hira import offload


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
    containers = [(container, container.copy()) for container in _containers(model)]
    requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        if only_if(model):
            for container, content in containers:
                if _same(container, content):
                    continue
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(content)
            for parameter, flag in requires_grad:
                parameter.requires_grad_(flag)
        raise


def _same(container: Any, content: Any) -> bool:
    """Whether the items of a container are those it had, in their order."""
    now, before = (list(c.items()) if isinstance(c, dict) else [(item,) for item in c] for c in (container, content))
    return len(now) == len(before) and all(
        new is old for items in zip(now, before, strict=True) for new, old in zip(*items, strict=True)
    )


def _containers(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        yield module.__dict__
        yield from (hook.__dict__ for hook in offload.hooks(module))
        yield from (value for value in module.__dict__.values() if isinstance(value, dict | list | set))
