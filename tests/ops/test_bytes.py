"""The bytes that a device moves for each entry of W0: by the kernels' own loads and stores, and by PyTorch's operators.

Of a kernel every load and store counts, lane by lane, each time that a tile is loaded; masked lanes do not. What is of
W0's size (W0, W', G) comes from memory. The tiles of A and B, which every tile of W0 needs, come from the cache, where
both factors have room: they are counted by themselves. Of an operator each tensor that it reads or writes counts once.
"""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from interpreted import DEVICE, randn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hira.ops import effective_weight, heuristics, linear, modulated_weight, workspace
from hira.ops import triton as kernels
from hira.ops.linear import linear_factor_gradients
from hira.ops.triton import arithmetic, decode, factor_gradients, form, tiles

interpreted_alone = pytest.mark.skipif(DEVICE == "cuda", reason="loads are counted in Triton's interpreter, on a CPU")
M, N, R, T = 512, 384, 32, 16
BF16 = torch.bfloat16


# ---- kernels


class Loads:
    """Counts bytes by kernel and argument: "form_kernel.W0"."""

    def __init__(self):
        self.bytes = Counter()
        self.arguments = {}

    def add(self, pointers, mask, at):
        width = pointers.get_element_ty().primitive_bitwidth // 8
        for name, (start, end) in self.arguments.items():
            inside = mask.data & (pointers.data >= start) & (pointers.data < end)
            self.bytes[name] += int(inside.sum()) * width
            at -= int(inside.sum())
        assert at == 0, "an access outside all arguments"

    def __getitem__(self, name):
        assert name in self.bytes, sorted(self.bytes)
        return self.bytes[name]


class Watched:
    """Stands in for a kernel: notes where its arguments lie before it runs."""

    def __init__(self, kernel, loads):
        self.kernel, self.loads = kernel, loads

    def __getitem__(self, grid):
        def launch(*args, **options):
            named = {**dict(zip(self.kernel.arg_names, args, strict=False)), **options}
            self.loads.arguments = {
                f"{self.kernel.fn.__name__}.{name}": (tensor.data_ptr(), tensor.data_ptr() + span(tensor))
                for name, tensor in named.items()
                if isinstance(tensor, Tensor)
            }
            return self.kernel[grid](*args, **options)

        return launch


def span(tensor):
    """The bytes from a tensor's first entry to behind its last."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (1 + reach) * tensor.element_size()


@pytest.fixture
def loads(monkeypatch):
    import sys

    from triton.runtime.interpreter import InterpreterBuilder

    found = Loads()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counted_load(self, pointers, mask, *rest):
        found.add(pointers, mask, int(mask.data.sum()))
        return load(self, pointers, mask, *rest)

    def counted_store(self, pointers, value, mask, *rest):
        found.add(pointers, mask, int(mask.data.sum()))
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counted_store)
    for module in (arithmetic, *(sys.modules[function.__module__] for function in (form, factor_gradients, decode))):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Watched(getattr(module, name), found))
    return found


def weights(m=M, n=N, r=R):
    return randn(m, n, dtype=BF16), randn(r, n), randn(m, r) / 100


def tiles_of(size, tile):
    return -(-size // tile)


@interpreted_alone
@pytest.mark.parametrize("shape", [(M, N), (130, 200)])  # whole tiles, and masked ones
def test_forming_by_the_kernel(shape, loads):
    m, n = shape
    W0, A, B = weights(m, n)
    noise = tuple(torch.ones(size, dtype=torch.int16) for size in shape)
    form(W0, A, B, BF16, noise=noise)
    assert loads["form_kernel.W0"] == loads["form_kernel.out"] == 2 * m * n
    hashes = loads["form_kernel.row_noise"] + loads["form_kernel.column_noise"]
    assert 2 * m * n + 2 * m * n + hashes <= 4.2 * m * n
    # the factors, from cache: each tile of the weight loads its own
    assert loads["form_kernel.A"] == 4 * R * n * tiles_of(m, tiles.FORM.rows)
    assert loads["form_kernel.B"] == 4 * R * m * tiles_of(n, tiles.FORM.columns)


@interpreted_alone
def test_a_weight_of_many_blocks_is_written_where_it_belongs(loads, monkeypatch):
    """No block is formed elsewhere and copied."""
    monkeypatch.setattr(heuristics, "on_cpu", lambda device: False)
    monkeypatch.setattr(heuristics, "triton", lambda tensor: True)
    monkeypatch.setattr(heuristics, "TRITON", "1")
    W0, A, B = weights(256, 128)
    expected = effective_weight.form(W0, A, B, 0, BF16)
    loads.bytes.clear()
    monkeypatch.setattr(heuristics, "DEVICE_BLOCK_ENTRIES", 64 * 128)
    written = []
    monkeypatch.setattr(kernels, "form", lambda *a, **k: written.append(k["out"].data_ptr()) or form(*a, **k))
    formed = effective_weight.form(W0, A, B, 0, BF16)
    assert torch.equal(formed, expected)
    assert loads["form_kernel.W0"] == loads["form_kernel.out"] == 2 * W0.numel()
    assert written == [formed[row].data_ptr() for row in range(0, 256, 64)]


@interpreted_alone
@pytest.mark.parametrize("spacious", [False, True])
def test_reducing_the_gradient_by_the_kernel(spacious, loads, monkeypatch):
    monkeypatch.setattr(tiles, "spacious", lambda tensor: spacious)
    W0, A, B = weights()
    tile = tiles.factor_gradients(W0)
    factor_gradients(randn(T, M, dtype=BF16), randn(T, N, dtype=BF16), W0, A, B)
    assert loads["factor_gradients_kernel.G"] == loads["factor_gradients_kernel.W0"] == 2 * M * N
    assert loads["factor_gradients_kernel.G"] + loads["factor_gradients_kernel.W0"] <= 4.2 * M * N
    strips, _ = tiles.strips(M, N, tile, tiles.FACTOR_GRADIENTS_PROGRAMS)
    rows = tiles_of(M, tile.rows)
    assert loads["factor_gradients_kernel.A"] == 4 * R * N * rows
    assert loads["factor_gradients_kernel.B"] == 4 * R * M * strips
    # parts of dA and dB, written, and read to be added: r / 16 bytes an entry with the tiles of a data centre's GPU
    assert loads["factor_gradients_kernel.dA"] == 4 * R * N * rows
    assert loads["factor_gradients_kernel.dB"] == 4 * R * M * strips
    assert loads["sum_kernel.parts"] == 4 * R * (N * rows + M * strips)


@interpreted_alone
def test_a_second_block_of_ranks_reads_the_gradient_again(loads):
    W0, A, B = weights(r=tiles.MOST_RANKS + 1)
    factor_gradients(randn(T, M, dtype=BF16), randn(T, N, dtype=BF16), W0, A, B)
    assert loads["factor_gradients_kernel.W0"] == 2 * 2 * M * N


@interpreted_alone
@pytest.mark.parametrize("tokens", [1, 16])
def test_decoding_reads_the_weight_once(tokens, loads):
    W0, A, B = weights()
    decode(randn(tokens, N, dtype=BF16), W0, A, B)
    assert loads["decode_kernel.W0"] == 2 * M * N
    strips, _ = tiles.strips(M, N, tiles.DECODE, tiles.DECODE_PROGRAMS)
    assert loads["decode_kernel.parts"] == loads["sum_kernel.parts"] == 4 * tokens * M * strips


@interpreted_alone
def test_the_count_sees_a_second_reading(loads):
    W0, A, B = weights(64, 64)
    form(W0, A, B, BF16)
    form(W0, A, B, BF16)
    assert loads["form_kernel.W0"] == 2 * (2 * 64 * 64)


# ---- PyTorch's operators, as a device gets them


@pytest.fixture
def device_path(monkeypatch):
    """The ways of a device, on CPU tensors, without kernels."""
    monkeypatch.setattr(heuristics, "on_cpu", lambda device: False)
    monkeypatch.setattr(heuristics, "triton", lambda tensor: False)


class Operands(TorchDispatchMode):
    """Adds up the bytes of each operator's operands and results, views excepted, by the operator's name."""

    def __init__(self):
        super().__init__()
        self.bytes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if name.startswith(("empty", "new_empty")) or (func.is_view and not func._schema.is_mutable):
            return out
        read = {(t.data_ptr(), t.shape, t.stride(), t.dtype): t for t in tree_leaves((args, kwargs)) if is_tensor(t)}
        given = [kwargs["out"]] if kwargs and "out" in kwargs else []
        for t in given:  # which is written alone, unless it is an operand too
            if not any(same(t, operand) for operand in tree_leaves((args, {**kwargs, "out": None}))):
                read.pop((t.data_ptr(), t.shape, t.stride(), t.dtype), None)
        written = [t for t in tree_leaves(out) if is_tensor(t)]
        if name.startswith("new_"):
            read = {}
        if name == "copy_":
            read.pop((args[0].data_ptr(), args[0].shape, args[0].stride(), args[0].dtype), None)
        self.bytes[name] += sum(memory(t) for t in itertools.chain(read.values(), written))
        return out

    @property
    def total(self):
        return sum(self.bytes.values())


def is_tensor(value):
    return isinstance(value, Tensor)


def same(one, other):
    return is_tensor(other) and one.data_ptr() == other.data_ptr() and one.dtype == other.dtype


def memory(t):
    """The bytes of a tensor's distinct entries; of every second number of 16 bits, those between as well."""
    if 0 in t.shape:
        return 0
    sizes = [size for size, stride in zip(t.shape, t.stride(), strict=True) if stride]
    entries = 1
    for size in sizes:
        entries *= size
    return entries * t.element_size() * max(1, t.stride(-1) if t.dim() and t.stride(-1) == 2 else 1)


def per_entry(function, entries=M * N):
    function()  # the dither's hashes are made once
    with Operands() as operands:
        function()
    return operands.total / entries, dict(operands.bytes)


# Of a weight in bfloat16: BA is written, 4 bytes; it is read with W0, and W0 + W0 * BA written, 10, or rounded to
# nearest at once, 8. The dither then needs the noise (2), a look at the upper halves (6 + 3), the sum (4 + 2 + 1 + 4)
# and the rounding (4 + 2). Fewer take a kernel: PyTorch has no operator that adds and drops bits at once.
FORMING = {"nearest": 12, "dithered": 42, "update": 12, "float32": 14}


@pytest.mark.parametrize("how", FORMING)
@pytest.mark.parametrize("transposed", [False, True])
def test_forming_by_operators(how, transposed, device_path, monkeypatch):
    monkeypatch.setattr(heuristics, "DITHER", how in ("dithered", "update"))
    W0, A, B = weights()
    W0 = W0.t().contiguous().t() if transposed else W0
    product = torch.float32 if how == "float32" else BF16
    count, by = per_entry(
        lambda: effective_weight.form(W0, A, B, 0, product, update_only=how == "update"),
    )
    assert count - factors(1, 1) <= FORMING[how] + 0.05, by
    if how == "dithered":
        monkeypatch.undo()
        assert torch.equal(effective_weight.form(W0, A, B, 0, product), modulated_weight(W0, A, B))


def factors(of_A, of_B):
    """What reading A and B so many times adds for each entry of W0, in float32."""
    return 4 * R * (of_A / M + of_B / N)


def test_reducing_the_gradient_by_operators(device_path):
    """G is written by its product (2); G and W0 are read and their product written (8), which is read twice (8)."""
    W0, A, B = weights()
    dy, x = torch.ones(T, M, dtype=BF16), torch.ones(T, N, dtype=BF16)
    count, by = per_entry(lambda: linear_factor_gradients(dy, x, W0, A, B, 0, None))
    inputs = 2 * T * (1 / M + 1 / N)
    assert count - factors(2, 2) - inputs <= 2 + 16 + 0.05, by


def test_the_count_sees_a_further_operator(device_path):
    W0, A, B = weights()
    once, _ = per_entry(lambda: effective_weight.form(W0, A, B, 0, BF16))
    twice, _ = per_entry(lambda: effective_weight.form(W0, A, B, 0, BF16).add_(1))
    assert twice == once + 4


# ---- memory


@pytest.mark.parametrize("entries", [1 << 25, 1 << 12])  # the weight in one block, and in many
def test_kernels_leave_the_workspace_alone(entries, monkeypatch):
    """A block of W' is memory of the kernel's own, and no other is allocated."""
    monkeypatch.setattr(heuristics, "on_cpu", lambda device: False)
    monkeypatch.setattr(heuristics, "triton", lambda tensor: True)
    monkeypatch.setattr(heuristics, "TRITON", "1")
    monkeypatch.setattr(heuristics, "DEVICE_BLOCK_ENTRIES", entries)
    taken = []
    monkeypatch.setattr(workspace, "_fresh", lambda *args: taken.append(args))
    W0, A, B = weights(128, 96)
    x = randn(17, 96, dtype=BF16).requires_grad_()
    linear(x, W0, A.requires_grad_(), B.requires_grad_()).sum().backward()
    assert A.grad is not None
    assert not taken
