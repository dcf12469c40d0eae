"""What `inspect` reports, against matrices that are formed whole in float64."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hira.errors import HiraError
from hira.files.inspect import inspect_adapter as inspection
from hira.files.inspect import report_table
from hira.files.inspect.inspect_adapter import Report, WeightOf, inspect_layer
from hira.files.io.adapter_folder import adapter_of
from hira.files.model import layer_matrices as factors
from hira.ops import reference
from hira.ops.effective_weight import form

# W0, A and B by kind; wide and tall, ranks below and above the sides
LAYERS = {
    "tall": ((31, 17), (4, 17), (31, 4), "matrix"),
    "wide": ((9, 40), (1, 40), (9, 1), "matrix"),
    "rank above the side": ((6, 50), (11, 50), (6, 11), "matrix"),
    "embedding": ((50, 12), (3, 50), (12, 3), "embedding"),
    "1d": ((6, 8, 3), (3, 8, 3), (6, 3, 1), "convolution"),
    "2d": ((40, 2, 2, 3), (5, 2, 2, 3), (40, 5, 1, 1), "convolution"),
}
every_layer = pytest.mark.parametrize("layer", LAYERS)


def inspect(config: dict[str, Any], tensors: dict[str, Tensor], weight_of: WeightOf | None = None, **options) -> Report:
    return inspection.inspect(adapter_of(Path("mine"), config, tensors), weight_of, **options)


def tensors(layer: str, dtype: torch.dtype = torch.float32, scale: float = 0.5) -> tuple[Tensor, Tensor, Tensor, str]:
    shape_W0, shape_A, shape_B, kind = LAYERS[layer]
    W0, A, B = torch.randn(shape_W0), torch.randn(shape_A) * scale, torch.randn(shape_B) * scale
    return W0.to(dtype), A, B, kind


def whole(W0: Tensor, A: Tensor, B: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """W0, BA and W0 * BA in float64, as matrices."""
    delta = reference.delta(A.double(), B.double())
    delta = delta.t() if kind == "embedding" else delta
    return W0.double().flatten(1), delta.flatten(1), (W0.double() * delta).flatten(1)


def ranks(matrix: Tensor) -> tuple[float, float]:
    values = torch.linalg.svdvals(matrix)
    p = values[values > 1e-14 * values[0]] / values.sum()
    return math.exp(-float((p * p.log()).sum())), float(matrix.norm() / torch.linalg.matrix_norm(matrix, 2)) ** 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@every_layer
def test_against_whole_matrices(layer, dtype, monkeypatch):
    monkeypatch.setattr(factors, "BLOCK", 64)  # several blocks
    W0, A, B, kind = tensors(layer, dtype)
    report = inspect_layer(W0, A, B, kind)
    weight, delta, update = whole(W0, A, B, kind)
    assert report.shape == tuple(W0.shape)
    assert report.rank == len(A)
    assert report.parameters == A.numel() + B.numel()
    assert report.delta_norm == pytest.approx(float(delta.norm()), rel=1e-12)
    assert report.weight_norm == pytest.approx(float(weight.norm()), rel=1e-12)
    assert report.update_norm == pytest.approx(float(update.norm()), rel=1e-12)
    assert report.relative_norm == pytest.approx(float(update.norm() / weight.norm()), rel=1e-12)
    assert report.largest_delta == pytest.approx(float(delta.abs().max()), rel=1e-12)
    for spectrum, matrix in ((report.weight, weight), (report.delta, delta), (report.update, update)):
        exact = torch.linalg.svdvals(matrix)
        found = torch.tensor(spectrum.values, dtype=torch.float64)
        # a square root of eigenvalues whose error is a few units of 1e-16 s_1^2
        torch.testing.assert_close(found, exact[: len(found)], rtol=0, atol=1e-7 * float(exact[0]))
        assert bool((exact[len(found) :] < 1e-12 * exact[0]).all())
        assert (spectrum.effective_rank, spectrum.stable_rank) == pytest.approx(ranks(matrix), rel=1e-5)


@every_layer
def test_without_a_base_what_BA_tells(layer):
    W0, A, B, kind = tensors(layer)
    bare, full = inspect_layer(None, A, B, kind), inspect_layer(W0, A, B, kind)
    assert (bare.weight_norm, bare.update_norm, bare.relative_norm) == (None,) * 3
    assert (bare.bfloat16_lost, bare.bfloat16_unchanged, bare.weight, bare.update) == (None,) * 4
    for name in ("shape", "rank", "delta_norm", "largest_delta", "near_minus_one", "delta"):
        assert getattr(bare, name) == getattr(full, name)


def test_known_ranks():
    """W0 of ones leaves BA as it is; with orthogonal factors all r singular values are alike."""
    Q = torch.linalg.qr(torch.randn(30, 4)).Q
    P = torch.linalg.qr(torch.randn(20, 4)).Q
    report = inspect_layer(torch.ones(30, 20), P.t() * 3, Q, "matrix")
    for spectrum in (report.delta, report.update):
        assert spectrum.effective_rank == pytest.approx(4, rel=1e-5)
        assert spectrum.stable_rank == pytest.approx(4, rel=1e-5)
        assert spectrum.values[:4] == pytest.approx([3] * 4, rel=1e-5)
    assert report.weight.effective_rank == pytest.approx(1, abs=1e-5)


def test_entries_near_minus_one():
    A, B = torch.ones(1, 10), torch.zeros(4, 1)
    B[1], B[2], B[3] = -1, -0.985, -0.995
    report = inspect_layer(None, A, B, "matrix")
    assert report.near_minus_one == 20
    assert report.near_minus_one_share == 0.5
    assert report.largest_delta == 1


def test_what_bfloat16_rounds_away():
    """Of 1 + d, between 1 and 1 + 2^-7: nothing is kept up to the middle, and all of it on the grid."""
    W0, A = torch.ones(3, 8), torch.ones(1, 8)
    small = inspect_layer(W0, A, torch.full((3, 1), 2.0**-9), "matrix")
    assert (small.bfloat16_lost, small.bfloat16_unchanged) == (1, 1)
    exact = inspect_layer(W0, A, torch.full((3, 1), 2.0**-7), "matrix")
    assert (exact.bfloat16_lost, exact.bfloat16_unchanged) == (0, 0)
    mixed = inspect_layer(W0, A, torch.tensor([[2.0**-9], [2.0**-7], [0.0]]), "matrix")
    assert mixed.bfloat16_lost == pytest.approx(1 / 17)  # 2^-18 of 2^-18 + 2^-14
    assert mixed.bfloat16_unchanged == 0.5


def test_more_is_lost_of_a_smaller_update_by_rounding_to_nearest():
    W0, A, B, kind = tensors("tall", torch.bfloat16, scale=1)
    lost = [inspect_layer(W0, A, B * scale, kind).bfloat16_lost_to_nearest for scale in (1e-4, 1e-3, 1)]
    assert lost[0] > 0.8
    assert lost[0] > lost[1] > lost[2]
    assert abs(lost[2]) < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@every_layer
def test_what_bfloat16_loses_is_what_merging_loses(layer, dtype, monkeypatch):
    """Compared with W' as the layers form it, in the layer's own orientation."""
    monkeypatch.setattr(factors, "BLOCK", 64)
    W0, A, B, kind = tensors(layer, dtype, scale=0.05)
    report = inspect_layer(W0, A, B, kind)
    left, right = (A.t(), B.t()) if kind == "embedding" else (B.flatten(1), A.flatten(1))
    merged = form(W0.flatten(1), right, left, 0, torch.bfloat16)
    kept = merged.double() - W0.flatten(1).bfloat16().double()
    update = whole(W0, A, B, kind)[2]
    assert report.bfloat16_lost == pytest.approx(1 - float((kept * update).sum() / update.square().sum()), abs=1e-4)
    assert report.bfloat16_unchanged == pytest.approx(1 - float((kept != 0).double().mean()), abs=0.01)
    assert (report.bfloat16_lost == report.bfloat16_lost_to_nearest) == (dtype == torch.float32)


def test_a_dither_keeps_the_update_of_a_model_that_rounding_to_nearest_loses():
    W0, A, B = torch.randn(200, 300).bfloat16(), torch.randn(4, 300), torch.randn(200, 4) * 2e-4
    tensors = {"base_model.model.q.hira_A": A, "base_model.model.q.hira_B": B}
    report = inspect({"r": 4}, tensors, {"q": W0}.get, spectra=False)
    assert report.bfloat16_lost_to_nearest > 0.8
    assert abs(report.bfloat16_lost) < 0.15
    assert (report.layers[0].bfloat16_lost, report.layers[0].bfloat16_lost_to_nearest) == pytest.approx(
        (report.bfloat16_lost, report.bfloat16_lost_to_nearest)
    )


def test_numbers_that_overflow():
    """What cannot be measured is an error that names the module; what only bfloat16 cannot hold is not known."""
    W0, A, B, kind = tensors("tall")
    for scale, dtype in ((1e100, torch.float64), (1e160, torch.float64), (1e200, torch.float64)):
        huge = [factor.to(dtype) * scale for factor in (A, B)]
        with pytest.raises(HiraError, match=r"update of module 'q' is too large"):
            inspect_layer(None, *huge, kind, name="q")
        with pytest.raises(HiraError, match=r"update of module 'q' is too large"):
            inspect_layer(W0, *huge, kind, name="q")
    report = inspect_layer(W0, A * 1e19, B * 1e19, kind)
    values = (report.bfloat16_lost, report.bfloat16_lost_to_nearest)
    assert values == (None, None) and math.isfinite(report.update_norm) and math.isfinite(report.update.values[0])
    tensors_of = {"base_model.model.q.hira_A": A * 1e19, "base_model.model.q.hira_B": B * 1e19}
    whole_report = inspect({"r": 4}, tensors_of, {"q": W0}.get)
    assert whole_report.bfloat16_lost is None
    json.loads(report_table.to_json(whole_report), parse_constant=pytest.fail)


def test_an_untrained_adapter():
    report = inspect_layer(torch.randn(8, 5), torch.randn(2, 5), torch.zeros(8, 2), "matrix")
    assert report.relative_norm == report.update.effective_rank == report.update.stable_rank == 0
    assert report.bfloat16_lost is None


def test_weights_stored_as_in_out():
    for shape in ((7, 5), (6, 6)):
        W0, A, B = torch.randn(shape), torch.randn(2, shape[1]), torch.randn(shape[0], 2)
        assert inspect_layer(W0.t(), A, B, "matrix", fan_in_fan_out=True) == inspect_layer(W0, A, B, "matrix")


def adapter() -> tuple[dict, dict[str, Tensor]]:
    A, B = torch.randn(2, 5), torch.randn(7, 2)
    table_A, table_B = torch.randn(3, 11), torch.randn(5, 3)
    tensors = {
        "base_model.model.layers.0.q.hira_A": A,
        "base_model.model.layers.0.q.hira_B": B,
        "base_model.model.embed.hira_embedding_A": table_A,
        "base_model.model.embed.hira_embedding_B": table_B,
        "base_model.model.head.weight": torch.randn(2, 5),
    }
    return {"peft_type": "HIRA", "r": 2, "target_modules": ["embed", "q"], "modules_to_save": ["head"]}, tensors


def test_a_whole_adapter():
    config, tensors = adapter()
    weights = {"layers.0.q": torch.randn(7, 5), "embed": torch.randn(11, 5)}
    report = inspect(config, tensors, weights.get, top=2)
    assert [layer.name for layer in report.layers] == ["layers.0.q", "embed"]
    assert report.parameters == sum(value.numel() for value in tensors.values())
    update = sum(layer.update_norm**2 for layer in report.layers)
    weight = sum(value.square().sum() for value in weights.values())
    assert report.relative_norm == pytest.approx(math.sqrt(update / weight))
    assert all(len(layer.update.values) == 2 for layer in report.layers)
    content = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert content["config"]["target_modules"] == ["embed", "q"]
    assert content["layers"][1]["shape"] == [11, 5]
    quick = inspect(config, tensors, weights.get, spectra=False)
    assert quick.layers[0].update is None
    assert quick.layers[0].update_norm == report.layers[0].update_norm
    assert inspect(config, tensors, {"embed": weights["embed"]}.get).relative_norm is None
    assert inspect(config, tensors).relative_norm is None


def test_large_layers_have_no_dense_spectra(monkeypatch):
    monkeypatch.setattr(inspection, "MAX_DIM", 16)
    W0, A, B, kind = tensors("tall")
    assert inspect_layer(W0, A, B, kind).update is None
    assert len(inspect_layer(W0, A, B, kind).delta.values) == 4


def broken(key: str, value: Tensor | None) -> dict[str, Tensor]:
    changed = {**adapter()[1], f"base_model.model.{key}": value}
    return {name: tensor for name, tensor in changed.items() if tensor is not None}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("layers.0.q.hira_B", None, "layers.0.q.hira_A' of the adapter mine lacks the other factor"),
        ("layers.0.q.hira_B", torch.randn(7, 3), r"A is \(2, 5\) and B is \(7, 3\)"),
        ("layers.0.q.hira_B", torch.randn(7, 2, 1), r"A is \(2, 5\) and B is \(7, 2, 1\)"),
        ("layers.0.q.hira_A", torch.full((2, 5), math.nan), "layers.0.q.hira_A' of the adapter mine has a NaN"),
        ("embed.hira_embedding_B", torch.full((5, 3), math.inf), "hira_embedding_B' of the adapter mine has a NaN"),
        ("layers.0.q.hira_A", torch.ones(2, 5, dtype=torch.int64), "is of torch.int64; a factor must be of float32"),
    ],
)
def test_broken_adapters(key, value, message):
    with pytest.raises(HiraError, match=message):
        adapter_of(Path("mine"), adapter()[0], broken(key, value)).check_finite()


def test_a_weight_that_is_not_finite():
    with pytest.raises(HiraError, match=r"'layers\.0\.q' holds NaN or infinity"):
        inspect(*adapter(), {"layers.0.q": torch.full((7, 5), math.nan)}.get)


def test_no_adapter_and_stacked_parameters():
    config, tensors = adapter()
    with pytest.raises(HiraError, match="is not one of HiRA's"):
        inspect(config, {"base_model.model.q.lora_A.weight": torch.ones(2, 2)})
    with pytest.raises(HiraError, match=r"target_parameters \['experts.up_proj'\]"):
        inspect({**config, "target_parameters": ["experts.up_proj"]}, tensors)
