"""The layers of experiments/is_it_w0.py: with M = W0 they are HiRA's, and every M is as large as W0."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from experiments import report
from experiments.decision import verdicts
from experiments.is_it_w0 import COMPARED_ON, METHODS, Adapted, leading
from experiments.plans import records
from experiments.report import Evidence
from peft import get_peft_model
from torch import nn

from hira import HiraConfig

ROOT = Path(__file__).parents[1]
R, TARGETS = 2, ["0", "2"]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 5))


def test_with_w0_it_is_hira(model):
    """The same A and B give the same outputs and gradients, merged too."""
    x = torch.randn(6, 3, 4, 4)
    hiras = get_peft_model(pickle.loads(pickle.dumps(model)), HiraConfig(r=R, target_modules=TARGETS))
    plain = Adapted(model, TARGETS, R, torch.clone)
    for name, target in zip(TARGETS, plain.layers, strict=True):
        layer, update = hiras.base_model.model.get_submodule(name), target.parametrizations.weight[0]
        assert layer.hira_A["default"].numel() == update.A.numel()
        with torch.no_grad():
            update.B.normal_()
            layer.hira_A["default"].copy_(update.A.view_as(layer.hira_A["default"]))
            layer.hira_B["default"].copy_(update.B.view_as(layer.hira_B["default"]))
    outputs, expected = plain(x), hiras(x)
    torch.testing.assert_close(outputs, expected)
    outputs.square().sum().backward()
    expected.square().sum().backward()
    for (_, ours), (_, theirs) in zip(trained(plain), trained(hiras), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad.view_as(ours), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain.merge_and_unload()(x), outputs)


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """What trains, A before B in each layer."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize("name", METHODS)
def test_every_m_has_the_norm_of_w0_and_starts_at_w0(model, name):
    x = torch.randn(6, 3, 4, 4)
    expected = model(x)
    norms = [layer.weight.norm() for layer in (model[0], model[2])]
    adapted = pickle.loads(pickle.dumps(METHODS[name])).adapt(model, TARGETS, R)
    for layer, norm in zip(adapted.layers, norms, strict=True):
        torch.testing.assert_close(layer.parametrizations.weight[0].M.norm(), norm)
    torch.testing.assert_close(adapted(x), expected)
    assert len(trained(adapted)) == 4


def test_the_leading_quarter_of_w0():
    W0 = torch.randn(8, 12)
    M = leading(W0)
    assert torch.linalg.matrix_rank(M) == 2
    torch.testing.assert_close(torch.linalg.svd(M)[0][:, 0].abs(), torch.linalg.svd(W0)[0][:, 0].abs())


def test_what_the_documentation_says_of_the_results():
    """The entries of W0 are not what helps: others are nowhere seen to be worse. Ones, LoRA up to its scale, are."""
    evidence = Evidence(records(ROOT / "experiments" / "results"), {})

    def told(name: str) -> tuple[set[str], set[str]]:
        rows = {task: [report.tests(evidence.runs(task, each)) for each in ("W0", name)] for task in COMPARED_ON}
        lower, higher, _ = verdicts({task: (w0, others) for task, (w0, others) in rows.items()})
        return set(lower), set(higher)

    assert told("W0 permuted") == told("Gaussian noise") == ({"digits", "French"}, set())
    assert told("ones") == ({"English"}, {"digits", "French"})
