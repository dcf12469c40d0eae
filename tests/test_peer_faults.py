"""The silent errors of PEFT's own HiRA: each check fails under stock PEFT 0.21, by its fault, and passes here.

Rows are those of the project's list of faults. The missing ones are rank_pattern and adapter_names, in test_model and
test_mixed_batches.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
from peft import get_peft_model
from stock_peft import stock_peft
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from hira.ops.dither import noise_of, round_into

IDS = torch.tensor([[3, 0, 3, 8], [1, 3, 5, 0]])


def adapted(base: nn.Module, *, autocast_adapter_dtype: bool = True, **options) -> Any:
    """A model with one layer, base, under whichever HiRA is registered; its update is as large as its weight."""
    options = {"r": 4, "target_modules": ["0"], "init_weights": False, **options}
    return get_peft_model(
        nn.Sequential(base), peft.HiraConfig(**options), autocast_adapter_dtype=autocast_adapter_dtype
    )


def layer_of(model: Any) -> Any:
    return model.base_model.model[0]


def factors_of(layer: Any, name: str = "default") -> tuple[Tensor, Tensor]:
    if name in layer.hira_A:
        return layer.hira_A[name], layer.hira_B[name]
    return layer.hira_embedding_A[name], layer.hira_embedding_B[name]


def exact_weight(W0: Tensor, layer: Any, *names: str) -> Tensor:
    """W0 * (1 + the sum of BA) in float64, for a weight of shape (out, in)."""
    total = sum(B.double() @ A.double() for A, B in (factors_of(layer, name) for name in names or ["default"]))
    return W0.double() * (1 + total)


def assert_merging_changes_nothing(model: Any, x: Tensor) -> None:
    before = model(x)
    model.merge_adapter()
    # the same float32 sum in two orders; the faults are beyond a tenth of the scale
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)


# 3 and 4: what the base layer does besides its weight


def padding_mode(mode: str) -> None:
    model = adapted(nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode))
    assert_merging_changes_nothing(model, torch.randn(2, 2, 5, 5))


def embed_scale() -> None:
    assert_merging_changes_nothing(adapted(Gemma3TextScaledWordEmbedding(9, 5, 0, embed_scale=3.0)), IDS)


# 5: options of embeddings


def embedding_dropout() -> None:
    model = adapted(nn.Embedding(9, 5), hira_dropout=0.5).train()
    draws = torch.stack([model(IDS) for _ in range(20)])
    assert (draws != draws[0]).any()


def max_norm() -> None:
    rows = adapted(nn.Embedding(9, 5, max_norm=1.0))(IDS)
    assert rows.norm(dim=-1).max() <= 1 + 1e-6


def scale_grad_by_freq() -> None:
    """Each id counts once, however often it occurs."""
    gradients = []
    for ids in (torch.tensor([1, 1, 1, 2]), torch.tensor([1, 2])):
        torch.manual_seed(0)
        model = adapted(nn.Embedding(9, 5, scale_grad_by_freq=True))
        model(ids).sum().backward()
        gradients.append(factors_of(layer_of(model))[0].grad)
    torch.testing.assert_close(*gradients)


def sparse() -> None:
    model = adapted(nn.Embedding(9, 5, sparse=True))
    model(IDS).sum().backward()
    assert factors_of(layer_of(model))[0].grad.is_sparse


def padding_row() -> None:
    base = nn.Embedding(9, 5, padding_idx=3)
    nn.init.normal_(base.weight)
    model = adapted(base)
    model(IDS).sum().backward()
    assert factors_of(layer_of(model))[0].grad[:, 3].eq(0).all()


# 6: init_weights


def gaussian_start_of_a_convolution() -> None:
    """A has a standard deviation of 1 / r, and not the much smaller one of the default start."""
    model = adapted(nn.Conv2d(32, 8, 3), init_weights="gaussian")
    A, B = factors_of(layer_of(model))
    # of 1152 normal numbers; six standard errors of their deviation
    assert abs(A.std() * 4 - 1) < 6 / (2 * A.numel()) ** 0.5
    assert B.eq(0).all()


def unknown_start(base: Callable[[], nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"init_weights.* 'kaiming'"):
        adapted(base(), init_weights="kaiming")


def start_of_none() -> None:
    base, x = nn.Conv1d(2, 3, 2), torch.randn(2, 2, 5)
    torch.testing.assert_close(adapted(base, init_weights=None)(x), base(x))


# 7 and 8: merging into quantised weights


def quantised(bits: int) -> nn.Module:
    dense = nn.Linear(128, 64, bias=False)
    layer = bnb.nn.Linear4bit(128, 64, bias=False) if bits == 4 else bnb.nn.Linear8bitLt(128, 64, False, False)
    layer.load_state_dict(dense.state_dict())
    return layer.to("cpu")


def dequantised(base: Any) -> Tensor:
    if isinstance(base, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state)
    codes, scales = (base.weight.data, base.weight.SCB) if base.state.CB is None else (base.state.CB, base.state.SCB)
    return bnb.functional.int8_vectorwise_dequant(codes, scales)


def quantised_model(bits: int) -> Any:
    body = nn.Sequential(quantised(bits))
    for loaded in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        setattr(body, loaded, loaded.endswith(f"{bits}bit"))
    options = {"r": 4, "target_modules": ["0"], "init_weights": False}
    model = get_peft_model(body, peft.HiraConfig(**options), adapter_name="a")
    model.add_adapter("b", peft.HiraConfig(**options))
    return model


def quantised_sum(bits: int) -> None:
    model = quantised_model(bits)
    layer = layer_of(model)
    exact = exact_weight(dequantised(layer.get_base_layer()), layer, "a", "b")
    model.merge_adapter(["a", "b"])
    found = dequantised(layer.get_base_layer())
    if bits == 4:
        stored = bnb.functional.dequantize_4bit(*bnb.functional.quantize_4bit(exact.float(), quant_type="fp4"))
    else:
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(exact.half())
        stored = bnb.functional.int8_vectorwise_dequant(codes, scales)
    # the cost of storing the exact weight in as many bits, and half as much again
    assert mse_loss(found.double(), exact).sqrt() <= 1.5 * mse_loss(stored.double(), exact).sqrt()


def quantised_unmerge(bits: int) -> None:
    model = quantised_model(bits)
    base = layer_of(model).get_base_layer()
    W0 = dequantised(base)
    model.merge_adapter(["a"])
    model.unmerge_adapter()
    assert torch.equal(dequantised(base), W0)


# 9 to 12: merging


class Tied(nn.Module):
    """An embedding and an output layer that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 5)
        self.head = nn.Linear(5, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


def tied_model(*targets: str) -> Any:
    return get_peft_model(Tied(), peft.HiraConfig(r=4, target_modules=list(targets), init_weights=False))


def merging_a_tied_weight() -> None:
    assert_merging_changes_nothing(tied_model("embed"), IDS)


def unmerging_tied_weights() -> None:
    model = tied_model("embed", "head")
    W0 = model.base_model.model.embed.weight.detach().clone()
    model.merge_adapter()
    model.unmerge_adapter()
    for layer in (model.base_model.model.embed, model.base_model.model.head):
        assert torch.equal(layer.get_base_layer().weight, W0)


def merging_after_a_failed_merge() -> None:
    model = adapted(nn.Linear(5, 4))
    layer = layer_of(model)
    A, _ = factors_of(layer)
    good = A.detach().clone()
    A.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs"):
        model.merge_adapter(safe_merge=True)
    A.data.copy_(good)
    layer.get_base_layer().weight.data.mul_(3)
    assert_merging_changes_nothing(model, torch.randn(3, 5))


@pytest.mark.filterwarnings("ignore:The base weight of")
def loading_while_merged() -> None:
    model = adapted(nn.Linear(5, 4))
    base = layer_of(model).get_base_layer()
    other = {name: torch.randn_like(value) for name, value in base.state_dict().items()}
    model.merge_adapter()
    base.load_state_dict(other)
    model.unmerge_adapter()
    assert torch.equal(base.weight, other["weight"])


def bfloat16_merges_round_once() -> None:
    """With the fixed dither, which decides between the two neighbours of the exact weight."""
    model = adapted(nn.Linear(96, 64, dtype=torch.bfloat16))
    layer = layer_of(model)
    exact = exact_weight(layer.get_base_layer().weight.detach(), layer).detach()
    model.merge_adapter()
    found = layer.get_base_layer().weight
    rounded = round_into(torch.empty_like(found), exact.float(), *noise_of(found))
    # float32 sums of five products are off by some 2^-22, which crosses a border of bfloat16's 2^-8 once in 2^13
    assert (found != rounded).double().mean() < 2**-10
    unit = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - 8)
    assert ((found.double() - exact).abs() < unit).all()


# 13 to 15


def parameters_stay_where_they_are(base: nn.Module, x: Tensor) -> None:
    model = adapted(base.bfloat16(), autocast_adapter_dtype=False)
    for factor in model.parameters():
        factor.data = factor.data.bfloat16()
    before = [parameter.data_ptr() for parameter in model.parameters()]
    layer_of(model).get_delta_weight("default")
    model(x)
    assert [parameter.data_ptr() for parameter in model.parameters()] == before


def attention_output() -> None:
    """An adapter on `out_proj` multiplies what attention gives, as adapting a copy of its weight does."""
    options = {"r": 4, "target_modules": ["out_proj"], "init_weights": False}
    attention, x = nn.MultiheadAttention(4, 2, batch_first=True), torch.randn(2, 3, 4)
    before = attention(x, x, x)[0]
    model = get_peft_model(attention, peft.HiraConfig(**options))
    layer = model.base_model.model.out_proj
    A, B = factors_of(layer)
    after = model(x, x, x)[0]
    assert not torch.allclose(after, before)
    layer.get_base_layer().weight.data.mul_(1 + B.detach() @ A.detach())
    with model.disable_adapter():
        torch.testing.assert_close(model(x, x, x)[0], after)


def unknown_names() -> None:
    module = importlib.import_module("peft.tuners.hira")
    with pytest.raises(AttributeError, match="'anything'"):
        module.anything  # noqa: B018


LINEAR, CONV = (lambda: nn.Linear(4, 4)), (lambda: nn.Conv1d(4, 4, 2))

# row, the check and its arguments
FAULTS: list[tuple[int, Callable[..., None], Callable[[], tuple[Any, ...]]]] = [
    *((3, padding_mode, lambda mode=mode: (mode,)) for mode in ("reflect", "replicate", "circular")),
    (4, embed_scale, tuple),
    *((5, check, tuple) for check in (embedding_dropout, max_norm, scale_grad_by_freq, sparse, padding_row)),
    (6, gaussian_start_of_a_convolution, tuple),
    (6, unknown_start, lambda: (CONV,)),
    (6, unknown_start, lambda: (lambda: nn.Embedding(9, 5),)),
    (6, start_of_none, tuple),
    *((7, quantised_sum, lambda bits=bits: (bits,)) for bits in (4, 8)),
    *((8, quantised_unmerge, lambda bits=bits: (bits,)) for bits in (4, 8)),
    (9, merging_a_tied_weight, tuple),
    (9, unmerging_tied_weights, tuple),
    (10, merging_after_a_failed_merge, tuple),
    (11, loading_while_merged, tuple),
    (12, bfloat16_merges_round_once, tuple),
    (13, parameters_stay_where_they_are, lambda: (LINEAR(), torch.randn(2, 4).bfloat16())),
    (13, parameters_stay_where_they_are, lambda: (CONV(), torch.randn(2, 4, 5).bfloat16())),
    (13, parameters_stay_where_they_are, lambda: (nn.Embedding(9, 5), IDS)),
    (14, attention_output, tuple),
    (15, unknown_names, tuple),
]


@pytest.mark.filterwarnings(
    "ignore::UserWarning:peft", "ignore:The base weight of", "ignore:Merge hira", "ignore:Unmerge"
)
@pytest.mark.parametrize(
    ("check", "arguments"), [fault[1:] for fault in FAULTS], ids=[f"{row}-{check.__name__}" for row, check, _ in FAULTS]
)
def test_stock_peft_fails_and_hira_does_not(check, arguments):
    torch.manual_seed(0)
    with stock_peft(), pytest.raises((AssertionError, pytest.fail.Exception)):
        check(*arguments())
    torch.manual_seed(0)
    check(*arguments())
