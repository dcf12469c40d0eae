"""What is particular to the weights of GPTQ and AWQ; the laws of all storages are in test_storages."""

from __future__ import annotations

import pytest
import torch
from storages import CASES, IN, OUT
from torch import nn

import hira
from hira import HiraError

pytest.importorskip("gptqmodel", reason="gptqmodel is not installed")

aten = pytest.mark.parametrize(
    "case", [c for c in CASES if c.package == "gptqmodel" and "Aten" in c.name], ids=lambda case: case.name
)


@aten
def test_a_layer_that_was_packed_anew_for_inference_is_refused(case):
    base = case.quantise(nn.Linear(IN, OUT)).eval()
    with torch.no_grad():
        base(torch.randn(2, IN))
    with pytest.raises(HiraError, match=r"Torch\w+.* evaluation"):
        hira.layers.dispatch.dispatch(base, "default", hira_config=hira.HiraConfig(r=2))


@aten
def test_an_adapted_layer_stays_readable_when_run_disabled(case):
    base = case.quantise(nn.Linear(IN, OUT))
    layer = hira.layers.dispatch.dispatch(base, "default", hira_config=hira.HiraConfig(r=2, init_weights=False)).eval()
    x = torch.randn(2, IN)
    with torch.no_grad():
        y = layer(x)
        layer.enable_adapters(False)
        layer(x)
        layer.enable_adapters(True)
        assert torch.equal(layer(x), y)
    assert layer(x).requires_grad
