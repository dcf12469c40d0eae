"""What is particular to the weights of AQLM; the laws of all storages are in test_storages."""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import hira

aqlm = pytest.importorskip("aqlm", reason="aqlm is not installed")

IN, R = 64, 3
# with as many groups of outputs as of inputs the shape of the codes does not tell how they lie
sizes = pytest.mark.parametrize("out", [24, IN // 8], ids=["oblong", "square"])


@pytest.fixture(autouse=True)
def _kernel(monkeypatch):
    """A stand-in for AQLM's kernel for a CPU, which needs numba; it is chosen at the first call and not run here."""
    monkeypatch.setitem(
        sys.modules, "aqlm.inference_kernels.numba_kernel", SimpleNamespace(numba_gemm_lut=lambda *_: None)
    )


def base_layer(out: int) -> Any:
    options = {"in_group_size": 8, "out_group_size": 1, "num_codebooks": 2, "nbits_per_codebook": 8, "bias": False}
    layer = aqlm.QuantizedLinear(IN, out, **options)
    layer.codebooks.data.normal_()
    layer.scales.data.fill_(0.05)
    layer.codes.data = torch.randint(-128, 128, layer.codes.shape, dtype=torch.int8)
    return layer


def dense(layer: Any) -> Tensor:
    """W0 by its definition: each group of 8 inputs is a sum of one vector of each codebook."""
    indices = layer.codes.long() % 256
    rows = [layer.codebooks[book, indices[..., book], 0] for book in range(2)]
    weight: Tensor = (rows[0] + rows[1]).flatten(1) * layer.scales.view(-1, 1)
    return weight.detach()


def adapted(base: Any) -> Any:
    return hira.layers.dispatch.dispatch(base, "default", hira_config=hira.HiraConfig(r=R, init_weights=False))


@sizes
def test_a_layer_that_was_called(out):
    base = base_layer(out)
    W0, codes, x = dense(base), base.codes.data, torch.randn(2, IN, requires_grad=True)
    layer = adapted(base)
    y = layer(x)
    gradient = torch.autograd.grad(layer(x).sum(), x)
    later = layer(x).sum()
    base.prepare_matmul_op(x)
    assert torch.equal(base.codes.data, codes.transpose(0, 1))
    assert torch.equal(torch.autograd.grad(later, x)[0], gradient[0])
    for again in (layer, copy.deepcopy(layer), adapted(copy.deepcopy(base))):
        torch.testing.assert_close(again.storage.read(), W0)
    assert torch.equal(layer(x), y)
