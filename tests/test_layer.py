"""Each kind of layer: as its base layer with the reference's W' in the place of W0, in float64; and what it costs."""

from __future__ import annotations

import pytest
import torch
from layer_cases import CONV, EXACT, IDS, LINEAR, WIDE, Case, adapted, factors, gradients, modulated, of_reference
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

import hira
from hira.ops import reference

X = (2, 2, 5, 6)


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
