"""How a base weight is read, written and restored; the quantised ways are in test_bitsandbytes."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, weight_norm
from transformers.pytorch_utils import Conv1D

from hira import HiraError
from hira.base_weights.dense import Storage, Transposed

KINDS = {
    "linear": (Storage, lambda: nn.Linear(7, 5), (5, 7)),
    "embedding": (Storage, lambda: nn.Embedding(9, 4), (9, 4)),
    "convolution": (Storage, lambda: nn.Conv2d(3, 4, (2, 1)), (4, 3, 2, 1)),
    "Conv1D": (Transposed, lambda: Conv1D(5, 7), (5, 7)),
    "linear, transposed": (Transposed, lambda: nn.Linear(5, 7), (5, 7)),
}
every_kind = pytest.mark.parametrize(("cls", "make", "shape"), KINDS.values(), ids=KINDS)


@every_kind
def test_reading(cls, make, shape):
    layer = make()
    storage = cls(layer)
    saved, dequantize = storage.saved_for_backward()
    assert dequantize is None
    assert storage.read().shape == shape
    assert torch.equal(storage.read().t() if cls is Transposed else storage.read(), layer.weight)
    # no copy
    assert storage.read().data_ptr() == saved.data_ptr() == layer.weight.data_ptr()
    storage.read().sum().backward()
    assert layer.weight.grad.eq(1).all()


@pytest.mark.parametrize("requires_grad", [True, False])
@every_kind
def test_writing_installs_a_new_parameter(cls, make, shape, requires_grad):
    layer = make().requires_grad_(requires_grad)
    storage, old = cls(layer), layer.weight
    before = old.detach().clone()
    new = torch.randn(shape)
    storage.write(new)
    assert torch.equal(storage.read(), new)
    assert type(layer.weight) is nn.Parameter
    assert layer.weight.requires_grad == requires_grad
    assert layer.weight.shape == old.shape
    assert layer.weight is not old
    assert torch.equal(old, before)
    assert "weight" in layer.state_dict()


@every_kind
def test_a_snapshot_is_the_parameter_and_is_put_back(cls, make, shape):
    layer = make()
    storage, old = cls(layer), layer.weight
    before = old.detach().clone()
    tied = nn.Linear(1, 1)
    tied.weight = old
    snapshot = storage.snapshot()
    for _ in range(2):
        storage.write(torch.randn(shape))
        storage.restore(snapshot)
        assert layer.weight is old is tied.weight
        assert torch.equal(old, before)


def test_what_was_written_is_freed():
    layer = nn.Linear(7, 5)
    storage = Storage(layer)
    snapshot = storage.snapshot()
    storage.write(torch.randn(5, 7))
    written = weakref.ref(layer.weight)
    storage.restore(snapshot)
    assert written() is None
    storage.write(torch.randn(5, 7))
    original = weakref.ref(snapshot)
    del snapshot
    assert original() is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@every_kind
def test_a_dtype_that_changed_in_between(cls, make, shape, dtype):
    layer = make()
    storage = cls(layer)
    before, snapshot = layer.weight.detach().clone(), storage.snapshot()
    storage.write(torch.randn(shape))
    layer.to(dtype)
    storage.restore(snapshot)
    assert layer.weight is snapshot
    assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
    assert torch.equal(layer.weight, before.to(dtype))


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def parametrized() -> nn.Module:
    layer = nn.Linear(7, 5)
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (parametrized, "ParametrizedLinear"),
        (lambda: weight_norm(nn.Linear(7, 5)), "Linear"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Conv1d(3, 4, 2)), "ParametrizedConv1d"),
    ],
    ids=["parametrization", "weight_norm of old", "weight_norm"],
)
@pytest.mark.parametrize("cls", [Storage, Transposed])
def test_a_computed_weight_has_no_snapshot(cls, make, name):
    layer = make()
    message = rf"\b{name}\b.* parametrization"
    with pytest.raises(HiraError, match=message):
        cls(layer).snapshot()
    assert torch.equal(Storage(layer).read(), layer.weight)
