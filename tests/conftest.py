"""What holds for every test: determinism, no hub, one thread, hira registered."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():  # before triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

import hira

# models here are tiny: a second thread gains nothing, and waits long for its core where another process has it
torch.set_num_threads(1)

# a shell has its background jobs ignore interrupts, and so would the processes that tests interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)

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
