"""All or nothing: what `unchanged_on_error` puts back, and what it does not touch."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn

from hira.tuner.transaction import unchanged_on_error


class Stop(Exception):
    pass


def model() -> nn.Module:
    body = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), nn.Linear(4, 2))
    body[0].names = ["one"]
    body[0].ranks = {"one": 1}
    body[0].seen = {"one"}
    body[2].weight.requires_grad_(False)
    return body


def structure(body: nn.Module) -> dict:
    """Everything that is to be put back, by identity."""
    return {
        name: (
            id(module),
            [(key, id(value)) for key, value in module._modules.items()],
            [(key, id(value), value.requires_grad) for key, value in module._parameters.items() if value is not None],
            [(key, id(value)) for key, value in module._buffers.items()],
            {
                key: (id(value), value.copy() if isinstance(value, list | dict | set) else value)
                for key, value in module.__dict__.items()
                if key not in ("_modules", "_parameters", "_buffers")
            },
        )
        for name, module in body.named_modules()
    }


def replace_a_module(body):
    body[1][0] = nn.Linear(4, 4)


def wrap_a_module(body):
    wrapped = nn.Sequential(body[0])
    body[0] = wrapped
    wrapped[0].weight.requires_grad_(False)


def add_a_module(body):
    body.add_module("extra", nn.Linear(2, 2))


def remove_modules(body):
    del body[2]
    del body[1][1]


def replace_a_parameter(body):
    body[0].weight = nn.Parameter(torch.zeros(4, 3))


def add_and_remove_parameters(body):
    body[0].register_parameter("more", nn.Parameter(torch.zeros(1)))
    del body[2].bias


def replace_a_buffer(body):
    body[1][1].running_mean = torch.ones(4)
    body[1][1].register_buffer("more", torch.zeros(1))


def change_attributes(body):
    body[0].in_features = 7
    body[0].fresh = object()
    del body[2].out_features


def change_containers(body):
    body[0].names.append("two")
    body[0].ranks["two"] = 2
    body[0].ranks["one"] = 5
    body[0].seen.clear()


def rebind_containers(body):
    body[0].names = ["other"]
    body[0].seen = None


def change_flags(body):
    body.requires_grad_(False)
    body[2].weight.requires_grad_(True)
    body.eval()


def add_hooks(body):
    body[0].register_forward_hook(lambda *_: None)
    body[1].register_forward_pre_hook(lambda *_: None)


CHANGES = [
    replace_a_module,
    wrap_a_module,
    add_a_module,
    remove_modules,
    replace_a_parameter,
    add_and_remove_parameters,
    replace_a_buffer,
    change_attributes,
    change_containers,
    rebind_containers,
    change_flags,
    add_hooks,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_each_change_is_undone(change):
    body = model()
    before = structure(body)
    with pytest.raises(Stop), unchanged_on_error(body):
        change(body)
        assert structure(body) != before, "the change is none"
        raise Stop
    assert structure(body) == before


def test_many_changes_are_undone_in_one():
    body = model()
    body.eval()
    before, x = structure(body), torch.randn(5, 3)
    y = body(x)
    with pytest.raises(Stop), unchanged_on_error(body):
        for change in (change_containers, change_flags, replace_a_parameter, replace_a_module, add_hooks, add_a_module):
            change(body)
        raise Stop
    assert structure(body) == before
    assert torch.equal(body(x), y)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_without_an_error_changes_stay(change):
    body, twin = model(), model()
    with unchanged_on_error(body):
        change(body)
    change(twin)
    assert list(body.state_dict()) == list(twin.state_dict())
    assert [p.requires_grad for p in body.parameters()] == [p.requires_grad for p in twin.parameters()]
    assert [type(module) for module in body.modules()] == [type(module) for module in twin.modules()]
    assert [module.__dict__.keys() for module in body.modules()] == [m.__dict__.keys() for m in twin.modules()]


def test_only_if_decides_after_the_error():
    body = model()
    before = structure(body)
    asked = []

    def not_this_one(found):
        asked.append(len(found))
        return False

    with pytest.raises(Stop), unchanged_on_error(body, only_if=not_this_one):
        add_a_module(body)
        raise Stop
    assert asked == [4]
    assert structure(body) != before


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_interruptions_are_undone_too(error):
    body = model()
    before = structure(body)
    with pytest.raises(error), unchanged_on_error(body):
        remove_modules(body)
        raise error
    assert structure(body) == before


def test_nested_transactions():
    """The inner one gives up; the outer one keeps what it did itself."""
    body = model()
    with unchanged_on_error(body):
        replace_a_parameter(body)
        middle = structure(body)
        with pytest.raises(Stop), unchanged_on_error(body):
            remove_modules(body)
            raise Stop
        assert structure(body) == middle
    assert structure(body) == middle


def test_a_shared_module_is_put_back_everywhere():
    shared = nn.Linear(3, 3)
    body = nn.Sequential(shared, nn.ReLU(), shared)
    with pytest.raises(Stop), unchanged_on_error(body):
        body[0] = nn.Identity()
        body[2] = nn.Identity()
        raise Stop
    assert body[0] is body[2] is shared


def test_values_of_tensors_are_left_to_the_body():
    """So the body has to check before it writes any: this is what the docstring says."""
    body = model()
    with pytest.raises(Stop), unchanged_on_error(body):
        body[0].weight.data.zero_()
        raise Stop
    assert body[0].weight.abs().max() == 0


def test_a_container_that_refuses_changes_is_left_alone():
    """Such as the configuration of a diffusers model."""

    class Frozen(OrderedDict):
        def update(self, *args, **kwargs):
            raise AssertionError("frozen")

        clear = update

    model = nn.Linear(2, 3)
    model.config = Frozen([("width", 2)])
    model.names = ["a"]
    with pytest.raises(ValueError, match="the cause"), unchanged_on_error(model):
        model.names.append("b")
        raise ValueError("the cause")
    assert dict(model.config) == {"width": 2}
    assert model.names == ["a"]
