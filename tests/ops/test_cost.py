"""The cost laws: operations of a training step, what is kept for backward, and how large temporaries get."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from hira.ops import conv, effective_weight, embedding, heuristics, linear

T, M, N, R = 48, 40, 56, 3
CASES = ["float32", "bfloat16", "float64", "autocast", "dequantize"]


@pytest.fixture(autouse=True, params=["cpu", "device"])
def path(request, monkeypatch):
    """The laws hold where a CPU's ways are taken, and a device's."""
    monkeypatch.setattr(heuristics, "on_cpu", lambda device: request.param == "cpu")
    return request.param


def set_block(monkeypatch, entries):
    for name in ("CPU_BLOCK_ENTRIES", "DEVICE_BLOCK_ENTRIES"):
        monkeypatch.setattr(heuristics, name, entries)


def case(name, t=T, m=M, n=N, r=R):
    """x, weight, A, B, and a function of them for one kind of base."""
    dtype = {"bfloat16": torch.bfloat16, "float64": torch.float64}.get(name, torch.float32)
    x = torch.randn(t, n, dtype=dtype, requires_grad=True)
    A, B = torch.randn(r, n, requires_grad=True), torch.randn(m, r, requires_grad=True)
    if name == "dequantize":
        packed = torch.randint(-128, 127, (m, n), dtype=torch.int8)
        return [x, packed, A, B], partial(linear, dequantize=lambda q: q.float() / 64)
    if name == "autocast":
        return [x, torch.randn(m, n), A, B], autocast(linear)
    return [x, torch.randn(m, n, dtype=dtype), A, B], linear


def autocast(function):
    def within(*a, **k):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return function(*a, **k)

    return within


def operations(function, *tensors):
    """Multiplications and additions of a step. The counter by itself would not see products added in place."""

    def in_place(_, a, b, **__):  # shapes
        return 2 * a[0] * a[1] * b[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        function(*tensors).sum().backward()
    return counter.get_total_flops()


def kept(function, *tensors):
    """What autograd keeps of a forward: each storage once, with its bytes."""
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        y = function(*tensors)
    return y, storages


def memory(function, path):
    """The result of a function, the most bytes it had allocated at once, and the bytes that its result holds."""
    function()  # what is made once, on a first call, is no cost of a step
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    profiler.export_chrome_trace(str(path))
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    events.sort(key=lambda e: e["args"]["Ev Idx"])
    total, most = 0, 0
    for event in events:
        total += event["args"]["Bytes"]
        most = max(most, total)
    assert events
    return result, most, total


def storage(t):
    return t.untyped_storage().data_ptr()


# ---- operations


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("entries", [200, 1 << 22])
def test_a_step_costs_three_dense_products(name, entries, monkeypatch):
    """6 T m n for y, dx and G; forming BA twice, and the two reductions of G, make 8 r m n."""
    set_block(monkeypatch, entries)
    tensors, function = case(name)
    count = operations(function, *tensors)
    assert count == 6 * T * M * N + 8 * R * M * N
    assert count <= 6 * T * M * N + 10 * (R + 1) * M * N


def test_the_counter_sees_a_product_more():
    tensors, _ = case("float32")
    twice = operations(lambda x, W0, A, B: F.linear(x, W0) + linear(x, W0, A, B, update_only=True), *tensors)
    assert twice > 6 * T * M * N + 10 * (R + 1) * M * N


def test_frozen_factors_cost_no_gradient():
    (x, W0, A, B), _ = case("float32")
    assert operations(linear, x, W0, A.detach(), B.detach()) == 4 * T * M * N + 4 * R * M * N
    # x, the data of the model's first layer, needs none
    assert operations(linear, x.detach(), W0, A, B) == 4 * T * M * N + 6 * R * M * N


@pytest.mark.parametrize("k", [2, 5])
def test_several_adapters_cost_one_of_the_summed_rank(k):
    (x, W0, A, B), _ = case("float32")
    joined = operations(lambda x, W0, A, B: linear(x, W0, torch.cat([A] * k), torch.cat([B] * k, 1)), x, W0, A, B)
    single, _ = case("float32", r=k * R)
    assert joined == operations(linear, *single)
    # No product of the tokens is added.
    assert joined - operations(linear, x, W0, A, B) == 8 * (k - 1) * R * M * N


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_convolution_is_one_forward_and_two_backward(groups, dtype):
    options = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": groups}
    x = torch.randn(2, 4, 9, 9, dtype=dtype, requires_grad=True)
    W0 = torch.randn(8, 4 // groups, 3, 3, dtype=dtype)
    A, B = torch.randn(R, 4 // groups, 3, 3, requires_grad=True), torch.randn(8, R, 1, 1, requires_grad=True)
    once = operations(lambda x, w: F.conv2d(x, w, **options), x, W0.clone().requires_grad_())
    count = operations(lambda *t: conv(*t, **options), x, W0, A, B)
    assert count == once + 8 * R * W0.numel()


def test_a_convolution_leaves_out_what_needs_no_gradient():
    options = {"stride": (1,), "padding": (0,), "dilation": (1,), "groups": 1}
    x, W0 = torch.randn(2, 4, 9, requires_grad=True), torch.randn(8, 4, 3)
    A, B = torch.randn(R, 4, 3, requires_grad=True), torch.randn(8, R, 1, requires_grad=True)
    product = 2 * 2 * 7 * W0.numel()  # two samples, seven positions
    forming = 2 * R * W0.numel()
    frozen = operations(lambda *t: conv(*t, **options), x, W0, A.detach(), B.detach())
    assert frozen == 2 * product + 2 * forming
    first = operations(lambda *t: conv(*t, **options), x.detach(), W0, A, B)
    assert first == 2 * product + 2 * forming + 4 * R * W0.numel()


# ---- what is kept


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("update_only", [False, True])
def test_nothing_of_the_weights_size_is_kept_but_the_weight(name, update_only):
    tensors, function = case(name, t=2)
    x, weight = tensors[:2]
    y, storages = kept(lambda *a: function(*a, update_only=update_only), *tensors)
    others = {s: size for s, size in storages.items() if s not in map(storage, tensors)}
    assert storage(weight) in storages
    if name == "autocast":  # x in the dtype of the product, as F.linear keeps it
        assert list(others.values()) == [x.numel() * 2]
    else:
        assert not others
    y.sum().backward()
    assert tensors[2].grad is not None


@pytest.mark.parametrize("name", CASES)
def test_nothing_but_y_is_left_after_forward(name, tmp_path):
    """Memory, which also sees what is kept without autograd's knowledge."""
    tensors, function = case(name)
    y, _, left = memory(lambda: function(*tensors), tmp_path / "trace.json")
    x_of_product = tensors[0].numel() * 2 if name == "autocast" else 0
    assert left == y.untyped_storage().nbytes() + x_of_product


def test_the_hooks_and_the_profiler_see_a_kept_weight(tmp_path):
    (x, W0, A, B), _ = case("float32")

    def plain(x, W0, A, B):
        return F.linear(x, W0 * (1 + B @ A))

    _, storages = kept(plain, x, W0, A, B)
    assert sum(size >= W0.nbytes for s, size in storages.items() if s not in map(storage, (x, W0))) >= 1
    y, _, left = memory(lambda: plain(x, W0, A, B), tmp_path / "trace.json")
    assert left >= y.nbytes + W0.nbytes


def test_x_is_not_kept_for_frozen_factors():
    (x, W0, A, B), _ = case("float32")
    _, storages = kept(linear, x, W0, A.detach(), B.detach())
    assert set(storages) == {storage(t) for t in (W0, A, B)}


def test_a_convolution_keeps_its_arguments_alone(tmp_path):
    options = {"stride": (1,), "padding": (0,), "dilation": (1,), "groups": 1}
    x, W0 = torch.randn(2, 4, 9, requires_grad=True), torch.randn(8, 4, 3)
    A, B = torch.randn(R, 4, 3, requires_grad=True), torch.randn(8, R, 1, requires_grad=True)
    y, storages = kept(lambda *t: conv(*t, **options), x, W0, A, B)
    assert set(storages) == {storage(t) for t in (x, W0, A, B)}
    y, _, left = memory(lambda: conv(x, W0, A, B, **options), tmp_path / "trace.json")
    assert left == y.nbytes


# ---- temporaries


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", ["float32", "bfloat16", "float64", "autocast"])
def test_temporaries_are_a_block_and_not_the_weight(name, transposed, tmp_path, monkeypatch, path):
    t, m, n, r, entries = 4, 512, 640, 2, 1 << 13
    set_block(monkeypatch, entries)
    tensors, function = case(name, t, m, n, r)
    if transposed:
        tensors[1] = tensors[1].t().contiguous().t()
    x, _, A, B = tensors

    def step():
        y = function(*tensors)
        return y, torch.autograd.grad(y, [x, A, B], torch.ones_like(y))

    (y, (dx, dA, dB)), most, _ = memory(step, tmp_path / "trace.json")
    width = 8 if name == "float64" else 4
    outputs = 2 * y.nbytes + 2 * dx.nbytes + dA.nbytes + dB.nbytes  # y and dy; dx before and after a cast
    factors = r * (m + n) * width  # A and B in the dtype of formation
    # A block in the dtype of formation, one in that of the product, and one of W0 where its dtype is another; on a
    # device, which rounds no chunks, the dither's noise and which entries take it.
    bound = outputs + factors + (3 if path == "cpu" else 4) * entries * width
    assert most <= bound
    assert bound < m * n * width / 4


def test_forming_the_weight_takes_a_block_besides(tmp_path, monkeypatch, path):
    set_block(monkeypatch, 1 << 13)
    W0, A, B = torch.randn(512, 640, dtype=torch.bfloat16), torch.randn(2, 640), torch.randn(512, 2)
    formed, most, left = memory(lambda: effective_weight.modulated_weight(W0, A, B), tmp_path / "trace.json")
    assert left == formed.nbytes
    # W', the factors, and a block of BA, of W0 in float32, and of W'; on a device of noise as well.
    assert most <= formed.nbytes + 2 * (512 + 640) * 4 + (1 << 13) * (10 if path == "cpu" else 16)


# ---- embeddings


def table(rows, dim=16, dtype=torch.float32):
    W0 = torch.randn(rows, dim, dtype=dtype)
    return W0, torch.randn(R, rows, requires_grad=True), torch.randn(dim, R, requires_grad=True)


OPTIONS = [{}, {"padding_idx": 1, "scale_grad_by_freq": True}, {"max_norm": 1.0}, {"sparse": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_embedding_costs_its_rows(options, dtype):
    ids = torch.randint(50, (2, 10))
    counts, sizes = [], []
    for rows in (50, 100):
        W0, A, B = table(rows, dtype=dtype)
        counts.append(operations(lambda *t: embedding(ids, *t, **options), W0, A, B))
        y, storages = kept(lambda *t: embedding(ids, *t, **options), W0, A, B)
        assert storage(W0) not in storages
        assert storage(A) not in storages
        assert y.shape == (2, 10, 16)
        sizes.append(sum(storages.values()))
    assert counts[0] == counts[1] == 6 * R * 20 * 16
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_embedding_takes_the_memory_of_its_rows(options, tmp_path):
    ids = torch.randint(50, (2, 10))
    seen = []
    for rows in (50, 5000):
        W0, A, B = table(rows)
        _, most, left = memory(partial(embedding, ids, W0, A, B, **options), tmp_path / "trace.json")
        seen.append((most, left))
    assert seen[0] == seen[1]


def test_a_sparse_gradient_takes_the_memory_of_its_rows(tmp_path):
    ids = torch.randint(50, (2, 10))
    seen = []
    for rows in (50, 5000):
        W0, A, B = table(rows)

        def step(W0=W0, A=A, B=B):
            return torch.autograd.grad(embedding(ids, W0, A, B, sparse=True).sum(), [A, B])

        seen.append(memory(step, tmp_path / "trace.json")[1])
    assert seen[0] == seen[1]
