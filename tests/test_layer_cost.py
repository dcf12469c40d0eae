"""What each kind of layer keeps for backward, and how many operations it takes."""

from __future__ import annotations

import pytest
import torch
from autograd_memory import address, kept_for_backward
from layer_cases import IDS, WIDE, Case, adapted, of_reference
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import hira


def input_of(case: Case, dtype: torch.dtype) -> Tensor:
    return torch.randn(case.x, dtype=dtype, requires_grad=True) if case.x else IDS


def twice(layer: hira.HiraLayer) -> hira.HiraLayer:
    """With the active adapters of ranks 3 and 2."""
    layer.update_layer("second", 2, hira.HiraConfig(r=2, init_weights=False))
    layer.set_adapter(["default", "second"])
    return layer


@pytest.mark.parametrize("form", ["plain", "several adapters", "hooked", "dropout"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", WIDE.values(), ids=WIDE)
def test_nothing_of_the_weights_size_is_kept_but_the_weight(case, dtype, form):
    layer = adapted(case, dtype)
    layer.get_base_layer().requires_grad_(False)
    for name in layer.factor_names:
        getattr(layer, name).float()
    if form == "several adapters":
        twice(layer)
    if form == "hooked":
        layer.get_base_layer().register_forward_hook(lambda module, args, y: None)
    if form == "dropout":
        layer.hira_dropout["default"] = nn.Dropout(0.5)
    x, W0 = input_of(case, dtype), layer.get_base_layer().weight
    kept = kept_for_backward(lambda: layer(x))
    kept.pop(address(W0), None)
    assert kept
    assert max(kept.values()) < W0.untyped_storage().nbytes()


def test_what_is_kept_is_seen():
    """The law has to fail for the plain expression, which keeps W0 * BA."""
    layer = adapted(WIDE["linear"], torch.float32)
    layer.get_base_layer().requires_grad_(False)
    x, W0 = input_of(WIDE["linear"], torch.float32), layer.get_base_layer().weight
    kept = kept_for_backward(lambda: of_reference(layer, x))
    kept.pop(address(W0), None)
    assert max(kept.values()) >= W0.nbytes


def operations(layer: hira.HiraLayer, x: Tensor) -> int:
    """Of a training step. The counter by itself does not see products that are added in place."""

    def in_place(_, a, b, **__):  # shapes
        return 2 * a[0] * a[1] * b[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        layer(x).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("case", WIDE.values(), ids=WIDE)
def test_several_adapters_cost_one_of_the_summed_rank(case):
    layers = twice(adapted(case)), adapted(case._replace(r=5))
    for layer in layers:
        layer.double().get_base_layer().requires_grad_(False)
    x = input_of(case, torch.float64)
    several, one = (operations(layer, x) for layer in layers)
    assert 0 < several == one
    layers[0].get_base_layer().register_forward_hook(lambda module, args, y: None)
    assert operations(layers[0], x) == several
