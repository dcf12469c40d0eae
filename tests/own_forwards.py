"""Base layers whose forward is not the plain one of their type, and what they compute with W'."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding
from transformers.models.whisper.modeling_whisper import WhisperPositionalEmbedding

import hira
from hira import HiraConfig

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
