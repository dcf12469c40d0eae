"""What HiRA layers of all kinds share: dropout, several adapters, other forwards, copies, autocast, checkpointing."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import peft
import pytest
import torch
import torch.nn.functional as F
from conftest import error
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import hira
from hira import HiraConfig, HiraError
from hira.ops import reference

# Sums of at most a few hundred float64 products in another order.
EXACT = {"rtol": 1e-12, "atol": 1e-12}
IDS = torch.tensor([[3, 0, 3, 8], [1, 3, 5, 0]])


def linear_input() -> Tensor:
    return torch.randn(3, 7, dtype=torch.float64)


KINDS: dict[str, tuple[type[hira.HiraLayer], Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (hira.Linear, lambda: nn.Linear(7, 5), linear_input),
    "Conv1D": (hira.Linear, lambda: Conv1D(5, 7), linear_input),
    "embedding": (hira.Embedding, lambda: nn.Embedding(9, 5), lambda: IDS),
    "convolution": (
        hira.Conv2d,
        lambda: nn.Conv2d(3, 4, (2, 3), padding=1, padding_mode="reflect"),
        lambda: torch.randn(2, 3, 5, 6, dtype=torch.float64),
    ),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def config(r: int = 3, **options) -> HiraConfig:
    return HiraConfig(r=r, init_weights=False, **options)


def adapted(kind: str = "linear", base: nn.Module | None = None, **options) -> Any:
    cls, make, _ = KINDS[kind]
    layout = {"fan_in_fan_out": True} if kind == "Conv1D" else {}
    return cls(make() if base is None else base, "default", config(**options), **layout).double()


def delta(layer: Any, *names: str) -> Tensor:
    """The sum of BA over adapters, as the base layer stores its weight."""
    total = 0
    for name in names or layer.active_adapters:
        A, B = (factors[name] for factors in layer._factor_dicts)
        BA = reference.delta(A.double(), B.double()).to(layer.get_base_layer().weight.dtype)
        total = total + (BA.t() if isinstance(layer, hira.Embedding) or getattr(layer, "fan_in_fan_out", False) else BA)
    return total


def with_weight(layer: Any, weight: Tensor, x: Tensor, *, bias: bool = True) -> Tensor:
    """The base layer's output with another weight."""
    base = layer.get_base_layer()
    tensors = {"weight": weight}
    if getattr(base, "bias", None) is not None and not bias:
        tensors["bias"] = torch.zeros_like(base.bias)
    return torch.func.functional_call(base, tensors, (x,))


def expected(layer: Any, x: Tensor, *names: str) -> Tensor:
    return with_weight(layer, layer.get_base_layer().weight * (1 + delta(layer, *names)), x)


def update(layer: Any, x: Tensor, *names: str) -> Tensor:
    return with_weight(layer, layer.get_base_layer().weight * delta(layer, *names), x, bias=False)


def gradients(y: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape).cos()
    return list(torch.autograd.grad(y, tensors, dy, allow_unused=True))


def assert_alike(layer: nn.Module, found: Tensor, wanted: Tensor, x: Tensor | None = None) -> None:
    """Equal outputs, and equal gradients of the parameters that require them, and of x."""
    torch.testing.assert_close(found, wanted, **EXACT)
    tensors = [p for p in layer.parameters() if p.requires_grad]
    tensors += [x] if x is not None and x.requires_grad else []
    for mine, other in zip(gradients(found, tensors), gradients(wanted, tensors), strict=True):
        if other is None:
            assert mine is None
        else:
            torch.testing.assert_close(mine, other, **EXACT)


def random_input(kind: str) -> Tensor:
    x = KINDS[kind][2]()
    return x.requires_grad_() if x.is_floating_point() else x


# Dropout


@pytest.mark.parametrize("kind", ["linear", "Conv1D", "convolution"])
def test_dropout_is_on_the_input_of_the_update(kind, monkeypatch):
    layer = adapted(kind, hira_dropout=0.5)
    x = random_input(kind)
    mask = 2 * (torch.rand(x.shape) < 0.5).double()
    monkeypatch.setattr(layer.hira_dropout["default"], "forward", lambda x: x * mask)
    base = with_weight(layer, layer.get_base_layer().weight, x)
    assert_alike(layer, layer(x), base + update(layer, x * mask), x)
    layer.eval()
    assert_alike(layer, layer(x), expected(layer, x), x)


def test_dropout_of_an_embedding_drops_whole_tokens(monkeypatch):
    layer = adapted("embedding", hira_dropout=0.5)
    mask = torch.tensor([[2.0, 0, 2, 0], [0, 2, 2, 0]]).double()

    def forward(ones: Tensor) -> Tensor:
        assert torch.equal(ones, torch.ones(IDS.shape))
        return ones * mask

    monkeypatch.setattr(layer.hira_dropout["default"], "forward", forward)
    base = with_weight(layer, layer.get_base_layer().weight, IDS)
    assert_alike(layer, layer(IDS), base + mask.unsqueeze(-1) * update(layer, IDS))
    layer.eval()
    assert_alike(layer, layer(IDS), expected(layer, IDS))


@every_kind
def test_dropout_as_torch_draws_it(kind):
    """In the mean over many draws the output is that without dropout; the base's part is never dropped."""
    layer = adapted(kind, hira_dropout=0.4)
    x = KINDS[kind][2]()
    with torch.no_grad():
        base, full = with_weight(layer, layer.get_base_layer().weight, x), expected(layer, x)
        draws = torch.stack([layer(x) for _ in range(2000)])
    assert not torch.equal(draws[0], draws[1])
    # six standard errors
    assert ((draws.mean(0) - full).abs() <= 6 * draws.std(0) / math.sqrt(len(draws)) + 1e-12).all()
    if kind == "embedding":  # each token has its whole update or none
        kept = base + (full - base) / 0.6
        whole = (draws - kept).abs().amax(-1) < 1e-6  # the mask, divided by 1 - p, is in float32
        none = (draws - base).abs().amax(-1) < 1e-12
        assert (whole ^ none).all()
        assert abs(whole.double().mean() - 0.6) < 0.05


def test_dropout_of_some_of_several_adapters(monkeypatch):
    layer = adapted(hira_dropout=0.0)
    for name in ("b", "c"):
        layer.update_layer(name, 2, config(2, hira_dropout=0.5))
    layer.update_layer("d", 1, config(1))
    layer.set_adapter(["default", "b", "c", "d"])
    layer.double()
    x = random_input("linear")
    for name, factor in (("b", 3), ("c", 5)):
        monkeypatch.setattr(layer.hira_dropout[name], "forward", lambda x, factor=factor: factor * x)
    wanted = expected(layer, x, "default", "d") + 3 * update(layer, x, "b") + 5 * update(layer, x, "c")
    assert_alike(layer, layer(x), wanted, x)


def test_dropout_of_zero_makes_no_module():
    layer = adapted(hira_dropout=0.0)
    assert type(layer.hira_dropout["default"]) is nn.Identity
    layer.update_layer("other", 2, config(2, hira_dropout=0.25))
    assert layer.hira_dropout["other"].p == 0.25


# Base layers that are not plain


class Doubling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Asking(nn.Linear):
    def forward(self, x: Tensor, scale: float = 1.0, *, shift: float = 0.0) -> Tensor:
        return super().forward(x) * scale + shift


def spy(layer: Any, monkeypatch) -> list[str]:
    """Notes which of the two forms run."""
    ran = []
    for name in ("_product", "_update"):
        method = getattr(layer, name)
        monkeypatch.setattr(layer, name, lambda *args, m=method, n=name: (ran.append(n), m(*args))[1])
    return ran


def test_a_plain_layer_costs_one_product(monkeypatch):
    layer = adapted()
    ran = spy(layer, monkeypatch)
    layer(linear_input())
    assert ran == ["_product"]


def test_a_forward_of_its_own(monkeypatch):
    layer = adapted(base=Doubling(7, 5))
    ran, x = spy(layer, monkeypatch), random_input("linear")
    wanted = 2 * F.linear(x, layer.weight * (1 + delta(layer)), layer.bias)
    assert_alike(layer, layer(x), wanted, x)
    assert ran == []


def test_a_forward_set_on_the_layer(monkeypatch):
    layer = adapted()
    base, x = layer.get_base_layer(), random_input("linear")
    plain, wanted = base.forward, 1 + expected(layer, x)
    base.forward = lambda x: plain(x) + 1
    ran = spy(layer, monkeypatch)
    assert_alike(layer, layer(x), wanted, x)
    assert ran == []


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("kind", ["linear", "embedding", "convolution"])
def test_hooks_on_the_base_layer_run(kind, monkeypatch):
    layer = adapted(kind)
    base, x = layer.get_base_layer(), random_input(kind)
    plain = layer(x)
    ran = spy(layer, monkeypatch)
    seen = []
    handles = [
        base.register_forward_hook(lambda module, args, y: seen.append("forward") or 3 * y),
        base.register_forward_pre_hook(lambda module, args: seen.append("before")),
        base.register_full_backward_hook(lambda module, *_: seen.append("backward")),
    ]
    y = layer(x)
    y.sum().backward()
    assert seen == ["before", "forward", "backward"]
    torch.testing.assert_close(y, 3 * plain, **EXACT)
    assert ran == []
    for handle in handles:
        handle.remove()
    assert_alike(layer, layer(x), plain, x if x.requires_grad else None)
    assert ran == ["_product"]


def test_arguments_reach_the_base_layer():
    layer = adapted(base=Asking(7, 5))
    x = linear_input()
    y = F.linear(x, layer.weight * (1 + delta(layer)), layer.bias)
    torch.testing.assert_close(layer(x), y, **EXACT)
    torch.testing.assert_close(layer(x, 2.0, shift=1.0), 2 * y + 1, **EXACT)
    torch.testing.assert_close(layer(x, scale=3.0), 3 * y, **EXACT)
    with pytest.raises(TypeError):  # as the base layer says, instead of leaving them out
        adapted()(x, 2.0)


@pytest.mark.parametrize("merge_inner", [False, True])
def test_a_lora_layer_inside(merge_inner):
    body = nn.Sequential(nn.Linear(7, 5))
    lora_config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    lora = get_peft_model(body, lora_config).base_model.model[0].double()
    layer = adapted(base=lora)
    x = random_input("linear")
    W0 = layer.get_base_layer().weight.detach().clone()
    inner = F.linear(x, W0 + lora.get_delta_weight("default"), lora.get_base_layer().bias)
    wanted = inner + F.linear(x, W0 * delta(layer))
    torch.testing.assert_close(layer(x), wanted, **EXACT)
    if merge_inner:
        lora.merge()
        torch.testing.assert_close(lora(x), inner, **EXACT)
    else:
        assert all(g is not None for g in gradients(layer(x), [p for p in layer.parameters() if p.requires_grad]))


# Several adapters


@every_kind
@hypothesis.given(ranks=st.lists(st.integers(1, 4), min_size=1, max_size=4), data=st.data())
def test_active_adapters_are_one_of_the_summed_rank(kind, ranks, data):
    torch.manual_seed(0)
    layer = adapted(kind, r=ranks[0])
    names = ["default", *map(str, range(1, len(ranks)))]
    for name, r in zip(names[1:], ranks[1:], strict=True):
        layer.update_layer(name, r, config(r))
    layer.double()
    active = data.draw(st.lists(st.sampled_from(names), unique=True, min_size=1))
    layer.set_adapter(active)
    assert layer.active_adapters == active
    x = random_input(kind)
    y = layer(x)
    assert_alike(layer, y, expected(layer, x), x)
    together = adapted(kind, base=layer.get_base_layer(), r=sum(layer.r[name] for name in active))
    with torch.no_grad():
        for factors, joined in zip(together._factor_dicts, layer._factors(active), strict=True):
            factors["default"].copy_(joined)
    assert torch.equal(together(x), y)


@pytest.mark.parametrize("low", range(4), ids=bin)
def test_adapters_of_other_dtypes_add_up(low):
    """None is rounded to the dtype of another, whichever comes first and last."""
    layer = adapted()
    layer.update_layer("b", 2, config(2))
    layer.update_layer("c", 2, config(2))
    layer.double().set_adapter(["default", "b", "c"])
    dtypes = {name: torch.bfloat16 for name in (["default", "c"], ["b", "c"], ["b"], ["default", "b"])[low]}
    for factors in layer._factor_dicts:
        for name, dtype in dtypes.items():
            factors[name] = nn.Parameter(factors[name].detach().to(dtype))
    x = linear_input()
    torch.testing.assert_close(layer(x), expected(layer, x), **EXACT)
    found = gradients(layer(x), [layer.hira_A[name] for name in layer.active_adapters])
    assert [grad.dtype for grad in found] == [dtypes.get(name, torch.float64) for name in layer.active_adapters]


@every_kind
def test_disabled_adapters(kind):
    layer = adapted(kind)
    x, base = KINDS[kind][2](), layer.get_base_layer()
    y = layer(x)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), base(x))
    assert layer.disable_adapters
    layer.enable_adapters(True)
    assert torch.equal(layer(x), y)
    layer.set_adapter([])
    assert torch.equal(layer(x), base(x))


def test_an_adapter_that_the_layer_does_not_have():
    layer = adapted()
    x = linear_input()
    y = layer(x)
    layer._active_adapter = ["default", "elsewhere"]
    assert torch.equal(layer(x), y)
    layer._active_adapter = ["elsewhere"]
    assert torch.equal(layer(x), layer.get_base_layer()(x))


def test_an_adapter_is_deleted():
    layer = adapted()
    layer.update_layer("other", 2, config(2))
    layer.set_adapter(["default", "other"])
    layer.delete_adapter("other")
    assert layer.r == {"default": 3}
    assert [set(factors) for factors in layer._factor_dicts] == [{"default"}] * 2
    assert set(layer.hira_dropout) == {"default"}
    assert layer.active_adapters == ["default"]


# A name for each row


@every_kind
def test_a_name_for_each_row(kind):
    layer = adapted(kind)
    layer.update_layer("other", 2, config(2))
    layer.double().eval()
    x = KINDS[kind][2]()
    x = torch.cat([x, x.flip(0), x])[:4]
    names = ["other", "__base__", "default", "other"]
    y = layer(x, adapter_names=names)
    base = layer.get_base_layer()
    for row, name in enumerate(names):
        wanted = base(x[row : row + 1]) if name == "__base__" else expected(layer, x[row : row + 1], name)
        torch.testing.assert_close(y[row : row + 1], wanted, **EXACT)
    torch.testing.assert_close(layer(x, adapter_names=["default"] * 4), expected(layer, x, "default"), **EXACT)
    torch.testing.assert_close(layer(x, adapter_names=["__base__"] * 4), base(x), **EXACT)


def test_names_that_do_not_fit_the_rows():
    layer = adapted()
    layer.name = "blocks.0.q"
    x = linear_input()
    message = r"^adapter_names names 2 rows, but blocks\.0\.q got 3; pass one name for each sample of the batch\.$"
    with pytest.raises(HiraError, match=message):
        layer(x, adapter_names=["default", "default"])
    layer.merge()
    message = (
        r"^adapter_names was passed while \['default'\] are merged into blocks\.0\.q; call unmerge_adapter\(\) first\.$"
    )
    with pytest.raises(HiraError, match=message):
        layer(x, adapter_names=["default"] * 3)


# Precision and memory


@pytest.mark.parametrize("form", ["one product", "two products", "dropout"])
@pytest.mark.parametrize("kind", ["linear", "convolution", "embedding"])
def test_autocast(kind, form):
    """Outputs in autocast's dtype, as near to the exact ones as the plain expression's."""
    layer = adapted(kind, hira_dropout=0.5 if form == "dropout" else 0.0).float()
    layer.get_base_layer().requires_grad_(False)
    x = KINDS[kind][2]()
    exact = expected(copy.deepcopy(layer).double(), x).detach()
    x = x.float() if x.is_floating_point() else x
    if form == "two products":
        layer.get_base_layer().register_forward_hook(lambda module, args, y: None)
    if form == "dropout":
        layer.hira_dropout["default"].forward = lambda x: x
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        if form == "one product":
            usual = expected(layer, x)
        else:
            usual = with_weight(layer, layer.get_base_layer().weight, x) + update(layer, x)
    assert y.dtype == usual.dtype
    assert error(y.detach(), exact) <= 2 * error(usual.detach(), exact) + 1e-6
    trained = list(layer._factors(["default"]))
    for found, wanted in zip(gradients(y, trained), gradients(usual, trained), strict=True):
        assert found.dtype == torch.float32
        # each is off the exact one by a few bfloat16 roundings
        assert error(found, wanted) < 2**-6


@pytest.mark.parametrize("reentrant", [True, False])
@every_kind
def test_gradient_checkpointing(kind, reentrant):
    layer = adapted(kind, hira_dropout=0.5)
    x = KINDS[kind][2]()
    outer = torch.ones((), dtype=torch.float64, requires_grad=True)
    x = x * outer if x.is_floating_point() else x

    def run(x: Tensor, one: Tensor) -> Tensor:
        return layer(x) * one

    results = []
    for checkpointed in (False, True):
        torch.manual_seed(5)
        y = checkpoint(run, x, outer, use_reentrant=reentrant) if checkpointed else run(x, outer)
        layer.zero_grad()
        outer.grad = None
        y.square().sum().backward(retain_graph=True)
        results.append([y.detach(), outer.grad, *(p.grad for p in layer.parameters())])
    assert len(results[0]) >= 5
    for plain, again in zip(*results, strict=True):
        torch.testing.assert_close(plain, again, **EXACT)


# Copies and attributes


@pytest.mark.parametrize("merged", [False, True])
@every_kind
def test_copies(kind, merged):
    layer = adapted(kind, hira_dropout=0.25)
    layer.update_layer("other", 2, config(2))
    layer.double().eval().set_adapter(["default", "other"])
    layer.name = "blocks.0"
    x = KINDS[kind][2]()
    if merged:
        layer.merge()
    y = layer(x)
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(stream, weights_only=False)]
    for copied in copies:
        assert type(copied) is type(layer)
        assert torch.equal(copied(x), y)
        assert (copied.r, copied.active_adapters, copied.name) == (layer.r, layer.active_adapters, "blocks.0")
        assert copied.merged_adapters == layer.merged_adapters
        if merged:
            copied.unmerge()
        with torch.no_grad():
            copied.get_base_layer().weight.zero_()
            for parameter in copied.parameters():
                parameter.zero_()
        assert torch.equal(layer(x), y)
    if merged:
        layer.unmerge()
        torch.testing.assert_close(layer(x), y, **EXACT)


def test_a_merged_copy_unmerges_to_its_own_base():
    layer = adapted()
    W0 = layer.get_base_layer().weight
    layer.merge()
    copied = copy.deepcopy(layer)
    copied.unmerge()
    assert torch.equal(copied.get_base_layer().weight, W0)
    assert copied.get_base_layer().weight is not W0
    assert layer.merged


def test_attributes_of_the_base_layer():
    base = nn.Linear(7, 5)
    base.tensor_parallel = ["colwise"]
    layer = adapted(base=base)
    assert layer.tensor_parallel is base.tensor_parallel
    assert layer.bias is base.bias
    assert layer.weight is base.weight
    base.later = 3
    assert layer.later == 3
    with pytest.raises(AttributeError, match="has no attribute 'absent'"):
        layer.absent  # noqa: B018
    base._private = 1
    assert not hasattr(layer, "_private")
    assert repr(layer).startswith("hira.Linear(\n")
    assert not layer.supports_lora_conversion()


@pytest.mark.parametrize("name", ["weight", "storage"])
def test_an_error_in_a_property_surfaces(name, monkeypatch):
    """PyTorch asks `__getattr__` where a property raises an AttributeError, and the base layer has a weight too."""
    layer = adapted()
    layer.weight_is_read = True
    layer.get_base_layer().storage = "of the base layer"
    fault = "_factors" if name == "weight" else "storage_type"
    monkeypatch.setattr(layer, fault, lambda *_: None.absent)
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'absent'"):
        getattr(layer, name)


def test_the_weight_is_read_where_the_model_reads_it():
    layer = adapted()
    assert torch.equal(layer.weight, layer.get_base_layer().weight)
    layer.weight_is_read = True
    wanted = layer.get_base_layer().weight * (1 + delta(layer))
    assert_alike(layer, layer.weight, wanted)
    transposed = adapted("Conv1D")
    transposed.weight_is_read = True
    assert_alike(transposed, transposed.weight, transposed.get_base_layer().weight * (1 + delta(transposed)))


# Starts and ranks


@pytest.mark.parametrize("init_weights", [True, None, "gaussian"])
@every_kind
def test_a_reset_adapter_starts_from_the_base(kind, init_weights):
    layer = adapted(kind, r=50)
    A, B = layer._factors(["default"])
    x = KINDS[kind][2]()
    base = layer.get_base_layer()(x)
    assert not torch.equal(layer(x), base)
    layer.reset_hira_parameters("default", init_weights)
    assert all(after is before for after, before in zip(layer._factors(["default"]), (A, B), strict=True))
    torch.testing.assert_close(layer(x), base, **EXACT)
    zero, random = (A, B) if kind == "embedding" else (B, A)
    assert zero.eq(0).all()
    assert random.ne(0).all()
    wide = 1.0 if kind == "embedding" else {"gaussian": 1 / 50}.get(init_weights, 1 / math.sqrt(3 * A[0].numel()))
    assert abs(random.std().item() / wide - 1) < 0.2


def test_a_reset_that_leaves_all_as_it_is():
    layer = adapted()
    before = [factor.detach().clone() for factor in layer._factors(["default"])]
    layer.reset_hira_parameters("default", False)
    layer.reset_hira_parameters("elsewhere", True)
    message = r"^init_weights must be True, False, None or 'gaussian', not 'olora'\.$"
    with pytest.raises(HiraError, match=message):
        layer.reset_hira_parameters("default", "olora")
    assert all(torch.equal(a, b) for a, b in zip(layer._factors(["default"]), before, strict=True))


@pytest.mark.parametrize("requires_grad", [True, False])
@every_kind
def test_an_adapter_is_resized(kind, requires_grad):
    layer = adapted(kind).to(torch.float64)
    for factor in layer._factors(["default"]):
        factor.requires_grad_(requires_grad)
    layer.resize_adapter("default", 7)
    assert layer.r == {"default": 7}
    factors = layer._factors(["default"])
    assert tuple(tuple(factor.shape) for factor in factors) == layer._factor_shapes(7)
    assert all(f.requires_grad == requires_grad and f.dtype == torch.float64 for f in factors)
    x = KINDS[kind][2]()
    torch.testing.assert_close(layer(x), layer.get_base_layer()(x), **EXACT)


@pytest.mark.parametrize("r", [0, -2, True, 2.0, "2"], ids=repr)
@every_kind
def test_a_bad_rank_leaves_the_layer(kind, r):
    layer = adapted(kind)
    before = set(dict(layer.named_modules())), set(layer.state_dict())
    with pytest.raises(HiraError, match=rf"^`r` should be a positive integer, but r is {r!r}\.$"):
        layer.update_layer("other", r, config())
    assert (set(dict(layer.named_modules())), set(layer.state_dict())) == before
    assert layer.r == {"default": 3}
