"""Every storage of a base weight by the same laws: forward, gradients, memory, merging, saving, mixed batches."""

from __future__ import annotations

import copy
import math
from typing import Any

import base_layers
import pytest
import torch
import torch.nn.functional as F
from autograd_memory import address, kept_for_backward
from oracle import error
from peft import PeftModel, get_peft_model
from storages import CASES, IN, OUT, StorageCase
from torch import Tensor, nn

import hira
from hira import HiraError, ops
from hira.ops import reference

pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
    pytest.mark.filterwarnings("ignore:Already following adapters were merged"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
]

R = 3
NAMES = ("a", "b", "c")


def _parametrised(cases: list[StorageCase]) -> Any:
    missing = [pytest.mark.skipif(case.installed is None, reason=f"{case.package} is not installed") for case in cases]
    params = [pytest.param(case, id=case.id, marks=mark) for case, mark in zip(cases, missing, strict=True)]
    return pytest.mark.parametrize("case", params)


every_storage = _parametrised(list(CASES))
every_writable_storage = _parametrised([case for case in CASES if case.write is not None])
both_or_one = pytest.mark.parametrize("names", [NAMES[:1], NAMES], ids=["one adapter", "three adapters"])


def config(**options) -> hira.HiraConfig:
    return hira.HiraConfig(**{"r": R, "init_weights": False, **options})


def adapted(case: StorageCase, names: tuple[str, ...] = NAMES[:1], **options) -> Any:
    layer: Any = hira.layers.dispatch.dispatch(
        case.quantise(nn.Linear(IN, OUT, **options)), names[0], hira_config=config()
    )
    for rank, name in enumerate(names[1:], R + 1):
        layer.update_layer(name, rank, config(r=rank))
    layer.set_adapter(list(names))
    return layer


def factors(layer: Any, *names: str) -> tuple[Tensor, Tensor]:
    """A and B of some adapters, joined."""
    A = torch.cat([layer.hira_A[name].detach() for name in names])
    return A, torch.cat([layer.hira_B[name].detach() for name in names], dim=1)


def copies(case: StorageCase, base: Any) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in case.stored(base)]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def results(y: Tensor, dy: Tensor, *tensors: Tensor) -> list[Tensor]:
    return [y.detach(), *torch.autograd.grad(y, tensors, dy.to(y.dtype))]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@every_storage
def test_forward_and_gradients(case, bias):
    layer = adapted(case, bias=bias)
    base, A, B = layer.get_base_layer(), layer.hira_A["a"], layer.hira_B["a"]
    W0 = case.dense(base)
    for dtype in case.inputs:
        x, dy = torch.randn(2, 5, IN, dtype=dtype, requires_grad=True), torch.randn(2, 5, OUT)
        y = layer(x)
        assert y.dtype == base(x).dtype
        exact = [t.detach().double().requires_grad_() for t in (x, A, B)]
        product = case.product(dtype)
        if case.whole:
            bias_ = base.bias if bias or base.bias is not None else None
            wanted = reference.linear(exact[0], W0.double(), *exact[1:], None if bias_ is None else bias_.double())
            W = reference.modulated_weight(W0, A, B).to(product)
            plain = F.linear(x.to(product), W, None if bias_ is None else bias_.to(product)).to(y.dtype)
            expected, usual = results(wanted, dy, *exact), results(plain, dy, x, A, B)
        else:
            update = F.linear(exact[0], W0.double() * reference.delta(*exact[1:]))
            of_base, expected = results(base(x), dy, x), results(update, dy, *exact)
            expected[0], expected[1] = expected[0] + of_base[0], expected[1] + of_base[1]
            plain = base(x) + F.linear(x, (W0 * reference.delta(A, B)).to(product))
            usual = results(plain, dy, x, A, B)
        for found, right, ordinary in zip(results(y, dy, x, A, B), expected, usual, strict=True):
            # rounding W' with a dither errs by 0.41 units where rounding to nearest errs by 0.29
            assert error(found, right) <= 1.5 * error(ordinary, right) + 1e-7


@every_storage
def test_several_adapters_and_dropout(case):
    layer = adapted(case, NAMES)
    base, x = layer.get_base_layer(), torch.randn(4, IN, dtype=case.inputs[0])
    dropped = layer.hira_dropout["b"] = nn.Dropout(0.5)
    dropped.forward = lambda x: 3 * x
    W0, product = case.dense(base), case.product(x.dtype)
    of_b, of_others = (
        F.linear(x.to(product), (W0 * reference.delta(*factors(layer, *names))).to(product)) for names in ("b", "ac")
    )
    wanted = base(x) + (of_others + 3 * of_b).to(x.dtype)
    epsilon = max(torch.finfo(dtype).eps for dtype in (product, W0.dtype))
    assert error(layer(x), wanted) <= 4 * epsilon
    assert error(layer.eval()(x), base(x) + (of_others + of_b).to(x.dtype)) <= 4 * epsilon


@every_storage
def test_nothing_weight_sized_is_kept(case):
    layer = adapted(case)
    base = layer.get_base_layer()
    x = torch.randn(2, IN, dtype=case.inputs[0], requires_grad=True)
    kept = kept_for_backward(lambda: layer(x))
    known = {address(tensor) for tensor in (x, *case.stored(base), layer.hira_A["a"], layer.hira_B["a"])}
    assert sum(nbytes for at, nbytes in kept.items() if at not in known) < IN * OUT // 4


@every_storage
def test_disabled(case):
    layer = adapted(case, NAMES)
    x = torch.randn(4, IN, dtype=case.inputs[0])
    y = layer(x)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.get_base_layer()(x))
    layer.enable_adapters(True)
    assert torch.equal(layer(x), y)


@every_storage
def test_a_new_adapter_does_nothing(case):
    base = case.quantise(nn.Linear(IN, OUT))
    x = torch.randn(4, IN, dtype=case.inputs[0])
    W0, bias, y = case.dense(base).double(), base.bias.detach().double(), base(x)
    layer: Any = hira.layers.dispatch.dispatch(base, "default", hira_config=hira.HiraConfig(r=R))
    if case.whole:  # the base layer may sum in another order, as exact as this one
        exact = F.linear(x.double(), W0, bias)
        assert error(layer(x), exact) <= 1.5 * error(y, exact) + 1e-7
    else:
        assert torch.equal(layer(x), y)


@every_storage
def test_mixed_batch(case):
    layer = adapted(case, NAMES).eval()
    x = torch.randn(5, 3, IN, dtype=case.inputs[0])
    rows = ["b", "__base__", "a", "c", "b"]
    with torch.no_grad():
        y = layer(x, adapter_names=rows)
        for row, name in enumerate(rows):
            if name == "__base__":
                wanted = layer.get_base_layer()(x[row : row + 1])
            else:
                layer.set_adapter(name)
                wanted = layer(x[row : row + 1])
            torch.testing.assert_close(y[row : row + 1], wanted)


@both_or_one
@every_writable_storage
def test_a_merge_stores_the_sum(case, names):
    layer = adapted(case, names)
    base = layer.get_base_layer()
    merged = case.write(base, ops.modulated_weight(case.dense(base), *factors(layer, *names)))
    layer.merge()
    assert torch.equal(case.dense(base), merged)
    x = torch.randn(4, IN, dtype=case.inputs[0])
    assert torch.equal(layer(x), base(x))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
@every_writable_storage
def test_unmerging_is_exact(case, training):
    layer = adapted(case, NAMES).train(training)
    base, x = layer.get_base_layer(), torch.randn(4, IN, dtype=case.inputs[0])
    before, y = copies(case, base), layer(x)
    at_once = []
    for turns in (["a"], ["b", "c"]), (["a", "b", "c"],), (["c"],):
        for names in turns:
            layer.merge(adapter_names=names)
        assert not same(copies(case, base), before)
        at_once.append(copies(case, base))
        layer.unmerge()
        assert same(copies(case, base), before)
        assert torch.equal(layer(x), y)
    assert same(at_once[0], at_once[1])  # one after the other is all at once


@every_writable_storage
def test_a_merge_that_is_refused_changes_nothing(case):
    layer = adapted(case, NAMES)
    base = layer.get_base_layer()
    layer.merge(adapter_names=["a"])
    before = copies(case, base)
    with torch.no_grad():
        layer.hira_A["b"][1, 2] = math.nan
    with pytest.raises(HiraError, match=r"NaNs.* b,c"):
        layer.merge(safe_merge=True)
    assert same(copies(case, base), before)
    assert layer.merged_adapters == ["a"]


class Body(nn.Module):
    def __init__(self, case: StorageCase) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = case.quantise(nn.Linear(IN, OUT))
        self.second = nn.Linear(OUT, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)).to(self.second.weight.dtype))


def model_and_inputs(case: StorageCase) -> tuple[Any, Tensor]:
    model = get_peft_model(Body(case), config(target_modules=["first", "second"]))
    return model, torch.randn(16, IN, dtype=case.inputs[0])


def test_the_documentation_has_the_tables_of_the_tests():
    page = base_layers.PAGE.read_text()
    assert base_layers.with_tables(page) == page
    assert all(f"| {case.name} |" in page for case in CASES)


@every_storage
def test_saved_and_loaded(case, tmp_path):
    model, x = model_and_inputs(case)
    y = model.eval()(x)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Body(case), tmp_path).eval()
    assert torch.equal(loaded(x), y)


@every_storage
def test_trained(case):
    model, x = model_and_inputs(case)
    base = model.base_model.model.first.get_base_layer()
    before = copies(case, base)
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=0.02)
    losses = []
    for _ in range(20):
        loss = (model(x) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert same(copies(case, base), before)


@every_storage
def test_copied(case):
    model, x = model_and_inputs(case)
    y = model.eval()(x)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), y)
    if case.write is not None:
        copied.merge_adapter()
        assert torch.equal(model(x), y)
        copied.unmerge_adapter()
        assert torch.equal(copied(x), y)


@every_writable_storage
def test_merged_and_unloaded(case):
    model, _ = model_and_inputs(case)
    layer = model.eval().base_model.model.first
    base = layer.get_base_layer()
    merged = case.write(base, ops.modulated_weight(case.dense(base), *factors(layer, "default")))
    unloaded = model.merge_and_unload()
    assert unloaded.first is base
    assert torch.equal(case.dense(base), merged)


@_parametrised([case for case in CASES if case.write is None])
def test_what_cannot_be_written_is_not_merged(case):
    model, x = model_and_inputs(case)
    base = model.eval().base_model.model.first.get_base_layer()
    before, y = copies(case, base), model(x)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(HiraError, match=r"^first: .*weight"):
            merge()
    assert same(copies(case, base), before)
    assert torch.equal(model(x), y)
    assert model.unload().first is base
