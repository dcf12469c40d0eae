"""The table, the JSON and the picture of a report."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console
from typer.testing import CliRunner

from hira.cli.app import app
from hira.errors import HiraError
from hira.files.inspect.inspect_adapter import Report, inspect
from hira.files.inspect.report_table import in_order, in_words, overview, place, plot, table, to_json
from hira.files.io.adapter_folder import adapter_of
from hira.files.io.printable import printable

EVIL = "em[red]bed<script>document.title='gone'</script>&\"\x1b[2J$x"


def example(with_base: bool = True, layers: int = 11) -> Report:
    """Two modules in each layer, and one outside with a name that means harm."""
    tensors, weights = {}, {}
    for name in [f"model.layers.{i}.{m}" for i in reversed(range(layers)) for m in ("q_proj", "mlp.up")] + [EVIL]:
        tensors[f"base_model.model.{name}.hira_A"] = torch.randn(3, 8)
        tensors[f"base_model.model.{name}.hira_B"] = torch.randn(6, 3) / 100
        weights[name] = torch.randn(6, 8)
    adapter = adapter_of(Path("mine"), {"r": 3, "peft_type": "HIRA", "note": EVIL}, tensors)
    return inspect(adapter, weights.get if with_base else None)


def text(report: Report) -> str:
    console = Console(file=io.StringIO(), width=10_000)
    console.print(table(report))
    return console.file.getvalue() + "\n".join(in_words(report))


def test_the_table_has_every_layer_and_number():
    report = example()
    lines = text(report).splitlines()
    layer = report.layers[3]
    line = next(line for line in lines if layer.name in line)
    for number in (layer.relative_norm, layer.delta_norm, layer.largest_delta):
        assert f"{number:.2e}" in line
    assert f"{layer.update.effective_rank:.1f}" in line
    assert f"The update has {report.relative_norm * 100:.2f} % of W₀'s norm" in text(report)
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
    assert "lost" not in shown and "erank U" not in shown
    assert "max |BA|" in shown


def real(layers: int, targets: dict[str, tuple[int, int]], head: str, others: tuple[str, ...] = ()) -> Report:
    """A report with the names and sizes of a model, and measured numbers of other layers."""
    known = example(layers=20).layers
    names = [(f"{head}.{i}.{target}", shape) for i in range(layers) for target, shape in targets.items()]
    names += [(name, (128256, 4096)) for name in others]
    found = [
        dataclasses.replace(known[i % len(known)], name=name, shape=shape, rank=32)
        for i, (name, shape) in enumerate(names)
    ]
    return dataclasses.replace(example(), layers=tuple(found))


ATTENTION = {f"self_attn.{name}_proj": (4096, 4096) for name in "qkvo"}
LLAMA = ATTENTION | {f"mlp.{name}_proj": (14336, 4096) for name in ("gate", "up", "down")}
BERT = {f"attention.self.{name}": (384, 384) for name in ("query", "key", "value")}
BERT |= {"attention.output.dense": (384, 384), "intermediate.dense": (1536, 384), "output.dense": (384, 1536)}
EXPERTS = {"mlp.shared_expert.up_proj": (768, 2048)} | {
    f"mlp.experts.{e}.{name}_proj": (768, 2048) for e in range(8) for name in ("gate", "up", "down")
}
MODELS = {
    "llama": lambda: real(32, LLAMA, "model.layers"),
    "minilm": lambda: real(6, BERT, "encoder.layer", ("embeddings.word_embeddings",)),
    "moe": lambda: real(48, ATTENTION | EXPERTS, "model.layers", ("lm_head",)),
    "no layers": lambda: real(0, {}, "", ("encode", "decode")),
    "evil": lambda: example(),
}


def printed(report: Report, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    for part in overview(report, width):
        console.print(part, markup=False)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("model", MODELS)
def test_a_terminal_gets_whole_names_and_numbers(model, width):
    report = MODELS[model]()
    lines = printed(report, width)
    assert max(map(cell_len, lines)) <= width and all(line.isprintable() for line in lines)
    words = {word for line in lines for word in line.split()}
    for layer in report.layers:
        row, kind = place(layer.name)
        kind = re.sub(r"\.\d+(?=\.|$)", ".*", kind)
        assert any(line.startswith(printable(kind)) for line in lines)
        assert "×".join(map(str, layer.shape)) in words
        if row and "*" not in kind:
            assert f"{layer.relative_norm:.2e}" in words
    # and of several, such as experts or layers, the mean, or of max |BA| the largest
    first = place(report.layers[0].name)[1]
    alike = [
        layer for layer in report.layers if re.sub(r"\d+", "*", place(layer.name)[1]) == re.sub(r"\d+", "*", first)
    ]
    assert f"{sum(layer.delta_norm for layer in alike) / len(alike):.2e}" in words
    assert f"{max(layer.largest_delta for layer in alike):.2e}" in words


def test_a_llama_fits_80_columns_in_one_map():
    lines = printed(MODELS["llama"](), 80)
    title = next(i for i, line in enumerate(lines) if "of each layer model.layers.*" in line)
    assert lines[title + 1].split() == ["layer", *(target.split(".")[1] for target in LLAMA)]
    assert [line.split()[0] for line in lines[title + 2 : title + 34]] == [str(i) for i in range(32)]


def test_words():
    report = example()
    words = " ".join(in_words(report))
    largest = max(report.layers, key=lambda layer: layer.relative_norm)
    assert f"The largest is {largest.relative_norm * 100:.2f} %, of {printable(largest.name)}." in words
    assert "Merging into bfloat16 loses" in words and "rounded to nearest" not in words  # W0 is in float32
    half = dataclasses.replace(report, bfloat16_lost=-0.00004, bfloat16_lost_to_nearest=0.3123)
    assert "loses 0.00 % of the update as hira merge rounds, and 31.23 % rounded to nearest." in " ".join(
        in_words(half)
    )
    named = dataclasses.replace(report, config={"base_model_name_or_path": "org/\x9bx"})
    assert "trained on org/\\x9bx." in " ".join(in_words(named))


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
    names = [layer.name for layer in in_order(example().layers)]
    assert names == [*(f"model.layers.{i}.{m}" for i in range(11) for m in ("q_proj", "mlp.up")), EVIL]


def test_json():
    report = example()
    assert json.loads(to_json(report)) == json.loads(json.dumps(report.to_dict()))
    assert json.loads(to_json(report))["layers"][0]["relative_norm"] == report.layers[0].relative_norm


@pytest.mark.parametrize("with_base", [True, False])
def test_the_picture(with_base, tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    pytest.importorskip("matplotlib.image")
    plot(example(with_base), tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 10_000
    picture = matplotlib.image.imread(tmp_path / "a.png")[..., :3]
    for edge in (picture[:20], picture[-20:], picture[:, :20], picture[:, -20:]):  # nothing is cut off
        assert (edge == 1).all()
    with pytest.raises(HiraError, match=r"absent/a\.png cannot be written: No such file"):
        plot(example(with_base), tmp_path / "absent/a.png")


def test_the_picture_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = CliRunner().invoke(app, ["inspect", str(tmp_path), "--plot", str(tmp_path / "a.png")])
    assert result.exit_code == 2 and "pip install matplotlib" in " ".join(result.stderr.replace("│", " ").split())
    assert not (tmp_path / "a.png").exists()
