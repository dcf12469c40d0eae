"""Each kind of layer: as its base layer with the reference's W' in the place of W0, in float64; and what it costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from autograd_memory import address, kept_for_backward
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

import hira
from hira.ops import reference

# Sums of at most a few hundred float64 products in another order: 2^-53 times their number, with room for their size.
EXACT = {"rtol": 1e-12, "atol": 1e-12}
IDS = torch.tensor([[3, 0, 3, 8], [1, 3, 5, 0]])


class Case(NamedTuple):
    layer: type[hira.HiraLayer]
    base: Callable[[], nn.Module]
    x: tuple[int, ...]
    r: int = 3


def linear(into: int, out: int, **options) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(into, out, **options)


def conv(dims: int, into: int, out: int, kernel, **options) -> Callable[[], nn.Module]:
    return lambda: (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](into, out, kernel, **options)


LINEAR = {
    "bias": Case(hira.Linear, linear(7, 5), (2, 3, 7)),
    "no bias": Case(hira.Linear, linear(7, 5, bias=False), (4, 7)),
    "rank 1": Case(hira.Linear, linear(63, 5), (4, 63), 1),
    "one output": Case(hira.Linear, linear(63, 1, bias=False), (4, 63)),
    "one input": Case(hira.Linear, linear(1, 4), (4, 1), 2),
    "rank above both": Case(hira.Linear, linear(5, 3), (4, 5), 9),
    "one vector": Case(hira.Linear, linear(7, 5), (7,)),
    "empty batch": Case(hira.Linear, linear(7, 5), (0, 7)),
    "Conv1D": Case(hira.Linear, lambda: Conv1D(5, 7), (2, 3, 7)),
    "Conv1D rank 1": Case(hira.Linear, lambda: Conv1D(1, 63), (2, 63), 1),
}
MODES = ["zeros", "reflect", "replicate", "circular"]
X = (2, 2, 5, 6)
CONV = {
    "1d": Case(hira.Conv1d, conv(1, 4, 6, 3, padding=1), (2, 4, 9)),
    "1d no bias, strided": Case(hira.Conv1d, conv(1, 4, 6, 3, stride=2, bias=False), (2, 4, 9), 1),
    "1d same, even kernel": Case(hira.Conv1d, conv(1, 3, 5, 4, padding="same", dilation=2), (2, 3, 11)),
    "1d valid": Case(hira.Conv1d, conv(1, 3, 5, 4, padding="valid"), (2, 3, 11)),
    "1d unbatched": Case(hira.Conv1d, conv(1, 3, 5, 3, padding=2), (3, 11)),
    "1d depthwise": Case(hira.Conv1d, conv(1, 6, 6, 4, groups=6, padding=3), (2, 6, 9)),
    "2d": Case(hira.Conv2d, conv(2, 4, 6, (3, 1), stride=(2, 1), padding=(1, 2)), (2, 4, 7, 6)),
    "2d point": Case(hira.Conv2d, conv(2, 5, 3, 1), (2, 5, 4, 3), 1),
    "2d grouped": Case(hira.Conv2d, conv(2, 4, 6, 3, groups=2, dilation=2), (2, 4, 7, 6)),
    "2d depthwise": Case(hira.Conv2d, conv(2, 4, 8, 3, groups=4, padding=1), (2, 4, 5, 6)),
    "3d": Case(hira.Conv3d, conv(3, 2, 3, (3, 2, 1), stride=(1, 2, 1), padding=(1, 0, 2)), (2, 2, 4, 5, 3)),
    "3d kernel (1, 1, k)": Case(hira.Conv3d, conv(3, 2, 3, (1, 1, 3)), (2, 2, 2, 3, 4)),
    "3d grouped": Case(hira.Conv3d, conv(3, 4, 2, 2, groups=2, bias=False), (1, 4, 3, 3, 3)),
    **{f"1d {m}": Case(hira.Conv1d, conv(1, 3, 5, 4, padding=3, padding_mode=m), (2, 3, 9)) for m in MODES},
    **{f"2d {m}": Case(hira.Conv2d, conv(2, 2, 4, 3, padding=(2, 1), padding_mode=m), (2, 2, 5, 6)) for m in MODES},
    **{f"3d {m}": Case(hira.Conv3d, conv(3, 2, 2, 2, padding=1, padding_mode=m), (1, 2, 3, 3, 4)) for m in MODES},
    **{
        f"2d same {m}": Case(hira.Conv2d, conv(2, 2, 3, (2, 3), padding="same", padding_mode=m), (2, 2, 5, 6))
        for m in MODES
    },
    "1d depthwise reflect": Case(hira.Conv1d, conv(1, 4, 4, 3, groups=4, padding=1, padding_mode="reflect"), (2, 4, 6)),
}


def adapted(case: Case, dtype: torch.dtype = torch.float64) -> hira.HiraLayer:
    """A layer whose adapter does something."""
    options = {"fan_in_fan_out": True} if case.base().__class__ is Conv1D else {}
    config = hira.HiraConfig(r=case.r, init_weights=False)
    return case.layer(case.base().to(dtype), "default", config, **options).to(dtype)


def factors(layer: hira.HiraLayer) -> tuple[Tensor, Tensor]:
    A, B = (getattr(layer, name)["default"] for name in layer.factor_names)
    return A, B


def modulated(layer: hira.HiraLayer) -> Tensor:
    """The reference's W', as the base layer stores its weight."""
    W0, (A, B) = layer.get_base_layer().weight, factors(layer)
    if isinstance(layer, hira.Embedding):
        return reference.modulated_weight(W0.t(), A, B).t()
    if isinstance(layer.get_base_layer(), Conv1D):
        return reference.modulated_weight(W0.t(), A, B).t()
    return reference.modulated_weight(W0, A, B)


def of_reference(layer: hira.HiraLayer, x: Tensor) -> Tensor:
    return functional_call(layer.get_base_layer(), {"weight": modulated(layer)}, (x,))


def gradients(y: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape).cos()
    return [g.to_dense() for g in torch.autograd.grad(y, tensors, dy)]


def assert_as_reference(layer: hira.HiraLayer, x: Tensor, expected: Tensor) -> None:
    """Equal outputs, and equal gradients of all parameters and of x."""
    y = layer(x)
    torch.testing.assert_close(y, expected, **EXACT)
    tensors = [*layer.parameters(), *([x] if x.requires_grad else [])]
    for found, wanted in zip(gradients(y, tensors), gradients(expected, tensors), strict=True):
        torch.testing.assert_close(found, wanted, **EXACT)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("case", [*LINEAR.values(), *CONV.values()], ids=[*LINEAR, *CONV])
def test_forward_and_gradients(case):
    layer = adapted(case)
    x = torch.randn(case.x, dtype=torch.float64, requires_grad=True)
    assert len(list(layer.parameters())) == (3 if layer.get_base_layer().bias is None else 4)
    assert_as_reference(layer, x, of_reference(layer, x))


def test_linear_is_the_equation():
    """The reference of these tests, spelled out once."""
    for name in ("bias", "Conv1D"):
        layer = adapted(LINEAR[name])
        x, base = torch.randn(2, 7, dtype=torch.float64), layer.get_base_layer()
        W0 = base.weight.t() if name == "Conv1D" else base.weight
        expected = reference.linear(x, W0, *factors(layer), base.bias)
        torch.testing.assert_close(of_reference(layer, x), expected, **EXACT)


def test_a_strided_input():
    layer = adapted(LINEAR["bias"])
    x = torch.randn(7, 3, 4, dtype=torch.float64, requires_grad=True).permute(2, 1, 0)[::2]
    assert not x.is_contiguous()
    assert_as_reference(layer, x, of_reference(layer, x))


def test_a_channels_last_input():
    layer = adapted(CONV["2d"])
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    assert_as_reference(layer, x, of_reference(layer, x))


@pytest.mark.parametrize("case", CONV.values(), ids=CONV)
def test_shapes_of_a_convolution_are_those_of_peft(case):
    layer = adapted(case)
    A, B = factors(layer)
    out, into, *kernel = layer.get_base_layer().weight.shape
    assert A.shape == (case.r, into, *kernel)
    assert B.shape == (out, case.r, *(1 for _ in kernel))
    assert layer.get_delta_weight("default").shape == layer.get_base_layer().weight.shape


def test_a_convolution_of_other_dimensions_is_refused():
    with pytest.raises(hira.HiraError, match="Conv1d"):
        hira.Conv1d(nn.Conv2d(2, 3, 1), "default", hira.HiraConfig(r=2))


def test_the_delta_is_ba_and_the_additive_delta_what_it_adds():
    for case in [*LINEAR.values(), *CONV.values(), Case(hira.Embedding, lambda: nn.Embedding(9, 5), ())]:
        layer = adapted(case)
        W0, W = layer.get_base_layer().weight, modulated(layer)
        torch.testing.assert_close(W0 * (1 + layer.get_delta_weight("default")), W, **EXACT)
        torch.testing.assert_close(W0 + layer.get_additive_delta("default"), W, **EXACT)


# Embeddings


def embedding(r: int = 3, cls: type[nn.Embedding] = nn.Embedding, **options) -> hira.Embedding:
    base = cls(9, 5, **options).double()
    if base.padding_idx is not None:
        nn.init.normal_(base.weight)  # a padding row that is not zero
    return hira.Embedding(base, "default", hira.HiraConfig(r=r, init_weights=False)).double()


@pytest.mark.parametrize("r", [1, 3, 12])
@pytest.mark.parametrize("ids", [IDS, IDS[0], IDS[0, 0], IDS[:0], IDS.int()], ids=["2", "1", "0", "none", "int32"])
def test_an_embedding(r, ids):
    layer = embedding(r)
    assert_as_reference(layer, ids, reference.embedding(ids, layer.get_base_layer().weight, *factors(layer)))


@pytest.mark.parametrize(
    "options",
    [
        {"padding_idx": 3},
        {"padding_idx": -1},
        {"scale_grad_by_freq": True},
        {"padding_idx": 3, "scale_grad_by_freq": True},
    ],
    ids=str,
)
def test_options_of_an_embedding(options):
    layer = embedding(**options)
    assert_as_reference(layer, IDS, of_reference(layer, IDS))
    if options.get("padding_idx") == 3:
        layer(IDS).sum().backward()
        assert layer.hira_embedding_A["default"].grad[:, 3].eq(0).all()
        assert layer.hira_embedding_A["default"].grad[:, 8].ne(0).all()


def test_a_sparse_embedding():
    layer = embedding(sparse=True)
    layer.get_base_layer().weight.requires_grad_(False)
    expected = reference.embedding(IDS, layer.get_base_layer().weight, *factors(layer))
    layer(IDS).sum().backward()
    A, B = factors(layer)
    assert A.grad.is_sparse
    assert A.grad.coalesce().indices()[1].unique().tolist() == IDS.unique().tolist()
    for found, wanted in zip((A.grad, B.grad), torch.autograd.grad(expected.sum(), (A, B)), strict=True):
        torch.testing.assert_close(found.to_dense(), wanted, **EXACT)


@pytest.mark.parametrize(("norm_type", "bound"), [(1.0, 8.0), (2.0, 4.0)])
def test_max_norm_bounds_the_rows_that_are_returned(norm_type, bound):
    layer = embedding(max_norm=bound, norm_type=norm_type)
    W0 = layer.get_base_layer().weight.detach().clone()
    rows = reference.embedding(IDS, W0, *factors(layer))
    norms = rows.detach().norm(norm_type, dim=-1, keepdim=True)
    assert 0 < (norms > bound).sum() < norms.numel()
    y = layer(IDS)
    # PyTorch divides by the norm plus 1e-7
    torch.testing.assert_close(y, torch.where(norms > bound, rows * bound / (norms + 1e-7), rows), **EXACT)
    assert y.norm(norm_type, dim=-1).max() <= bound
    assert torch.equal(layer.get_base_layer().weight, W0)
    layer.merge()
    torch.testing.assert_close(layer(IDS), y, **EXACT)


def test_an_embedding_that_scales_its_output():
    layer = embedding(cls=Gemma3TextScaledWordEmbedding, padding_idx=0, embed_scale=7.0)
    assert layer.embed_scale == 7
    y = layer(IDS)
    rows = reference.embedding(IDS, layer.get_base_layer().weight, *factors(layer))
    torch.testing.assert_close(y, 7 * rows, **EXACT)
    assert_as_reference(layer, IDS, of_reference(layer, IDS))
    layer.merge()
    torch.testing.assert_close(layer(IDS), y, **EXACT)


# Attributes


@pytest.mark.parametrize(
    ("case", "names"),
    [
        (CONV["2d grouped"], ("stride", "padding", "dilation", "groups", "kernel_size", "in_channels", "padding_mode")),
        (LINEAR["bias"], ("in_features", "out_features", "weight", "bias")),
        (LINEAR["Conv1D"], ("nf", "nx", "weight")),
        (Case(hira.Embedding, lambda: nn.Embedding(9, 5, 2), ()), ("padding_idx", "num_embeddings", "embedding_dim")),
    ],
    ids=["conv", "linear", "Conv1D", "embedding"],
)
def test_attributes_are_read_off_the_base_layer(case, names):
    layer = adapted(case)
    for name in names:
        found, expected = getattr(layer, name), getattr(layer.get_base_layer(), name)
        assert found is expected or found == expected
    with pytest.raises(AttributeError, match="'strides'"):
        layer.strides  # noqa: B018
    assert not hasattr(layer, "_private")
    assert not hasattr(layer, "original_name_of_this")


def test_the_weight_of_a_depthwise_convolution_is_the_adapted_one():
    """Models with short convolutions hand `conv.weight` to a kernel of their own."""
    layer = adapted(CONV["1d depthwise"])
    torch.testing.assert_close(layer.weight, modulated(layer), **EXACT)
    found = gradients(layer.weight, list(factors(layer)))
    for value, wanted in zip(found, gradients(modulated(layer), list(factors(layer))), strict=True):
        torch.testing.assert_close(value, wanted, **EXACT)
    layer.enable_adapters(False)
    assert layer.weight is layer.get_base_layer().weight
    layer.enable_adapters(True)
    layer.merge()
    assert layer.weight is layer.get_base_layer().weight


# Costs

WIDE = {
    "linear": Case(hira.Linear, linear(64, 48), (2, 64)),
    "Conv1D": Case(hira.Linear, lambda: Conv1D(48, 64), (2, 64)),
    "embedding": Case(hira.Embedding, lambda: nn.Embedding(64, 48), ()),
    "1d": Case(hira.Conv1d, conv(1, 24, 16, 5), (1, 24, 6)),
    "2d reflect": Case(hira.Conv2d, conv(2, 16, 12, 3, padding=1, padding_mode="reflect"), (1, 16, 2, 2)),
    "3d grouped": Case(hira.Conv3d, conv(3, 8, 16, 3, groups=2), (1, 8, 4, 4, 3)),
}


def input_of(case: Case, dtype: torch.dtype) -> Tensor:
    return torch.randn(case.x, dtype=dtype, requires_grad=True) if case.x else IDS


def twice(layer: hira.HiraLayer) -> hira.HiraLayer:
    """With the active adapters of ranks 3 and 2."""
    layer.update_layer("second", 2, hira.HiraConfig(r=2, init_weights=False))
    layer.set_adapter(["default", "second"])
    return layer


@pytest.mark.parametrize("form", ["plain", "several adapters", "hooked", "dropout"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", WIDE.values(), ids=WIDE)
def test_nothing_of_the_weights_size_is_kept_but_the_weight(case, dtype, form):
    layer = adapted(case, dtype)
    layer.get_base_layer().requires_grad_(False)
    for name in layer.factor_names:
        getattr(layer, name).float()
    if form == "several adapters":
        twice(layer)
    if form == "hooked":
        layer.get_base_layer().register_forward_hook(lambda module, args, y: None)
    if form == "dropout":
        layer.hira_dropout["default"] = nn.Dropout(0.5)
    x, W0 = input_of(case, dtype), layer.get_base_layer().weight
    kept = kept_for_backward(lambda: layer(x))
    kept.pop(address(W0), None)
    assert kept
    assert max(kept.values()) < W0.untyped_storage().nbytes()


def test_what_is_kept_is_seen():
    """The law has to fail for the plain expression, which keeps W0 * BA."""
    layer = adapted(WIDE["linear"], torch.float32)
    layer.get_base_layer().requires_grad_(False)
    x, W0 = input_of(WIDE["linear"], torch.float32), layer.get_base_layer().weight
    kept = kept_for_backward(lambda: of_reference(layer, x))
    kept.pop(address(W0), None)
    assert max(kept.values()) >= W0.nbytes


def operations(layer: hira.HiraLayer, x: Tensor) -> int:
    """Of a training step. The counter by itself does not see products that are added in place."""

    def in_place(_, a, b, **__):  # shapes
        return 2 * a[0] * a[1] * b[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        layer(x).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("case", WIDE.values(), ids=WIDE)
def test_several_adapters_cost_one_of_the_summed_rank(case):
    layers = twice(adapted(case)), adapted(case._replace(r=5))
    for layer in layers:
        layer.double().get_base_layer().requires_grad_(False)
    x = input_of(case, torch.float64)
    several, one = (operations(layer, x) for layer in layers)
    assert 0 < several == one
    layers[0].get_base_layer().register_forward_hook(lambda module, args, y: None)
    assert operations(layers[0], x) == several


@pytest.mark.parametrize("name", ["linear", "Conv1D", "1d", "embedding"])
def test_compiled_as_one_graph_for_all_lengths(name):
    case = WIDE[name]
    layer = adapted(case)
    layer.get_base_layer().requires_grad_(False)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for length in (11, 7, 16):
        x = torch.randn(length, *case.x[1:], dtype=torch.float64) if case.x else torch.arange(length)
        y, expected = compiled(x), layer(x)
        torch.testing.assert_close(y, expected, **EXACT)
        found, wanted = (gradients(result, list(factors(layer))) for result in (y, expected))
        for mine, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, other, **EXACT)
    assert counter.frame_count == 1


# weight_gradient


def test_a_layer_rounds_its_weights_gradient_if_all_its_adapters_say_so():
    base = nn.Linear(40, 30).requires_grad_(False)
    layer = hira.Linear(base, "a", hira.HiraConfig(r=4, init_weights=False, weight_gradient="int8"))
    exact = hira.Linear(base, "a", hira.HiraConfig(r=4, init_weights=False))
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(3, 50, 40)

    def gradient(layer):
        layer.zero_grad()
        layer(x).square().sum().backward()
        return layer.hira_A["a"].grad

    assert torch.equal(layer(x), exact(x))
    assert 1e-4 < (gradient(layer) - gradient(exact)).norm() / gradient(exact).norm() < 0.05
    layer.update_layer("b", 2, hira.HiraConfig())
    assert torch.equal(gradient(layer), gradient(exact))
    layer.delete_adapter("b")
    assert not torch.equal(gradient(layer), gradient(exact))


# max_norm


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_max_norm_bounds_rows_and_leaves_the_table(dropout):
    """Merged or not, adapters on or off, dropout or not; `nn.Embedding` would rescale the frozen table in place."""
    base = nn.Embedding(10, 8, max_norm=1.0).requires_grad_(False)
    layer = hira.Embedding(base, "a", hira.HiraConfig(r=3, init_weights=False, hira_dropout=dropout))
    W0, ids = base.weight.clone(), torch.arange(10)

    def rows():
        y = layer(ids)
        assert (y.norm(dim=1) <= 1 + 1e-5).all()
        assert torch.equal(W0, base.weight) or layer.merged
        return y.detach()

    rows()
    layer.eval()
    y = rows()
    layer.merge()
    torch.testing.assert_close(rows(), y)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer, "_disable_adapters", True)
        torch.testing.assert_close(rows(), nn.Embedding(10, 8, max_norm=1.0, _weight=W0.clone())(ids))
    assert torch.equal(base.weight, W0)
