"""Against PEFT's own HiRA in one process, where PEFT is right: outputs, gradients, starts, merged weights, training.

A result may be off from the exact one, the reference's in float64, by three times PEFT's error of it, or by three units
of rounding of the dtype where PEFT's error is less than one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import peft
import pytest
import torch
from oracle import error
from peft import get_peft_model
from stock_peft import stock_peft
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

import hira
from hira.ops import reference

IDS = torch.tensor([[3, 0, 3, 8], [1, 3, 5, 0]])
FEW = 3.0
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
DTYPES = [torch.float32, torch.bfloat16, torch.float64]

KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(48, 40), lambda: torch.randn(2, 5, 48)),
    "linear without bias": (lambda: nn.Linear(63, 5, bias=False), lambda: torch.randn(7, 63)),
    "Conv1D": (lambda: Conv1D(40, 48), lambda: torch.randn(2, 5, 48)),
    "embedding": (lambda: nn.Embedding(9, 24), lambda: IDS),
    "1d": (lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1), lambda: torch.randn(2, 6, 11)),
    "1d same": (lambda: nn.Conv1d(6, 8, 3, padding="same", dilation=2, bias=False), lambda: torch.randn(2, 6, 11)),
    "2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 1)), lambda: torch.randn(2, 4, 7, 6)),
    "2d point": (lambda: nn.Conv2d(16, 12, 1), lambda: torch.randn(2, 16, 3, 3)),
    "3d": (lambda: nn.Conv3d(4, 4, 2, padding=1), lambda: torch.randn(2, 4, 3, 4, 3)),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is")


def model(kind: str, dtype: torch.dtype, names: tuple[str, ...] = ("default",), **options) -> Any:
    """A model of one layer, made by the HiRA that is registered."""
    torch.manual_seed(0)
    body = nn.Sequential(KINDS[kind][0]()).to(dtype)
    autocast = options.pop("autocast_adapter_dtype", True)
    for rank, name in enumerate(names, start=3):
        config = peft.HiraConfig(**{"r": rank, "target_modules": ["0"], "init_weights": False, **options})
        if name == names[0]:
            adapted = get_peft_model(body, config, adapter_name=name, autocast_adapter_dtype=autocast)
        else:
            adapted.add_adapter(name, config, autocast_adapter_dtype=autocast)
    adapted.base_model.set_adapter(list(names))
    return adapted


def both(kind: str, dtype: torch.dtype = torch.float32, *args, **options) -> tuple[Any, Any]:
    """PEFT's and ours, of the same seed."""
    with stock_peft():
        stock = model(kind, dtype, *args, **options)
    assert not isinstance(stock.base_model.model[0], hira.HiraLayer)
    ours = model(kind, dtype, *args, **options)
    assert isinstance(ours.base_model.model[0], hira.HiraLayer)
    return stock, ours


def factors(adapted: Any) -> dict[str, Tensor]:
    return {name: value for name, value in adapted.named_parameters() if "hira_" in name}


def inputs(kind: str, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(1)
    x = KINDS[kind][1]()
    return x.to(dtype).requires_grad_() if x.is_floating_point() else x


def results(adapted: Any, x: Tensor, autocast: torch.dtype | None = None) -> list[Tensor]:
    """The output, and the gradients of the factors and of x, for one gradient of the output."""
    with torch.autocast("cpu", dtype=autocast) if autocast else nullcontext():
        y = adapted(x)
    tensors = [*factors(adapted).values(), *([x] if x.requires_grad else [])]
    dy = torch.linspace(-1, 1, y.numel()).view(y.shape).cos()
    return [y.detach(), *torch.autograd.grad(y, tensors, dy.to(y.dtype))]


class Exact(nn.Module):
    """The reference, in float64, with the factors under the names that PEFT gives them."""

    def __init__(self, adapted: Any) -> None:
        super().__init__()
        layer = adapted.base_model.model[0]
        self.base = copy.deepcopy(layer.get_base_layer()).double()
        for name, value in factors(adapted).items():
            self.register_parameter(name.replace(".", "_"), nn.Parameter(value.detach().double()))
        self.As = [name for name, _ in self.named_parameters() if "_A_" in name]

    def weight(self) -> Tensor:
        total = sum(reference.delta(getattr(self, A), getattr(self, A.replace("_A_", "_B_"))) for A in self.As)
        stored_transposed = isinstance(self.base, nn.Embedding | Conv1D)
        return self.base.weight.detach() * (1 + (total.t() if stored_transposed else total))

    def forward(self, x: Tensor) -> Tensor:
        return functional_call(self.base, {"weight": self.weight()}, (x,))


def assert_parity(stock: Any, ours: Any, x: Tensor, autocast: torch.dtype | None = None) -> None:
    exact_x = x.detach().double().requires_grad_() if x.requires_grad else x
    exact = results(Exact(ours), exact_x)
    unit = UNIT[autocast or stock.base_model.model[0].get_base_layer().weight.dtype]
    of_oracle = unit if unit == UNIT[torch.float64] else 0.0  # the oracle is in float64 too, and errs as much
    peers, mine = results(stock, x, autocast), results(ours, x, autocast)
    for position, (m, p, e) in enumerate(zip(mine, peers, exact, strict=True)):
        assert (m.dtype, m.shape) == (p.dtype, p.shape)
        assert error(m, e) <= FEW * (max(error(p, e), unit) + of_oracle), (position, error(m, e), error(p, e))
        assert error(p, e) <= 10 * unit, "PEFT is not right here"


@every_dtype
@every_kind
def test_outputs_and_gradients(kind, dtype):
    stock, ours = both(kind, dtype)
    assert_parity(stock, ours, inputs(kind, dtype))


@every_dtype
@every_kind
def test_several_adapters(kind, dtype):
    stock, ours = both(kind, dtype, ("first", "second", "third"))
    assert_parity(stock, ours, inputs(kind, dtype))


@pytest.mark.parametrize("kind", ["linear", "Conv1D", "2d", "1d"])
def test_autocast(kind):
    stock, ours = both(kind, torch.float32)
    assert_parity(stock, ours, inputs(kind, torch.float32), torch.bfloat16)


@every_kind
def test_low_precision_factors(kind):
    """PEFT rounds BA too, here it is in float32."""
    stock, ours = both(kind, torch.bfloat16, autocast_adapter_dtype=False)
    assert {value.dtype for value in factors(ours).values()} == {torch.bfloat16}
    assert_parity(stock, ours, inputs(kind, torch.bfloat16))


@pytest.mark.parametrize("start", [True, False, "gaussian"])
@every_dtype
@every_kind
def test_the_same_seed_gives_the_same_adapter(kind, dtype, start):
    if start == "gaussian" and kind[0].isdigit():
        start = True  # PEFT ignores it for convolutions: test_peer_faults
    with stock_peft():
        stock, after = model(kind, dtype, ("first", "second"), init_weights=start), torch.get_rng_state()
    ours = model(kind, dtype, ("first", "second"), init_weights=start)
    assert torch.equal(torch.get_rng_state(), after)
    assert factors(stock).keys() == factors(ours).keys()
    assert len(factors(ours)) == 4
    for name, value in factors(stock).items():
        assert factors(ours)[name].dtype == value.dtype
        assert torch.equal(factors(ours)[name], value)
        assert factors(ours)[name].requires_grad == value.requires_grad


@every_dtype
@every_kind
def test_merged_weights(kind, dtype):
    stock, ours = both(kind, dtype, ("first", "second"))
    W0 = ours.base_model.model[0].get_base_layer().weight.detach().clone()
    exact = Exact(ours).weight().detach()
    for name in ("first", "second"):
        deltas = [adapted.base_model.model[0].get_delta_weight(name) for adapted in (stock, ours)]
        torch.testing.assert_close(*deltas)
    weights = []
    for adapted in (stock, ours):
        adapted.merge_adapter()
        weights.append(adapted.base_model.model[0].get_base_layer().weight.detach())
    peers, mine = (error(weight, exact) for weight in weights)
    assert mine <= FEW * max(peers, UNIT[dtype])
    if dtype == torch.bfloat16:  # rounded once here, several times there
        assert mine < peers
    for adapted in (stock, ours):
        adapted.unmerge_adapter()
        assert torch.equal(adapted.base_model.model[0].get_base_layer().weight, W0)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["linear", "Conv1D", "2d"])
def test_dropout_draws_the_same_masks(kind, dropout):
    stock, ours = both(kind, torch.float32, hira_dropout=dropout)
    x = inputs(kind, torch.float32)
    found = []
    for adapted in (stock, ours):
        adapted.train()
        torch.manual_seed(2)
        found.append([*results(adapted, x), torch.rand(1)])
    for mine, peers in zip(*found, strict=True):
        torch.testing.assert_close(mine, peers, rtol=1e-4, atol=1e-5)


def trained(adapted: Any, kind: str) -> list[float]:
    """Losses of a few steps."""
    x = inputs(kind, torch.float32).detach()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(10):
        loss = (adapted(x) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@every_kind
def test_training_takes_the_same_course(kind):
    stock, ours = both(kind, torch.float32, init_weights=True)
    losses, peers = trained(ours, kind), trained(stock, kind)
    assert losses[-1] < losses[0]
    # ten steps from the same point, each with the rounding of float32
    torch.testing.assert_close(losses, peers, rtol=1e-5, atol=0)
    for name, value in factors(stock).items():
        mine = factors(ours)[name].detach()
        assert error(mine, value.detach()) <= 1e-5
