"""Rounding with a fixed dither: what it leaves alone, where it goes, that it is unbiased, and one everywhere."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hira.ops import conv, effective_weight, heuristics, linear, modulated_weight
from hira.ops.dither import hashes, noise_of, round_into

LOW = [torch.bfloat16, torch.float16]


def rounded(exact, dtype):
    noise = noise_of(exact)
    return round_into(torch.empty_like(exact, dtype=dtype), exact.clone(), noise.rows, noise.columns)


def neighbours(exact, dtype):
    """The numbers of dtype at or below and at or above."""
    nearest = exact.to(dtype)
    up = torch.nextafter(nearest, torch.full_like(nearest, float("inf")))
    down = torch.nextafter(nearest, torch.full_like(nearest, float("-inf")))
    below = torch.where(nearest.double() <= exact.double(), nearest, down)
    above = torch.where(nearest.double() >= exact.double(), nearest, up)
    return below, above


@pytest.mark.parametrize("dtype", LOW)
def test_to_one_of_the_two_neighbours(dtype):
    exact = torch.randn(200, 300) * torch.randn(200, 300).exp()
    below, above = neighbours(exact, dtype)
    found = rounded(exact, dtype)
    assert ((found == below) | (found == above)).all()
    assert 0.1 < (found != exact.to(dtype)).double().mean() < 0.4


@pytest.mark.parametrize("dtype", LOW)
def test_what_the_dtype_has_stays(dtype):
    """So a new adapter, with BA = 0, changes nothing."""
    W0 = (torch.randn(100, 130) * 10 ** torch.empty(100, 130).uniform_(-6, 3)).to(dtype)
    assert torch.equal(rounded(W0.float(), dtype), W0)
    A, B = torch.randn(3, 130), torch.zeros(100, 3)
    assert torch.equal(modulated_weight(W0, A, B), W0)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("transposed", [False, True])
def test_special_numbers(dtype, transposed):
    specials = [
        0.0,
        -0.0,
        1e-45,
        -1e-42,
        1e-38,
        6e-8,
        -3e-5,
        float("inf"),
        float("-inf"),
        float("nan"),
        3.4e38,
        65519.0,
    ]
    exact = torch.tensor(specials).repeat(40, 1)
    exact[:, 9] = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # a GPU's NaN: all ones
    found = rounded(exact.t() if transposed else exact, dtype)
    found = found.t() if transposed else found
    assert found[:, :7].isfinite().all()
    for column in (0, 1, 2, 3, 7, 8):
        assert torch.equal(found[:, column], exact[:, column].to(dtype))
    assert found[:, 9].isnan().all()
    assert torch.equal(torch.signbit(found[:, 1]), torch.ones(40, dtype=torch.bool))
    assert not found.isnan()[:, [10, 11]].any()


@pytest.mark.parametrize("on_cpu", [True, False])
def test_one_special_number_among_others(on_cpu, monkeypatch):
    """Bfloat16 chunks are rounded first and looked at then; every number whose look could deceive is tried alone.

    A device, whose numbers are not looked at, computes which of them take noise.
    """
    monkeypatch.setattr(heuristics, "on_cpu", lambda device: on_cpu)
    edges = [0, 1, 0x7FFF, 0x8000, 0x7F_FFFF, 0x80_0000, 0x80_7FFF, 0x80_8000, 0x81_0000]
    edges += [0x7F7E_8000, 0x7F7F_0000, 0x7F7F_0001, 0x7F7F_FFFF, 0x7F80_0000, 0x7F80_0001, 0x7FC0_0000, 0x7FFF_FFFF]
    noise = torch.tensor([-(2**15) + 1, -1, 1, 2**15 - 1], dtype=torch.int16)
    one, tiny, largest = torch.ones(1, 1), torch.finfo(torch.bfloat16).tiny, torch.finfo(torch.bfloat16).max
    for edge in edges:
        for sign in (0, -(2**31)):
            exact = torch.full((4, 8), 0.3)
            exact.view(torch.int32)[:, 5] = edge | sign
            found = round_into(
                torch.empty(4, 8, dtype=torch.bfloat16), exact.clone(), noise, one.short().expand(1, 8)[0]
            )
            moved = (exact.view(torch.int32) + noise[:, None]).view(torch.float32)
            ordinary = (exact.abs() >= tiny) & (exact.abs() <= largest)
            wanted = torch.where(ordinary, moved, exact).bfloat16()
            assert torch.equal(found.view(torch.int16), wanted.view(torch.int16)), hex(edge)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("size", [1e-3, 1e-4])
def test_the_update_is_kept_on_average(dtype, size):
    """Rounding to nearest loses most of it where BA is small beside the spacing of numbers."""
    W0 = torch.randn(600, 500).to(dtype)
    BA = size * torch.randn(600, 500)
    update = W0.double() * BA
    exact = (W0.double() + update).float()

    def share(weight):
        return float(((weight.double() - W0.double()) * update).sum() / update.square().sum())

    # over N entries the share's standard deviation is that of a rounding, at most half a unit, beside the update's size
    unit = torch.finfo(dtype).eps
    deviation = unit / 2 / size / (600 * 500) ** 0.5
    assert abs(share(rounded(exact, dtype)) - 1) < 4 * deviation
    if size < unit / 8:
        assert share(exact.to(dtype)) < 0.5


def test_noise_is_uniform_and_uncorrelated():
    noise = noise_of(torch.empty(512, 512))
    values = (noise.rows[:, None] * noise.columns).double() / 2**15
    n = values.numel()
    assert (noise.rows % 2 == 1).all() and (noise.columns % 2 == 1).all()
    assert abs(values.mean()) < 4 * 3**-0.5 / 512  # rows share their columns' hashes: 512 of them count
    assert abs(values.std() - 3**-0.5) < 0.01
    counts = torch.histc(values, 16, -1, 1) * 16 / n
    assert (counts - 1).abs().max() < 0.05
    for shifted in (values.roll(1, 0), values.roll(1, 1), values.roll((1, 1), (0, 1)), values.t()):
        assert abs((values * shifted).mean()) * 3 < 0.02


def test_the_hashes_are_fixed():
    """Merged checkpoints of different machines and versions agree only if these never change."""
    assert hashes(torch.arange(6), 0).tolist() == [-32767, 4289, -24191, 27101, -8495, 21823]
    assert hashes(torch.arange(6), 0x9E3779B9).tolist() == [25939, -10699, -12593, 2871, 20253, 12679]


def test_a_longer_weight_has_the_same_beginning():
    small, large = noise_of(torch.empty(10, 20)), noise_of(torch.empty(3000, 4000))
    assert torch.equal(small.rows, large.rows[:10])
    assert torch.equal(small.columns, large.columns[:20])


def test_traced_tensors_leave_no_hashes_behind():
    from hira.ops import dither

    before = dict(dither._vectors)
    with FakeTensorMode():
        assert noise_of(torch.empty(100_000, 3)).rows.shape == (100_000,)
    assert dither._vectors == before


# ---- one W' everywhere


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("transposed", [False, True])
def test_whatever_the_blocks_and_the_layout(dtype, transposed, monkeypatch):
    W0 = torch.randn(40, 60).to(dtype)
    A, B = torch.randint(-4, 5, (3, 60)) / 64, torch.randint(-4, 5, (40, 3)) / 8  # exact in any order
    whole = modulated_weight(W0, A, B)
    assert not torch.equal(whole, effective_weight.form(W0.float(), A, B, 0, torch.float32).to(dtype))
    monkeypatch.setattr(heuristics, "CPU_BLOCK_ENTRIES", 70)
    monkeypatch.setattr(heuristics, "CPU_CHUNK_ENTRIES", 30)
    W0 = W0.t().contiguous().t() if transposed else W0
    assert torch.equal(modulated_weight(W0, A, B), whole)


def test_the_forward_multiplies_by_the_merged_weight():
    W0 = torch.randn(40, 60).bfloat16()
    A, B = torch.randn(3, 60), torch.randn(40, 3) / 10
    eye = torch.eye(60).bfloat16()
    merged = modulated_weight(W0, A, B)
    assert torch.equal(linear(eye, W0, A, B).t(), merged)
    x = torch.zeros(60, 60, requires_grad=True, dtype=torch.bfloat16)
    linear(x, W0, A, B).backward(torch.eye(40).bfloat16().repeat(2, 1)[:60])
    torch.testing.assert_close(x.grad[:40], merged, rtol=0, atol=0)


def test_a_pointwise_convolution_is_the_linear_layer():
    W0, A, B = torch.randn(8, 6).bfloat16(), torch.randn(2, 6), torch.randn(8, 2)
    x = torch.randn(5, 6).bfloat16()
    options = {"stride": (1,), "padding": (0,), "dilation": (1,), "groups": 1}
    y = conv(torch.eye(6).bfloat16().unsqueeze(-1), W0[..., None], A[..., None], B[..., None], **options)
    assert torch.equal(y.squeeze(-1).t(), modulated_weight(W0, A, B))
    assert linear(x, W0, A, B).dtype == torch.bfloat16


@pytest.mark.parametrize("stored", [torch.float32, torch.float64])
def test_a_weight_with_bits_to_spare_is_rounded_to_nearest(stored):
    """Under autocast: the bits of W0 below the product's dtype spread the rounding already."""
    W0, A, B = torch.randn(30, 40, dtype=stored), torch.randn(3, 40), torch.randn(30, 3)
    exact = effective_weight.form(W0, A, B, 0, stored)
    assert torch.equal(effective_weight.form(W0, A, B, 0, torch.bfloat16), exact.to(torch.bfloat16))


def test_the_update_alone_is_rounded_to_nearest():
    W0, A, B = torch.randn(30, 40).bfloat16(), torch.randn(3, 40), torch.randn(30, 3)
    exact = effective_weight.form(W0.float(), A, B, 0, torch.float32, update_only=True)
    assert torch.equal(effective_weight.form(W0, A, B, 0, torch.bfloat16, update_only=True), exact.bfloat16())
