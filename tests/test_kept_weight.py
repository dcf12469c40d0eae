"""keep_weight: W' is formed once for each step of the optimizer, and never one that is out of date."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from small_models import llama
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from hira import HiraConfig
from hira.layers import kept_weight, linear
from hira.ops import effective_weight, heuristics
from hira.tuner.model import hira_layers

EXACT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture
def formed(monkeypatch) -> list[int]:
    """How many weights were formed to be kept."""
    count = [0]
    form = effective_weight.form

    def counting(*args: Any, **kwargs: Any) -> Tensor:
        count[0] += 1
        return form(*args, **kwargs)

    monkeypatch.setattr(linear.effective_weight, "form", counting)
    return count


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 16), Conv1D(10, 16)

    def forward(self, x: Tensor, checkpointed: bool = False) -> Tensor:
        x = torch.tanh(checkpoint(self.first, x, use_reentrant=False) if checkpointed else self.first(x))
        return checkpoint(self.second, x, use_reentrant=False) if checkpointed else self.second(x)


def adapted(keep: bool = True, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    torch.manual_seed(0)
    config = HiraConfig(
        **{"r": 3, "lora_r": 2, "target_modules": ["first", "second"], "init_weights": False, **options},
        keep_weight=keep,
    )
    return get_peft_model(Net().to(dtype), config).to(dtype)


def batch(rows: int = 20, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, 12, generator=torch.Generator().manual_seed(rows), dtype=torch.float64).to(dtype)


def trained(model: Any, **options: Any) -> list[Tensor]:
    """The losses of three steps of two micro-batches."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        for rows in (20, 5):
            loss = model(batch(rows), **options).square().mean()
            loss.backward()
            losses.append(loss.detach())
        optimizer.step()
    return losses


@pytest.mark.parametrize("checkpointed", [False, True])
def test_it_is_formed_once_for_each_step_and_layer(formed, checkpointed):
    losses = trained(adapted(), checkpointed=checkpointed)
    assert formed[0] == 3 * 2
    formed[0] = 0
    for kept, plain in zip(losses, trained(adapted(keep=False), checkpointed=checkpointed), strict=True):
        torch.testing.assert_close(kept, plain, **EXACT)
    assert formed[0] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_are_those_of_the_merged_model(dtype):
    model = adapted(dtype=dtype)
    x = batch(64, dtype)  # for 8 to 32 rows y is computed as a transpose, and rounds otherwise
    y = model(x)
    model.merge_adapter()
    assert torch.equal(model(x), y)


def changes() -> dict[str, Callable[[Any], Any]]:
    def layer(model: Any) -> Any:
        return model.base_model.model.first

    def parameter(model: Any, name: str) -> Tensor:
        return getattr(layer(model), name)["default"]

    def replaced(model: Any) -> None:
        layer(model).hira_A["default"] = nn.Parameter(parameter(model, "hira_A") * 2)

    names = ("hira_A", "hira_B", "hira_lora_A", "hira_lora_B")
    return {
        **{f"{name} in place": lambda m, n=name: parameter(m, n).data.mul_(2) for name in names},
        "one number of A through NumPy": lambda m: parameter(m, "hira_A").detach().numpy().__setitem__((0, 0), 9),
        "A replaced": replaced,
        "A's data replaced": lambda m: setattr(parameter(m, "hira_A"), "data", parameter(m, "hira_A").data * 2),
        "W0 through data": lambda m: layer(m).get_base_layer().weight.data.mul_(2),
        "W0 loaded": lambda m: (
            layer(m)
            .get_base_layer()
            .load_state_dict({k: 2 * v for k, v in layer(m).get_base_layer().state_dict().items()})
        ),
        "scale": lambda m: layer(m).set_scale("default", 3.0),
        "reset": lambda m: layer(m).reset_hira_parameters("default", True),
        "disabled": lambda m: m.base_model.disable_adapter_layers(),
        "another adapter": lambda m: (
            m.add_adapter("b", HiraConfig(r=2, target_modules=["first"], init_weights=False)),
            m.set_adapter("b"),
        ),
        "another dtype": lambda m: m.float(),
    }


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("change", changes())
def test_every_change_is_seen(change, training):
    model = adapted().train(training)
    with torch.no_grad():
        before = model(batch())
        assert torch.equal(model(batch()), before)
        changes()[change](model)
        dtype = next(model.parameters()).dtype
        found = model(batch(dtype=dtype))
        for layer in hira_layers(model):
            layer.keep_weight.clear()
        torch.testing.assert_close(found, model(batch(dtype=dtype)))
        assert not torch.allclose(found.double(), before) or change == "another dtype"


def test_an_optimizer_that_leaves_no_version_is_seen(monkeypatch):
    """As an engine that writes into the memory of its own; without comparing numbers, as on a GPU."""
    monkeypatch.setattr("hira.layers.kept_weight._values", lambda sources: [])
    model = adapted()
    before = model(batch())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(2)
    torch.optim.SGD([nn.Parameter(torch.zeros(1))]).step()
    assert not torch.allclose(model(batch()), before)


def test_autocast_keeps_the_weight_of_its_dtype(formed):
    model = adapted(dtype=torch.float32)
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model(batch(dtype=torch.float32)).dtype == torch.bfloat16
    assert formed[0] == 2
    model(batch(dtype=torch.float32))
    assert formed[0] == 4


def test_a_backward_after_the_step_has_the_weight_of_its_forward():
    model, x = adapted(), batch().requires_grad_()
    y = model(x)
    (wanted,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    for layer in hira_layers(model):
        for factors in layer.factor_dicts("default"):
            factors["default"].data.mul_(2)
    model(x)
    (found,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(found, wanted, **EXACT)


@pytest.mark.parametrize("several", [False, True])
def test_a_graph_keeps_its_weight_when_other_adapters_act(several):
    model = adapted()
    model.add_adapter("b", HiraConfig(r=2, target_modules=["first", "second"], init_weights=False, keep_weight=True))
    model.double()
    x = batch().requires_grad_()
    y = model(x)
    (wanted,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    model.base_model.set_adapter(["default", "b"] if several else "b")
    model(x)
    (found,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(found, wanted, **EXACT)


def test_nothing_is_kept_for_a_graph_that_is_captured(formed, monkeypatch):
    monkeypatch.setattr(heuristics, "is_capturing", lambda device: True)
    model = adapted()
    model(batch())
    assert formed[0] == 0 and not any(layer in kept_weight._entries for layer in hira_layers(model))


def test_transforms_and_copies():
    model, x = adapted().eval(), batch()
    y = model(x)
    torch.testing.assert_close(torch.func.vmap(model)(x), y, **EXACT)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x), y, **EXACT)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(x), y)
        with torch.no_grad():
            next(p for p in again.parameters() if p.requires_grad).mul_(2)
        assert not torch.equal(again(x), y)
        assert torch.equal(model(x), y)


def test_dropout_acts_on_the_update_alone():
    torch.manual_seed(0)
    model = adapted(hira_dropout=0.5)
    torch.manual_seed(1)
    y = model(batch())
    for layer in hira_layers(model):
        layer.keep_weight.clear()
    torch.manual_seed(1)
    torch.testing.assert_close(model(batch()), y, **EXACT)


def test_no_folder_says_it(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    assert "keep_weight" not in (tmp_path / "adapter_config.json").read_text()


def test_a_llama_trains_as_without():
    losses = {}
    for keep in (True, False):
        torch.manual_seed(0)
        config = HiraConfig(r=4, hira_alpha=8, target_modules="all-linear", keep_weight=keep)
        model = get_peft_model(llama(), config).train()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        ids = torch.arange(3, 35).view(4, 8)
        losses[keep] = []
        for _ in range(4):
            for rows in ids.split(2):
                loss = model(input_ids=rows, labels=rows).loss / 2
                loss.backward()
                losses[keep].append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)
