"""The kernel that forms W': one rounding, the dither's bits, every edge, stride and dtype."""

from __future__ import annotations

import pytest
import torch
from interpreted import DEVICE, DTYPES, far_apart, poisoned, randn
from oracle import assert_as_exact

from hira.errors import HiraError
from hira.ops import dither, reference
from hira.ops.triton import form

LOW = [torch.bfloat16, torch.float16]
# The largest relative error of one rounding to nearest.
ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def weights(out=37, into=63, r=3, dtype=torch.float32, adapter=torch.float32):
    return randn(out, into, dtype=dtype), randn(r, into, dtype=adapter) / r, randn(out, r, dtype=adapter) / 10


def grid(out, into, r=5):
    """Factors whose product is exact in float32 in any order: integers up to 4, times 2**-8."""
    A = torch.randint(-4, 5, (r, into)).to(DEVICE, torch.float32)
    B = torch.randint(-4, 5, (out, r)).to(DEVICE, torch.float32) / 256
    return A, B


def noise_vectors(out, into):
    return tuple((torch.randint(-(2**15), 2**15, (n,)) | 1).to(DEVICE, torch.int16) for n in (out, into))


def dithered(exact, rows, columns, dtype):
    """The dither by its definition, in 64-bit integers."""
    noise = (rows.long()[:, None] * columns.long() + 2**15) % 2**16 - 2**15
    if dtype == torch.float16:
        noise = torch.div(noise, 8, rounding_mode="floor") | 1
    limits = torch.finfo(dtype)
    touched = (exact.abs() >= limits.tiny) & (exact.abs() <= limits.max)
    bits = exact.view(torch.int32).long() + torch.where(touched, noise, 0)
    return bits.to(torch.int32).view(torch.float32).to(dtype)


def special(out, into):
    """A weight with zeros, subnormal numbers, infinities, NaN, and the edges of the half precisions."""
    W0 = torch.randn(out, into).flatten()
    edges = [0.0, -0.0, 1e-40, -3e-39, 2.0**-126, 2.0**-127, 3e38, 3.39e38, 3.4e38, float("inf"), float("nan")]
    edges += [-float("inf"), 65504.0, 65505.0, 65519.0, 65520.0, 2.0**-14, 2.0**-14 * (1 - 2.0**-20), 1e-7, 6e-8, 2e-8]
    edges += [1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11]
    W0[: len(edges)] = torch.tensor(edges)
    return W0.view(out, into).to(DEVICE)


# ---- values


@pytest.mark.parametrize("product", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize(
    "shape", [{}, {"r": 1}, {"r": 16}, {"r": 33}, {"out": 1, "into": 1}, {"out": 65, "into": 129}], ids=str
)
def test_error_is_that_of_one_rounding(shape, stored, product):
    W0, A, B = weights(**shape, dtype=stored)
    exact = reference.modulated_weight(W0.double(), A.double(), B.double())
    # In float32: r products, as many sums, the 1, and the product with W0; each term of size |b a| or 1.
    size = W0.double().abs() * (1 + B.double().abs() @ A.double().abs())
    formation = 2 * (len(A) + 2) * 2.0**-24 * size
    rounding = ROUNDOFF[product] * (exact.abs() + formation)
    if product == torch.float16:
        rounding = rounding.clamp_min(2.0**-25)  # half of its smallest step
    got = form(W0, A, B, product)
    assert (got.shape, got.dtype) == (W0.shape, product)
    assert ((got.double() - exact).abs() <= formation + rounding).all()


@pytest.mark.parametrize("update_only", [False, True])
@pytest.mark.parametrize("product", DTYPES)
@pytest.mark.parametrize(("r", "lora_r"), [(1, 1), (3, 16), (20, 2), (2, 70)])
def test_lora_beside_hira(r, lora_r, product, update_only):
    W0, A, B = weights(r=r + lora_r, dtype=torch.bfloat16)
    A_, B_ = A.double().split([r, lora_r]), B.double().split([r, lora_r], dim=1)
    exact = reference.modulated_weight(W0.double(), A_[0], B_[0], A_[1], B_[1]) - update_only * W0.double()
    size = W0.double().abs() * (1 + B_[0].abs() @ A_[0].abs()) + B_[1].abs() @ A_[1].abs()
    formation = 2 * (len(A) + 3) * 2.0**-24 * size
    if product != torch.float32:  # the factors are split in two halves there, which leaves them within 2**-16
        formation = formation + 2.0**-15 * (W0.double().abs() * (B_[0].abs() @ A_[0].abs()) + B_[1].abs() @ A_[1].abs())
    got = form(W0, A, B, product, lora_r=lora_r, update_only=update_only)
    assert ((got.double() - exact).abs() <= formation + ROUNDOFF[product] * (exact.abs() + formation) + 2.0**-25).all()
    assert torch.equal(form(W0, A, B, product, lora_r=0), form(W0, A, B, product))


@pytest.mark.parametrize("adapter", [torch.float32, torch.float64, *LOW])
def test_adapters_of_any_dtype(adapter):
    W0, A, B = weights(dtype=torch.bfloat16, adapter=adapter)
    exact = reference.modulated_weight(W0.double(), A.double(), B.double())
    plain = W0 * (1 + (B @ A).to(W0.dtype))
    assert_as_exact([form(W0, A, B, W0.dtype)], [plain], [exact])


@pytest.mark.parametrize("update_only", [False, True])
@pytest.mark.parametrize("product", DTYPES)
def test_the_exact_product_is_rounded_to_nearest_even(product, update_only):
    W0 = special(33, 70)
    A, B = grid(33, 70)
    modulation = B @ A if update_only else 1 + B @ A
    torch.testing.assert_close(
        form(W0, A, B, product, update_only=update_only), (W0 * modulation).to(product), rtol=0, atol=0, equal_nan=True
    )


def test_ties_go_to_even():
    W0 = special(1, 40)
    A, B = grid(1, 40)
    for dtype in LOW:
        got = form(W0, A, torch.zeros_like(B), dtype)
        torch.testing.assert_close(got, W0.to(dtype), rtol=0, atol=0, equal_nan=True)
        assert torch.equal(torch.signbit(got[0, :2]).cpu(), torch.tensor([False, True]))


# ---- dither

# int16 products and infinities are meant to overflow
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


@pytest.mark.parametrize("update_only", [False, True])
@pytest.mark.parametrize("product", LOW)
def test_dither_bit_for_bit(product, update_only):
    W0 = special(70, 140)
    A, B = grid(70, 140)
    B[0] = 0  # so that the special numbers of the first row pass unchanged
    noise = noise_vectors(70, 140)
    got = form(W0, A, B, product, update_only=update_only, noise=noise)
    exact = W0 * (B @ A if update_only else 1 + B @ A)
    torch.testing.assert_close(got, dithered(exact, *noise, product), rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(got, form(W0, A, B, product, update_only=update_only))


@pytest.mark.parametrize("product", LOW)
def test_dither_is_that_of_other_devices(product):
    W0 = special(70, 140)
    A, B = grid(70, 140)
    noise = dither.noise_of(W0)
    expected = dither.round_into(torch.empty_like(W0, dtype=product), W0 * (1 + B @ A), *noise)
    torch.testing.assert_close(form(W0, A, B, product, noise=noise), expected, rtol=0, atol=0, equal_nan=True)


# ---- memory


@pytest.mark.parametrize("noise", [False, True])
def test_layouts(noise):
    W0, A, B = weights(65, 130, dtype=torch.bfloat16)
    noise = noise_vectors(65, 130) if noise else None
    expected = form(W0, A, B, W0.dtype, noise=noise)
    transposed = [t.t().contiguous().t() for t in (W0, A, B)]
    got = form(*transposed, W0.dtype, noise=noise)
    assert torch.equal(got, expected)
    assert got.stride() == transposed[0].stride()
    spread = [torch.stack([t, t], -1).flatten(1)[:, ::2] for t in (W0, A, B)]
    assert torch.equal(form(*spread, W0.dtype, noise=noise), expected)


def test_into_given_memory():
    W0, A, B = weights(65, 130, dtype=torch.bfloat16)
    memory = torch.full((65, 140), 7.0, dtype=W0.dtype, device=DEVICE)
    out = memory[:, 5:135]
    assert form(W0, A, B, W0.dtype, out=out) is out
    assert torch.equal(out, form(W0, A, B, W0.dtype))
    assert (memory[:, :5] == 7).all() and (memory[:, 135:] == 7).all()


def test_rows_beyond_the_reach_of_32_bits():
    W0, A, B = weights(40, 63, dtype=torch.bfloat16)
    far = far_apart(W0)
    assert torch.equal(form(far, A, B, W0.dtype), form(W0, A, B, W0.dtype))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_empty(shape):
    W0, A, B = weights(*shape)
    assert form(W0, A, B, torch.bfloat16).shape == shape


@pytest.mark.parametrize("product", DTYPES)
def test_uninitialised_memory_is_never_read(product):
    W0, A, B = weights(65, 130)
    expected = form(W0, A, B, product)
    with poisoned():
        assert torch.equal(form(W0, A, B, product), expected)


# ---- as an operator


@pytest.mark.parametrize("transposed", [False, True])
def test_operator_keeps_its_contract(transposed):
    W0, A, B = weights(dtype=torch.bfloat16)
    W0 = W0.t().contiguous().t() if transposed else W0
    rows, columns = noise_vectors(*W0.shape)
    torch.library.opcheck(torch.ops.hira.triton_form, (W0, A, B, torch.bfloat16, 1, False, rows, columns))
    torch.library.opcheck(torch.ops.hira.triton_form, (W0, A, B, torch.float32, 0, True, None, None))


def test_compiled():
    W0, A, B = weights(dtype=torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: form(*t, torch.bfloat16) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(W0, A, B), form(W0, A, B, torch.bfloat16) * 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A": torch.ones(3, 62)}, r"A.* \(3, 62\)"),
        ({"B": torch.ones(37, 4)}, r"\br\b"),
        ({"A": torch.ones(0, 63), "B": torch.ones(37, 0)}, r"\br\b"),
        ({"A": torch.ones(3, 63, dtype=torch.int32)}, "A.* torch.int32"),
        ({"W0": torch.ones(37, 63, dtype=torch.float64)}, "W0.* torch.float64"),
        ({"dtype": torch.float64}, "result.* torch.float64"),
        ({"lora_r": 3}, "lora_r is 3"),
        ({"lora_r": -1}, "lora_r is -1"),
        ({"out": torch.ones(37, 63)}, "out.* torch.float32.* torch.bfloat16"),
        ({"out": torch.ones(37, 62).bfloat16()}, r"out.* \(37, 62\)"),
        ({"noise": (torch.ones(37).short(), torch.ones(62).short())}, "int16"),
        ({"noise": (torch.ones(37).short(), torch.ones(63).int())}, "int16"),
        ({"noise": (torch.ones(37).short(), torch.ones(63).short()), "dtype": torch.float32}, "rounded"),
    ],
)
def test_bad_input(change, message):
    W0, A, B = weights()
    arguments = {"W0": W0, "A": A, "B": B, "dtype": torch.bfloat16, **change}
    with pytest.raises(HiraError, match=message):
        form(**arguments)
