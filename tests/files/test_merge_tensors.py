"""Parts that two threads make ahead: their order, their memory, their errors, and PyTorch's threads in them."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from hira import HiraError
from hira.files.io.safetensors_file import entry_of
from hira.files.merge.tensors import Part, PlannedTensor, Workers
from hira.ops import heuristics


def part(number: int, delay: float = 0.0) -> Part:
    """Eight bytes, made in some seconds."""

    def make() -> memoryview:
        time.sleep(delay)
        return memoryview(bytes([number]) * 8)

    return Part(8, make)


def fails() -> memoryview:
    raise ValueError("the third")


def test_parts_keep_their_order_and_their_bytes_until_the_next():
    parts = [part(number, 0.002 * (number % 3)) for number in range(40)]
    with Workers() as workers:
        found = []
        for data in workers.results(parts):
            time.sleep(0.001)  # time enough for the threads to go on, if they did
            found.append(bytes(data))
    assert found == [bytes([number]) * 8 for number in range(40)]


def test_two_threads_make_them():
    seen = []
    with Workers() as workers:
        list(workers.results([Part(0, lambda: seen.append(threading.get_ident()) or memoryview(b""))] * 6))
    assert len(set(seen)) == 2 and threading.get_ident() not in seen


def test_an_error_arrives_at_its_part():
    with Workers() as workers:
        made = workers.results([part(1), part(2), Part(8, fails), part(4)])
        assert [bytes(next(made))[0], bytes(next(made))[0]] == [1, 2]
        with pytest.raises(ValueError, match="the third"):
            next(made)


def test_a_tensor_is_made_whole():
    parts = [part(number, 0.002 * (number % 3)) for number in range(40)]
    planned = PlannedTensor(entry_of("x", torch.uint8, (40, 8)), lambda: iter(parts))
    with Workers() as workers:
        made = workers.whole(planned)
        assert torch.equal(made, torch.arange(40, dtype=torch.uint8)[:, None].expand(40, 8))
        with pytest.raises(ValueError, match="the third"):
            workers.whole(planned._replace(parts=lambda: iter([part(1), part(2), Part(8, fails)])))
        for count in (39, 41):
            with pytest.raises((HiraError, ValueError)):
                workers.whole(planned._replace(parts=lambda count=count: iter([part(1)] * count)))
        assert workers.whole(PlannedTensor(entry_of("x", torch.float32, (0, 3)), lambda: iter([]))).shape == (0, 3)
        assert workers.whole(planned._replace(entry=entry_of("x", torch.int64, ()), parts=lambda: iter([part(0)]))) == 0


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
        assert [bytes(data) for data in workers.results([Part(2, counted)] * 6)] == [bytes([2, 1])] * 6
    assert torch.get_num_threads() == 2
