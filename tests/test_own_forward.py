"""Base layers whose forward is not the plain one of their type: their own call, with W' in the place of W0."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any, NamedTuple

import peft
import pytest
import torch
import torch.nn.functional as F
from autograd_memory import address, kept_for_backward
from peft import LoraConfig, PeftMixedModel
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding
from transformers.models.whisper.modeling_whisper import WhisperPositionalEmbedding

import hira
from hira import HiraConfig
from hira.layers.dispatch import dispatch
from hira.ops import effective_weight

EXACT = {"rtol": 1e-12, "atol": 1e-12}


class Cosine(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 8 * F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight.sign() * weight.abs().mean()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class BitLinear(nn.Linear):
    """Straight-through by detach()."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        scale = weight.abs().mean().clamp(min=1e-5)
        quantised = (weight / scale).round().clamp(-1, 1) * scale
        return F.linear(F.layer_norm(x, x.shape[-1:]), weight + (quantised - weight).detach(), self.bias)


class SignLinear(nn.Linear):
    """Straight-through by an autograd function."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, Sign.apply(self.weight), self.bias)


class SignEmbedding(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight) / self.weight.norm() + F.one_hot(ids, 9).to(self.weight) @ self.weight


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        std, mean = torch.std_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        return self._conv_forward(x, (self.weight - mean) / (std + 1e-5), self.bias)


class SamePadding(nn.Conv2d):
    """As TensorFlow pads, which depends on the size of x."""

    def forward(self, x: Tensor) -> Tensor:
        sizes = zip(x.shape[-2:], self.kernel_size, self.stride, strict=True)
        pads = [max((math.ceil(n / s) - 1) * s + k - n, 0) for n, k, s in sizes]
        x = F.pad(x, [pads[1] // 2, pads[1] - pads[1] // 2, pads[0] // 2, pads[0] - pads[0] // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride)


def hooked(base: nn.Module) -> nn.Module:
    base.register_forward_pre_hook(lambda module, args: (args[0] * module.weight.norm(), *args[1:]))
    base.register_forward_hook(lambda module, args, y: y.tanh() / module.weight.abs().mean())
    return base


def output_hooked(base: nn.Module) -> nn.Module:
    base.register_forward_hook(lambda module, args, y: 3 * y.tanh())
    return base


def replaced(base: nn.Module) -> nn.Module:
    plain = base.forward
    base.forward = lambda x: plain(2 * x).relu()
    return base


def vectors() -> Tensor:
    return torch.randn(3, 7, dtype=torch.float64, requires_grad=True)


def images() -> Tensor:
    return torch.randn(2, 3, 5, 6, dtype=torch.float64, requires_grad=True)


def ids() -> Tensor:
    return torch.tensor([[3, 0, 3, 8], [1, 3, 5, 0]])


def mask() -> Tensor:
    return torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])


class Case(NamedTuple):
    layer: type[hira.HiraLayer]
    base: Callable[[], nn.Module]
    x: Callable[[], Tensor]
    kwargs: Mapping[str, Any] = MappingProxyType({})


CASES = {
    "cosine head": Case(hira.Linear, lambda: Cosine(7, 5), vectors),
    "BitLinear": Case(hira.Linear, lambda: BitLinear(7, 5), vectors),
    "straight through": Case(hira.Linear, lambda: SignLinear(7, 5), vectors),
    "hooks": Case(hira.Linear, lambda: hooked(nn.Linear(7, 5)), vectors),
    "a replaced forward": Case(hira.Linear, lambda: replaced(nn.Linear(7, 5)), vectors),
    "hooks on a convolution": Case(hira.Conv2d, lambda: hooked(nn.Conv2d(3, 4, (2, 3), groups=1)), images),
    "weight standardisation": Case(hira.Conv2d, lambda: Standardised(3, 4, 3, padding=1), images),
    "padding by the size of x": Case(hira.Conv2d, lambda: SamePadding(3, 4, (2, 3), stride=2), images),
    "hooks on an embedding": Case(hira.Embedding, lambda: output_hooked(nn.Embedding(9, 5, padding_idx=0)), ids),
    "a table in a product": Case(hira.Embedding, lambda: SignEmbedding(9, 5), ids),
    "a scaled embedding": Case(hira.Embedding, lambda: Gemma3TextScaledWordEmbedding(9, 5, 0, 7.0), ids),
    "positions of OPT": Case(hira.Embedding, lambda: OPTLearnedPositionalEmbedding(9, 5), mask),
    "positions of BART": Case(hira.Embedding, lambda: BartLearnedPositionalEmbedding(9, 5), ids),
    "positions of Whisper": Case(
        hira.Embedding, lambda: WhisperPositionalEmbedding(9, 5), ids, {"past_key_values_length": 2}
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def config(r: int = 3, **options) -> HiraConfig:
    return HiraConfig(r=r, init_weights=False, **options)


def adapted(case: Case, **options) -> Any:
    layer = case.layer(case.base(), "default", config(**options)).double()
    for factors in layer._factor_dicts:  # large enough that rounding to -1, 0 and 1 sees them
        factors["default"].data.mul_(2)
    return layer


def modulated(layer: Any, *names: str) -> Tensor:
    """W0 * (1 + BA), summed over adapters, in plain PyTorch."""
    W0, total = layer.get_base_layer().weight, 0
    for name in names or ("default",):
        A, B = (factors[name].flatten(1) for factors in layer._factor_dicts)
        total = total + ((B @ A).t() if isinstance(layer, hira.Embedding) else (B @ A).view(W0.shape))
    return W0 * (1 + total)


def with_weight(layer: Any, weight: Tensor, x: Tensor, **kwargs: Any) -> Tensor:
    return torch.func.functional_call(layer.get_base_layer(), {"weight": weight}, (x,), kwargs)


def gradients(y: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape).cos()
    return list(torch.autograd.grad(y, tensors, dy))


def assert_alike(layer: Any, x: Tensor, found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, **EXACT)
    tensors = [factors["default"] for factors in layer._factor_dicts] + ([x] if x.requires_grad else [])
    for mine, other in zip(gradients(found, tensors), gradients(wanted, tensors), strict=True):
        torch.testing.assert_close(mine, other, **EXACT)
        assert mine.abs().max() > 0


@every_case
def test_it_is_the_base_layers_own_call_with_w(case):
    layer, x = adapted(case), case.x()
    wanted = with_weight(layer, modulated(layer), x, **case.kwargs)
    assert not torch.allclose(wanted, layer.get_base_layer()(x, **case.kwargs))
    assert_alike(layer, x, layer(x, **case.kwargs), wanted)


@every_case
def test_merging_changes_nothing(case):
    layer, x = adapted(case).eval(), case.x()
    base = layer.get_base_layer()(x, **case.kwargs)
    y = layer(x, **case.kwargs)
    layer.merge()
    torch.testing.assert_close(layer(x, **case.kwargs), y, **EXACT)
    layer.unmerge()
    assert torch.equal(layer(x, **case.kwargs), y)
    layer.enable_adapters(False)
    assert torch.equal(layer(x, **case.kwargs), base)


@every_case
def test_several_adapters(case):
    layer, x = adapted(case), case.x()
    layer.update_layer("other", 2, config(2))
    layer.double().set_adapter(["default", "other"])
    W = modulated(layer, "default", "other")
    assert_alike(layer, x, layer(x, **case.kwargs), with_weight(layer, W, x, **case.kwargs))
    W = modulated(layer, "default", "other")
    layer.merge(adapter_names=["other"])
    assert_alike(layer, x, layer(x, **case.kwargs), with_weight(layer, W, x, **case.kwargs))


OF_PLAIN_LAYERS = ["hooks", "hooks on a convolution", "hooks on an embedding"]


@pytest.mark.parametrize("name", [name for name in CASES if name not in OF_PLAIN_LAYERS])
def test_dropout_is_on_the_input_of_what_the_adapter_changes(name):
    case = CASES[name]
    layer, x = adapted(case, hira_dropout=0.5), case.x()
    W0, W = layer.get_base_layer().weight, modulated(layer)
    torch.manual_seed(1)
    y = layer(x, **case.kwargs)
    torch.manual_seed(1)
    base = with_weight(layer, W0, x, **case.kwargs)
    if case.layer is hira.Embedding:
        keep = F.dropout(torch.ones(base.shape[:-1]), 0.5).unsqueeze(-1)
        wanted = base + keep * (with_weight(layer, W, x, **case.kwargs) - base)
    else:
        dropped = F.dropout(x, 0.5)
        wanted = base + with_weight(layer, W, dropped) - with_weight(layer, W0, dropped)
    assert_alike(layer, x, y, wanted)
    layer.eval()
    assert_alike(layer, x, layer(x, **case.kwargs), with_weight(layer, modulated(layer), x, **case.kwargs))


@pytest.mark.parametrize("name", OF_PLAIN_LAYERS)
def test_under_dropout_hooks_are_around_the_sum(name, monkeypatch):
    """Of a plain layer: hooks get what the layer gets, and what it gives with the update of a dropped input."""
    case = CASES[name]
    layer, x = adapted(case, hira_dropout=0.5), case.x()
    base = layer.get_base_layer()
    W0, change = base.weight, modulated(layer) - base.weight

    def product(self, x):
        if isinstance(self, nn.Embedding):
            keep = F.dropout(torch.ones(x.shape), 0.5).unsqueeze(-1)
            return F.embedding(x, W0, self.padding_idx) + keep * F.embedding(x, change, self.padding_idx)
        dropped = F.dropout(x, 0.5)
        if isinstance(self, nn.Linear):
            return F.linear(x, W0, self.bias) + F.linear(dropped, change)
        return self._conv_forward(x, W0, self.bias) + self._conv_forward(dropped, change, None)

    torch.manual_seed(1)
    y = layer(x)
    monkeypatch.setattr(type(base), "forward", product)
    torch.manual_seed(1)
    assert_alike(layer, x, y, base(x))


def test_a_lora_layer_inside():
    lora_config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    lora = peft.get_peft_model(nn.Sequential(Cosine(7, 5)), lora_config).base_model.model[0].double()
    layer, x = hira.Linear(lora, "default", config()).double(), vectors()
    wanted = with_weight(layer, modulated(layer), x) + lora.lora_B["default"](lora.lora_A["default"](x)) * 4
    assert_alike(layer, x, layer(x), wanted)


@pytest.mark.parametrize("kind", ["weight_norm", "parametrized weight_norm", "spectral_norm"])
def test_a_weight_that_is_computed_anew(kind):
    """By a hook before the forward, or whenever it is read; the layer's output is changed by another hook."""
    norm = {
        "weight_norm": nn.utils.weight_norm,
        "parametrized weight_norm": nn.utils.parametrizations.weight_norm,
        "spectral_norm": nn.utils.spectral_norm,
    }[kind]
    with pytest.warns(FutureWarning) if kind == "weight_norm" else pytest.MonkeyPatch.context():
        base = output_hooked(norm(nn.Linear(7, 5)))
    layer, x = hira.Linear(base, "default", config()).double().eval(), vectors()
    plain = base(x)
    wanted = 3 * F.linear(x, modulated(layer), base.bias).tanh()
    assert_alike(layer, x, layer(x), wanted)
    assert type(base).__name__ == type(layer.get_base_layer()).__name__
    assert torch.equal(base(x), plain)


class Remembering(nn.Linear):
    """Counts its calls, and keeps what it saw as an attribute and in a buffer."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("mean", torch.zeros(()))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen = x.detach()
        self.mean = 0.5 * self.mean + x.detach().mean()
        return super().forward(x) + self.mean


def test_what_a_forward_assigns_stays():
    layer, x = hira.Linear(Remembering(7, 5), "default", config()), torch.randn(3, 7)
    base = layer.get_base_layer()
    W0, attributes = base.weight, set(base.__dict__)
    for calls in (1, 2):
        layer(x)
        assert base.calls == calls
    assert torch.equal(base.seen, x)
    torch.testing.assert_close(base.mean, 1.5 * x.mean())
    assert base.weight is W0
    assert set(base.__dict__) == attributes | {"seen"}


def test_an_error_leaves_nothing_behind():
    layer = hira.Linear(Cosine(7, 5), "default", config())
    before = dict(layer.get_base_layer().__dict__)
    with pytest.raises(RuntimeError):
        layer(torch.randn(3, 6))
    assert layer.get_base_layer().__dict__ == before


def test_threads_share_a_layer():
    layer = hira.Linear(Cosine(7, 5), "default", config()).double()
    inputs, W = [vectors() for _ in range(64)], modulated(layer)
    wanted = [with_weight(layer, W, x) for x in inputs]
    with ThreadPoolExecutor(4) as threads:
        for found, exact in zip(threads.map(layer, inputs), wanted, strict=True):
            torch.testing.assert_close(found, exact, **EXACT)
    assert "weight" not in layer.get_base_layer().__dict__


def test_hooks_get_the_base_layer_itself():
    layer, seen = hira.Linear(nn.Linear(7, 5), "default", config()), []
    base = layer.get_base_layer()
    base.register_forward_pre_hook(lambda module, args: seen.append(module))
    base.register_forward_hook(lambda module, args, y: seen.append(module))
    layer(torch.randn(3, 7))
    assert len(seen) == 2
    assert all(module is base for module in seen)


def test_nothing_weight_sized_is_kept_but_the_weight():
    layer, x = hira.Linear(replaced(nn.Linear(64, 48)), "default", config()), torch.randn(5, 64)
    layer.get_base_layer().requires_grad_(False)
    W0 = layer.get_base_layer().weight
    kept = kept_for_backward(lambda: layer(x))
    assert kept.pop(address(W0)) == W0.nbytes
    assert max(kept.values()) < W0.nbytes


@pytest.mark.parametrize("base", [output_hooked(nn.Embedding(9, 5)), Gemma3TextScaledWordEmbedding(9, 5, 0, 7.0)])
def test_an_embedding_forms_the_rows_that_are_looked_up(base, monkeypatch):
    layer = hira.Embedding(base, "default", config())
    monkeypatch.setattr(effective_weight, "form", lambda *_, **__: pytest.fail("the whole table was formed"))
    rows: list[int] = []
    ops = sys.modules["hira.ops.embedding"]
    product = ops._product
    monkeypatch.setattr(ops, "_product", lambda found, *args: rows.append(len(found)) or product(found, *args))
    layer(ids()).sum().backward()
    assert rows
    assert set(rows) == {ids().numel()}


@pytest.mark.parametrize("case", ["cosine head", "hooks", "weight standardisation", "a scaled embedding"])
def test_compiled_as_one_graph(case):
    torch._dynamo.reset()  # the limit of recompilations counts those of other tests
    layer, x = adapted(CASES[case]), CASES[case].x()
    y = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    assert_alike(layer, x, y, layer(x))
    assert "weight" not in layer.get_base_layer().__dict__


class Offloaded(nn.Module):
    """Layers with forwards of their own, and one whose weight is read."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = Gemma3TextScaledWordEmbedding(9, 7, 0, 7.0), Cosine(7, 5)
        self.read, self.last = nn.Linear(7, 5), Remembering(5, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return self.last(self.head(x) + F.linear(x, self.read.weight))


def test_offloaded_weights():
    accelerate = pytest.importorskip("accelerate")
    base = Offloaded().double()
    targets = ["table", "head", "read", "last"]
    in_memory = peft.get_peft_model(copy.deepcopy(base), config(target_modules=targets)).double()
    offloaded = peft.get_peft_model(accelerate.cpu_offload(base, torch.device("cpu")), config(target_modules=targets))
    factors = {name: p for name, p in in_memory.named_parameters() if "hira_" in name}
    for name, parameter in offloaded.named_parameters():
        if name in factors:
            parameter.data = factors[name].detach().clone()
    outputs = offloaded(ids()), in_memory(ids())
    torch.testing.assert_close(*outputs, **EXACT)
    for y in outputs:
        y.square().sum().backward()
    for name, parameter in offloaded.named_parameters():
        if name in factors:
            torch.testing.assert_close(parameter.grad, factors[name].grad, **EXACT)
        else:
            assert parameter.is_meta
    assert offloaded.base_model.model.last.get_base_layer().calls == 1


class Noisy(nn.Linear):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5)


class NoisyEmbedding(nn.Embedding):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5)


@pytest.mark.parametrize("base", [Noisy(6, 5), NoisyEmbedding(7, 5)], ids=["linear", "embedding"])
def test_dropout_of_an_adapter_that_does_nothing_changes_no_random_forward(base):
    layer = dispatch(base, "default", hira.HiraConfig(r=2, hira_dropout=0.5)).train()
    x = torch.randint(7, (3, 4)) if isinstance(base, nn.Embedding) else torch.randn(3, 6)
    for seed in range(3):
        torch.manual_seed(seed)
        expected = base(x)
        torch.manual_seed(seed)
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("order", [("lora", "hira"), ("hira", "lora")], ids=" inside ".join)
def test_under_dropout_another_tuner_draws_once_and_hooks_run_once(order):
    model = nn.Sequential(nn.Linear(6, 5))
    configs = {
        "lora": LoraConfig(r=2, target_modules=["0"], lora_dropout=0.5, init_lora_weights=False),
        "hira": HiraConfig(r=2, target_modules=["0"], hira_dropout=0.5),
    }
    mixed = PeftMixedModel(model, configs[order[0]], adapter_name=order[0])
    mixed.add_adapter(order[1], configs[order[1]])
    mixed.set_adapter(["lora", "hira"])
    x, calls = torch.randn(40, 6), []
    layer = model[0].train()
    base = layer.get_base_layer()
    base.register_forward_hook(lambda *_: calls.append(1))
    change = layer(x) - base(x)
    assert calls == [1, 1]
    lora = next(module for module in layer.modules() if isinstance(module, peft.tuners.lora.LoraLayer))
    update = lora.lora_B["lora"].weight @ lora.lora_A["lora"].weight * lora.scaling["lora"]
    # in each row the change is the update of some of x's entries, doubled
    kept = torch.linalg.lstsq(update, change.mT).solution
    assert float((update @ kept - change.mT).norm()) < 1e-4
    assert 0.2 < float(change.norm() / (2 * x @ update.T).norm()) < 1.2
