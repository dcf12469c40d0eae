"""Shared fixtures: determinism, offline hub, stock PEFT for comparison."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():  # before triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import hira

# models here are tiny: a second thread gains nothing, and waits long for its core where another process has it
torch.set_num_threads(1)

hypothesis.settings.register_profile("hira", deadline=None, derandomize=True, max_examples=30)
hypothesis.settings.load_profile("hira")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    """Every test starts and leaves with hira registered."""
    hira.register()
    yield
    hira.register()


@contextmanager
def stock_peft() -> Iterator[None]:
    """PEFT with its own HiRA, for comparisons in one process."""
    hira.unregister()
    try:
        yield
    finally:
        hira.register()


def error(value: Tensor, exact: Tensor) -> float:
    """The root mean square of value - exact, relative to that of exact."""
    value, exact = value.detach().double(), exact.detach().double()
    return float((value - exact).norm() / exact.norm())


def kept_for_backward(run: Callable[[], Tensor]) -> dict[int, int]:
    """What autograd keeps of a forward: for each storage, by its address, its bytes."""
    storages: dict[int, int] = {}
    kept = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        names = tensor.__tensor_flatten__()[0] if is_traceable_wrapper_subclass(tensor) else []
        for part in [getattr(tensor, name) for name in names] or [tensor]:
            storages[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return storages


def address(tensor: Tensor) -> int:
    """The address of a tensor's storage, as `kept_for_backward` has it."""
    return tensor.untyped_storage().data_ptr()
