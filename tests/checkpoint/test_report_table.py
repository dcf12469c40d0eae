"""The table, the JSON and the picture of a report."""

from __future__ import annotations

import io
import json
import sys

import pytest
import torch
from rich.console import Console

from hira.checkpoint.inspection import Report, inspect
from hira.checkpoint.report_table import grid, place, plot, table, to_json
from hira.errors import HiraError

EVIL = "em[red]bed<script>document.title='gone'</script>&\"\x1b[2J$x"


def example(with_base: bool = True, layers: int = 11) -> Report:
    """Two modules in each layer, and one outside with a name that means harm."""
    tensors, weights = {}, {}
    for name in [f"model.layers.{i}.{m}" for i in reversed(range(layers)) for m in ("q_proj", "mlp.up")] + [EVIL]:
        tensors[f"base_model.model.{name}.hira_A"] = torch.randn(3, 8)
        tensors[f"base_model.model.{name}.hira_B"] = torch.randn(6, 3) / 100
        weights[name] = torch.randn(6, 8)
    return inspect({"r": 3, "peft_type": "HIRA", "note": EVIL}, tensors, weights.get if with_base else None)


def text(report: Report) -> str:
    console = Console(file=io.StringIO(), width=240)
    console.print(table(report))
    return console.file.getvalue()


def test_the_table_has_every_layer_and_number():
    report = example()
    lines = text(report).splitlines()
    layer = report.layers[3]
    line = next(line for line in lines if layer.name in line)
    for number in (layer.relative_norm, layer.delta_norm, layer.largest_delta):
        assert f"{number:.2e}" in line
    assert f"{layer.update.effective_rank:.1f}" in line
    assert f"{report.relative_norm:.2e} of W₀ overall" in text(report)
    assert "23 modules, 966 parameters" in text(report)
    assert "pass --base" not in text(report)


def test_a_name_moves_no_cursor_and_is_no_markup():
    shown = text(example())
    assert "\x1b" not in shown
    assert "em[red]bed<script>" in shown
    assert "\\x1b[2J" in shown


def test_without_a_base_the_table_says_what_is_missing():
    shown = text(example(with_base=False))
    assert "pass --base" in shown
    assert "lost in bf16" not in shown
    assert "max |BA|" in shown


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.self_attn.q_proj", ("model.layers.3", "self_attn.q_proj")),
        ("h.0.mlp.experts.5.up", ("h.0", "mlp.experts.5.up")),
        ("0.q", ("0", "q")),
        ("lm_head", ("", "lm_head")),
        ("conv1", ("", "conv1")),
        ("blocks.7", ("", "blocks.7")),
    ],
)
def test_places(name, expected):
    assert place(name) == expected


def test_layers_are_in_the_order_of_their_numbers():
    report = example()
    rows, columns, cells = grid(report)
    assert rows == [*(f"model.layers.{i}" for i in range(11)), ""]
    assert len(columns) == 3
    assert report.layers[cells["model.layers.10", "mlp.up"]].name == "model.layers.10.mlp.up"


def test_json():
    report = example()
    assert json.loads(to_json(report)) == json.loads(json.dumps(report.to_dict()))
    assert json.loads(to_json(report))["layers"][0]["relative_norm"] == report.layers[0].relative_norm


@pytest.mark.parametrize("with_base", [True, False])
def test_the_picture(with_base, tmp_path):
    pytest.importorskip("matplotlib")
    plot(example(with_base), tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 10_000


def test_the_picture_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(HiraError, match=r"pip install 'hira\[plot\]'"):
        plot(example(), tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()
