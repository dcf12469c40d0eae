"""The comparison of methods: right results get times, wrong ones do not, and what was measured is kept whole."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
import torch
from benchmarks import comparison
from benchmarks.comparison import measure, methods, peak
from benchmarks.comparison.__main__ import app
from benchmarks.comparison.cases import Case
from rich.console import Console
from torch import nn
from typer.testing import CliRunner


def case_of(mode="train", **options):
    """A small linear layer."""

    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(24, 20))

    return Case(
        "small", mode, base, ["0"], torch.randn(9, 24), options=comparison.Options(rank=3), repeats=2, **options
    )


def quick(part: str) -> Case:
    (case,) = comparison.cases(comparison.Options(quick=True, rank=4, only=(part,)))
    return replace(case, repeats=1, memory=False)


def test_every_method_is_right_and_timed():
    records = comparison.run(case_of())
    assert [record.method for record in records] == [method.name for method in methods.METHODS]
    for record in records:
        assert record.wrong is None
        assert len(record.times_ms) == 2
        assert record.median_ms > 0
        assert record.error < (0.05 if "int8" in record.method else 1e-5)


@pytest.mark.parametrize("part", ["Llama, 2 layers, width 256, 2 x", "embedding", "convolution", "decoding"])
def test_the_quick_cases_are_right(part):
    assert all(record.wrong is None for record in comparison.run(quick(part)))


def test_the_4bit_case_is_right():
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    assert all(record.wrong is None for record in comparison.run(quick("4 bits")))


def broken(model, targets, r, adapter):
    """LoRA, with a layer whose output is off by a thousandth."""
    model = methods.LORA.adapt(model, targets, r, adapter)
    model.base_model.model[0].register_forward_hook(lambda module, args, y: y * 1.001)
    return model


def test_a_wrong_result_gets_no_time():
    wrong = replace(methods.LORA, name="wrong", adapt=broken)
    records = comparison.run(case_of(methods=(methods.LORA, wrong)))
    assert records[0].times_ms
    assert not records[1].times_ms
    assert records[1].wrong.startswith("output off by 1.0e-03, allowed ")
    console = Console(width=100, file=io.StringIO())
    console.print(comparison.tables(records))
    assert "wrong: output off by 1.0e-03" in console.file.getvalue()


def test_a_wrong_gradient_is_seen():
    def adapt(model, targets, r, adapter):
        model = methods.HIRA.adapt(model, targets, r, adapter)
        model.base_model.model[0].hira_A[adapter].register_hook(lambda gradient: gradient * 1.01)
        return model

    (record,) = comparison.run(case_of(methods=(replace(methods.HIRA, adapt=adapt),)))
    assert record.wrong.startswith("gradients of parameters off by ")


def test_mixed_batches_show_that_peft_ignores_them():
    ours, stock = (r for r in comparison.run(quick("batch of 4")) if r.method != "LoRA")
    assert ours.wrong is None
    assert stock.wrong.startswith("output off by ")


def test_bfloat16():
    case = case_of()
    half = replace(case, options=comparison.Options(rank=3, dtype=torch.bfloat16), inputs=case.inputs.bfloat16())
    half = replace(half, base=lambda: case.base().bfloat16())
    assert all(record.wrong is None for record in comparison.run(half))


def test_progress_counts_every_part():
    case, seen = case_of(), []
    comparison.run(case, seen.append)
    assert len(seen) == measure.parts(case)


def test_peak_of_memory():
    """In a process of its own; a step of the quick Llama holds its logits twice, at least."""
    (case,) = comparison.cases(comparison.Options(quick=True, only=("width 256, 2 x 128",)))
    assert case.memory
    logits = 2 * 128 * 8192 * 4
    assert 2 * logits < peak.peak(case, methods.HIRA) < 40 * logits


def test_saved_and_loaded(tmp_path):
    records = comparison.run(case_of())
    records[0].peak_bytes = 7
    comparison.save(records, comparison.Options(rank=3), tmp_path / "new" / "times.json")
    loaded, rest = comparison.load(tmp_path / "new" / "times.json")
    assert loaded == records
    assert rest["settings"] == {"dtype": "float32", "rank": 3, "quick": False}
    assert {"hardware", "python", "commit", "hira", "torch", "peft"} <= rest["machine"].keys()
    comparison.plot(loaded, tmp_path / "times.png")
    assert (tmp_path / "times.png").read_bytes().startswith(b"\x89PNG")


def test_the_cases_cover_what_is_claimed():
    names = [case.name for case in comparison.cases(comparison.Options())]
    for part in ("2048 x 2048, 1024", "4096 x 4096, 512", "2048 x 2048, 32 ", "2048 x 2048, 4096", "Llama, 8 layers"):
        assert any(part in name for name in names)
    for part in ("embedding 50272 x 768, 2048 ids", "convolution", "greedy decoding", "batch of 16"):
        assert any(part in name for name in names)
    assert len(names) == len(set(names))


# the command


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "cases", lambda options: [case_of()])
    out, picture = tmp_path / "times.json", tmp_path / "times.png"
    result = CliRunner().invoke(app, ["--quick", "--out", str(out), "--plot", str(picture)])
    assert result.exit_code == 0, result.output
    assert "of LoRA's" in result.output
    assert len(json.loads(out.read_text())["records"]) == len(methods.METHODS)
    assert picture.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--case", "nothing like it"], "--case"),
        (["--rank", "0"], "--rank"),
        (["--device", "tpu"], "--device"),
        pytest.param(
            ["--device", "cuda"],
            "PyTorch sees no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_bad_arguments(arguments, message):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
