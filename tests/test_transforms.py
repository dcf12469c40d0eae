"""Models with HiRA layers in PyTorch's transforms and tracers: torch.func, torch.jit.trace, torch.export and ONNX."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn
from torch.func import functional_call, grad, hessian, jvp, vmap

import hira
from hira import HiraConfig, inference_cache


class Depthwise(nn.Module):
    """Whose kernel the model reads."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(3, 3, 3, groups=3, padding=1)

    def forward(self, x):
        return F.conv1d(x, self.conv.weight, self.conv.bias, padding=1, groups=3)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        # the fast path, for batches first, has no forward mode and no ONNX in PyTorch itself
        self.attention = nn.MultiheadAttention(4, 2)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class Experts(nn.Module):
    """Of which every token takes both."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, 5, 4))

    def forward(self, x):
        return torch.stack([F.linear(x, self.up[e]) for e in range(2)])


MODELS = {
    "linear": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)),
        {"target_modules": ["0", "2"]},
        (5, 4),
    ),
    "conv": (
        lambda: nn.Sequential(nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular")),
        {"target_modules": ["0"]},
        (2, 3, 9),
    ),
    "depthwise": (Depthwise, {"target_modules": ["conv"]}, (2, 3, 9)),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(9, 4, padding_idx=1), nn.Linear(4, 3)),
        {"target_modules": ["0", "1"]},
        None,
    ),
    "attention": (Attention, {"target_modules": ["attention"]}, (2, 3, 4)),
    "experts": (lambda: nn.Sequential(Experts()), {"target_parameters": ["0.up"]}, (5, 4)),
}


@pytest.fixture(params=MODELS)
def case(request):
    """A model with an adapter, a function of its factors that has W' as a parameter, and an input."""
    return made(request.param)


def made(name, dtype=torch.float64):
    make, targets, shape = MODELS[name]
    base = make().to(dtype)
    model = get_peft_model(base, HiraConfig(r=2, init_weights=False, **targets), autocast_adapter_dtype=False)
    x = torch.tensor([[1, 2, 7], [0, 1, 2]]) if shape is None else torch.randn(shape, dtype=dtype)
    return model.to(dtype).eval(), x


def merged(model):
    return copy.deepcopy(model).merge_and_unload().eval()


def trained(model):
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def loss(model, factors, x):
    return functional_call(model, factors, (x,)).square().sum()


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name in found:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-9, atol=1e-9)


def gradients(model, x):
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(parameters, torch.autograd.grad(model(x).square().sum(), parameters.values()), strict=True))


def test_functional_call_and_grad(case):
    model, x = case
    factors = trained(model)
    assert_same(grad(lambda f: loss(model, f, x))(factors), gradients(model, x))


def test_gradients_of_each_sample(case):
    """A batch of one sample each, as of Opacus-like training."""
    model, x = case
    factors = trained(model)
    found = vmap(grad(lambda f, sample: loss(model, f, sample[None])), (None, 0))(factors, x)
    each = [gradients(model, sample[None]) for sample in x]
    assert_same(found, {name: torch.stack([g[name] for g in each]) for name in factors})


def test_forward_mode_and_hessians(case):
    """The derivative along a direction by forward mode, and twice by both modes."""
    model, x = case
    factors = trained(model)
    direction = {name: torch.randn_like(f) for name, f in factors.items()}
    _, along = jvp(lambda f: loss(model, f, x), (factors,), (direction,))
    wanted = sum((g * direction[name]).sum() for name, g in gradients(model, x).items())
    torch.testing.assert_close(along, wanted.detach(), rtol=1e-9, atol=1e-9)

    def line(t):
        return loss(model, {name: f + t * direction[name] for name, f in factors.items()}, x)

    t = torch.zeros((), dtype=torch.float64)
    h = 1e-4
    numeric = (line(t + h) - 2 * line(t) + line(t - h)) / h**2
    torch.testing.assert_close(hessian(line)(t), numeric, rtol=1e-5, atol=1e-5)


def test_second_derivatives(case):
    """The gradient of a sum of squared gradients, by reverse mode in eager code and by torch.func."""
    model, x = case
    factors = trained(model)

    def squares(f):
        return sum(g.square().sum() for g in grad(lambda f: loss(model, f, x))(f).values())

    parameters = [p for p in model.parameters() if p.requires_grad]
    inner = torch.autograd.grad(model(x).square().sum(), parameters, create_graph=True)
    outer = torch.autograd.grad(sum(g.square().sum() for g in inner), parameters)
    assert_same(dict(zip(factors, outer, strict=True)), grad(squares)(factors))
    direction = {name: torch.randn_like(f) for name, f in factors.items()}
    h = 1e-5
    ends = [squares({name: f + step * direction[name] for name, f in factors.items()}) for step in (h, -h)]
    along = sum((g * direction[name]).sum() for name, g in zip(factors, outer, strict=True))
    torch.testing.assert_close(along, (ends[0] - ends[1]) / (2 * h), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("form", ["adapted", "merged"])
def test_jit_trace(case, form, gradients):
    model, x = case
    model = model.base_model.model if form == "adapted" else merged(model)
    other = x.flip(0)
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(model, (x,))
        torch.testing.assert_close(traced(other), model(other))


def test_a_traced_model_has_no_kept_weight():
    """Neither as a constant, nor read from the cache that generation keeps."""
    model, x = made("linear", torch.float32)
    model = model.base_model.model
    with torch.no_grad(), inference_cache.keep():
        model(x)
        assert inference_cache.nbytes > 0
        traced = torch.jit.trace(model, (x,))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.hira_B["default"].mul_(3)
        torch.testing.assert_close(traced(x), model(x))


@pytest.mark.parametrize("form", ["adapted", "merged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_export(name, dtype, form):
    """The program has no operator of ours, so that it runs where hira is not installed."""
    model, x = made(name, dtype)
    model = model.base_model.model if form == "adapted" else merged(model)
    for strict in (False, True) if name == "linear" and form == "adapted" else (False,):
        program = torch.export.export(model, (x,), strict=strict)
        assert "hira." not in program.graph_module.code
        other = x.flip(0)
        torch.testing.assert_close(program.module()(other), model(other))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["linear", "embedding", "conv"])
def test_jit_trace_in_half_precision(name, dtype):
    """With the dither."""
    model, x = made(name, dtype)
    model = model.base_model.model
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(model, (x,))(x), model(x))


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_onnx_in_half_precision(dynamo, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    model, x = made("linear", torch.float16)
    model, path = model.base_model.model, str(tmp_path / "model.onnx")
    torch.onnx.export(model, (x,), path, dynamo=dynamo, input_names=["x"])
    (found,) = ReferenceEvaluator(path).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x).detach(), rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("form", ["adapted", "merged"])
@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore")
def test_onnx(name, dynamo, form, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    model, x = made(name, torch.float32)
    model = model.base_model.model if form == "adapted" else merged(model)
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(model, (x,), path, dynamo=dynamo, input_names=["x"])
    other = x.flip(0)
    (found,) = ReferenceEvaluator(path).run(None, {"x": other.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(other).detach(), rtol=1e-4, atol=1e-5)


def test_compiled_transforms():
    """torch.compile of a gradient by torch.func."""
    torch._dynamo.reset()
    model, x = made("linear")
    factors = trained(model)

    def gradient(f, x):
        return grad(lambda f: loss(model, f, x))(f)

    found = torch.compile(gradient, backend="aot_eager")(factors, x)
    assert_same(found, gradients(model, x))


def test_transforms_in_threads():
    """Each with a model of its own, as `functional_call` exchanges the parameters of a model for the time of a call."""
    models, x = [made("linear")[0] for _ in range(4)], torch.randn(5, 4, dtype=torch.float64)
    wanted = [gradients(model, x) for model in models]

    def work(model):
        return [grad(lambda f: loss(model, f, x))(trained(model)) for _ in range(20)]

    with ThreadPoolExecutor(4) as threads:
        for found, right in zip(threads.map(work, models), wanted, strict=True):
            for one in found:
                assert_same(one, right)


def test_mixed_batches_of_single_tokens():
    layer = hira.Linear(nn.Linear(4, 3).double().requires_grad_(False), "a", HiraConfig(r=2, init_weights=False))
    layer.update_layer("b", 3, HiraConfig(init_weights=False))
    layer = layer.double().eval()
    x, names = torch.randn(2, 4, dtype=torch.float64), ["a", "b"]
    found = grad(lambda x: layer(x, adapter_names=names).square().sum())(x)
    leaf = x.clone().requires_grad_()
    wanted = torch.autograd.grad(
        sum(layer(leaf[i : i + 1], adapter_names=[n]).square().sum() for i, n in enumerate(names)), leaf
    )
    torch.testing.assert_close(found, wanted[0])
