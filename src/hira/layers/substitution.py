"""A module's own call with other tensors in the place of its own."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn

from hira.base_weights import offloaded

_locks: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
_making_locks = threading.Lock()


@contextmanager
def exclusive(module: nn.Module) -> Iterator[None]:
    """Keep other threads from exchanging what a module holds, and from reading what was intercept, for a while.

    Args:
        module: the module. The thread that has it may ask for it again.
    """
    if torch.compiler.is_compiling():  # a trace runs nothing
        yield
        return
    with _making_locks:
        lock = _locks.setdefault(module, threading.RLock())
    with lock:
        yield


@contextmanager
def substituted(module: nn.Module, **values: Any) -> Iterator[None]:
    """Have a module find other values under the names of some attributes, such as those of its parameters or children.

    The module itself runs, with its hooks and with a forward that was set on the instance, so that what its forward
    assigns stays. One thread at a time runs a module like this; an error leaves nothing behind. Where accelerate has
    hooks that only move tensors around the module's forward, that forward runs without them, on the tensors that they
    would have fetched.

    Args:
        module: the module.
        **values: the values, by the names of the attributes.
    """
    with exclusive(module):
        if "forward" in module.__dict__ and offloaded.is_own_forward(module):
            absent = [
                name for name in module._parameters if name not in values and offloaded.is_offloaded(module, name)
            ]
            values |= {name: offloaded.load(module, name) for name in absent}
            values["forward"] = MethodType(type(module).forward, module)
        kind = type(module)
        computed = [name for name in values if isinstance(getattr(kind, name, None), property)]
        if computed:  # as under a parametrization; a class's property is found before anything on an instance
            module.__class__ = type(kind.__name__, (kind,), {name: _found_on_instance(name) for name in computed})
        # an entry here is found before those of _parameters and _modules
        own = module.__dict__
        before = {name: own[name] for name in values if name in own}
        own.update(values)
        try:
            yield
        finally:
            for name, value in values.items():
                if name in before:
                    own[name] = before[name]
                elif own.get(name) is value:  # if not, the forward assigned another
                    del own[name]
            if computed:
                module.__class__ = kind


def _found_on_instance(name: str) -> property:
    return property(lambda self: self.__dict__[name])
