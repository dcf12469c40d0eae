"""Parts that two threads make ahead: their order, their memory, their errors, and PyTorch's threads in them."""

from __future__ import annotations

import threading
import time
from functools import partial

import pytest
import torch

from hira.files.merge.tensors import Workers
from hira.ops import heuristics


def part(number: int, delay: float = 0.0) -> memoryview:
    """Some bytes, after some seconds."""
    time.sleep(delay)
    return memoryview(bytes([number]) * 8)


def test_parts_keep_their_order_and_their_bytes_until_the_next():
    parts = [partial(part, number, 0.002 * (number % 3)) for number in range(40)]
    with Workers() as workers:
        found = []
        for data in workers.results(parts):
            time.sleep(0.001)  # time enough for the threads to go on, if they did
            found.append(bytes(data))
    assert found == [bytes([number]) * 8 for number in range(40)]


def test_two_threads_make_them():
    seen = []
    with Workers() as workers:
        list(workers.results([lambda: seen.append(threading.get_ident()) or memoryview(b"")] * 6))
    assert len(set(seen)) == 2 and threading.get_ident() not in seen


def test_an_error_arrives_at_its_part():
    def fails() -> memoryview:
        raise ValueError("the third")

    with Workers() as workers:
        made = workers.results([partial(part, 1), partial(part, 2), fails, partial(part, 4)])
        assert [bytes(next(made))[0], bytes(next(made))[0]] == [1, 2]
        with pytest.raises(ValueError, match="the third"):
            next(made)


def test_no_parts():
    with Workers() as workers:
        assert list(workers.results([])) == []


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_products_get_the_callers_number_of_threads(two_threads):
    """A thread that begins while another computes alone must not stay alone: products may round otherwise."""

    def counted() -> memoryview:
        count = torch.get_num_threads()
        with heuristics.one_thread():
            return memoryview(bytes([count, torch.get_num_threads()]))

    with Workers() as workers, heuristics.one_thread():
        assert [bytes(data) for data in workers.results([counted] * 6)] == [bytes([2, 1])] * 6
    assert torch.get_num_threads() == 2
