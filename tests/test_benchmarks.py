"""The scripts in benchmarks/: what can be checked of them without their hours and their hardware."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import hira

FOLDER = Path(__file__).parent.parent / "benchmarks"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_the_documentation_has_the_table_of_the_committed_dtypes():
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from benchmarks import adapter_dtype

    seeds = json.loads(adapter_dtype.RESULTS.read_text())["seeds"]
    assert len(seeds) >= 3
    assert "\n".join(adapter_dtype.table(seeds)) in (FOLDER.parent / "docs" / "learning_rate.md").read_text()


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


def test_the_pages_have_the_tables_of_the_committed_results():
    import readme_table

    for page, lines in {readme_table.PAGE: readme_table.tables(), readme_table.README: readme_table.few_rows()}.items():
        text = page.read_text()
        assert readme_table.with_lines(text, readme_table.BEGIN, lines) == text
        assert "| hira / LoRA |" in text


# what the text says of the tables: a page's section, dtype, case, methods
SAID = [
    ("performance.md", "When to keep W'", "bfloat16", "linear 2048 x 2048, 1024 tokens", ("hira", "hira, weight kept")),
    ("performance.md", "When to keep W'", "bfloat16", "linear 2048 x 2048, 32 tokens", ("hira", "hira, weight kept")),
    ("performance.md", "When to keep W'", "float32", "linear 2048 x 2048, 32 tokens", ("hira", "hira, weight kept")),
    ("performance.md", "When to keep W'", "float32", "tokens, recomputed", ("hira", "hira, weight kept")),
    ("architecture.md", "The product for dA", "float32", "linear 2048 x 2048, 1024 tokens", ("hira", "int8")),
    ("architecture.md", "The product for dA", "float32", "linear 2048 x 2048, 4096 tokens", ("hira", "int8")),
]


@pytest.mark.parametrize(("page", "section", "dtype", "case", "methods"), SAID)
def test_the_text_says_what_the_tables_say(page, section, dtype, case, methods):
    import readme_table

    text = (FOLDER.parent / "docs" / page).read_text().partition(f"## {section}")[2].partition("\n## ")[0]
    table = "\n".join(readme_table.tables()).partition(f"**{dtype},")[2].partition("\n**")[0]
    row = next(line for line in table.splitlines() if f"{case} |" in line).strip("|").split(" | ")
    for method in methods:
        column = {"hira": 2, "int8": 3, "hira, weight kept": 4}[method]
        assert re.search(rf"\b{re.escape(row[column].strip())}\b", text), (method, row)


def test_the_rows_of_8_bit_gradients_are_those_of_the_results():
    from benchmarks.int8_gradient import RESULTS as path
    from benchmarks.int8_report import spread

    runs = [run["arms"] | {"task": run["task"]} for run in json.loads(path.read_text()) if "arms" in run]
    text = (FOLDER.parent / "docs" / "architecture.md").read_text()
    for name, task, metric in (
        ("demo's task, test accuracy", "docstrings", "test accuracy"),
        ("demo's task, validation loss", "docstrings", "validation loss"),
        ("tiny language model, validation loss", "tiny_lm", "validation loss"),
    ):
        pairs = [(run["exact"]["final"][metric], run["int8"]["final"][metric]) for run in runs if run["task"] == task]
        exact, change = spread([a for a, _ in pairs], ""), spread([b - a for a, b in pairs], "+")
        assert f"| {name} | {exact} | {change} |" in text


def test_the_rows_of_roundings_are_those_of_the_results():
    from benchmarks import bfloat16_rounding as rounding

    seeds = json.loads(rounding.RESULTS.read_text())["seeds"]
    text = (FOLDER.parent / "docs" / "concepts.md").read_text()
    for arm, name in {
        rounding.NEAREST: "to nearest",
        rounding.DITHER: "dither",
        "PEFT's HiRA": "PEFT's HiRA, two products",
    }.items():
        both = [
            rounding.spread(each, 5)
            for rate in map(str, rounding.RATES)
            for each in rounding.distances(seeds, rate, arm)
        ]
        assert f"| {name} | {' | '.join(both)} |" in text


def test_the_times_of_merging_are_those_of_the_results():
    from benchmarks import merge

    text = (FOLDER.parent / "docs" / "checkpoints.md").read_text()
    for record in json.loads(merge.RESULTS.read_text()):
        for model in record["models"]:
            seconds, peaks = model["median_seconds"], model["peak_bytes"]
            row = f"| {model['bytes'] / 1e9:.2f} GB of {record['settings']['dtype']}"
            (line,) = [line for line in text.splitlines() if line.startswith(row)]
            assert f"| {seconds['cp -r']:.1f} s |" in line
            assert f"| {seconds['hira merge']:.1f} s, peak {peaks['hira merge'] / 1e6:.0f} MB |" in line
            if peft := seconds.get("PEFT's HiRA"):
                peak = peaks["PEFT's HiRA"] / 1e9
                assert f"| {peft:.1f} s, peak {peak:.1f} GB |" in line


def test_the_page_on_performance_has_the_computed_table():
    import roofline

    page = roofline.PAGE.read_text()
    assert roofline.with_table(page) == page
    assert page.count(", computed |") == len(roofline.DEVICES) == 5
    assert "| H200, measured |" in page


def test_the_computed_bounds_count_bytes_and_operations():
    """By hand for a device that moves a byte, or computes an operation, in a second."""
    import roofline

    m, t, r = roofline.SIZE, roofline.TOKENS, roofline.RANK
    slow_memory, slow_arithmetic = roofline.Device("", 1.0, 1e300), roofline.Device("", 1e300, 1.0)
    forming, reducing = 4 * m * m, (4 + r / 16) * m * m
    products = 3 * 2 * (2 * t * m + m * m)
    assert roofline.milliseconds(roofline.hira(*roofline.KERNELS), slow_memory) == pytest.approx(
        1e3 * (2 * forming + products + reducing)
    )
    assert roofline.milliseconds(roofline.hira(*roofline.KERNELS), slow_arithmetic) == pytest.approx(
        1e3 * (6 * t * m * m + 2 * 6 * r * m * m + 8 * r * m * m)
    )
    assert roofline.milliseconds(roofline.lora(), slow_arithmetic) == pytest.approx(
        1e3 * (4 * t * m * m + 12 * r * t * m)
    )


def test_the_documented_commands_find_what_they_import():
    commands = re.findall(r"^ +python (.+?) *(?:#|$)", (FOLDER.parent / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    modules = [re.match(r"-m ([\w.]+)", command).group(1) for command in commands]
    assert {"benchmarks.comparison", "recipes.memory"} <= set(modules)
    program = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]"
    subprocess.run([sys.executable, "-c", program, *modules], cwd=FOLDER.parent, check=True)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """The script, with an empty cache folder."""
    pytest.importorskip("triton", reason="triton is not installed, so its kernels cannot run, not even interpreted")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return importlib.import_module("gpu")


def test_the_gpu_script_checks_every_kernel(gpu, capsys):
    verdicts = gpu.measured(torch.device(DEVICE), 16).verdicts
    assert len(verdicts) == 9  # three kernels in three dtypes
    assert all(verdict.error < 0.01 for verdict in verdicts.values())
    assert capsys.readouterr().out.count("factor_gradients") == 3


@pytest.mark.filterwarnings("ignore:hira's kernel form failed its check")
def test_the_gpu_script_stops_at_a_wrong_kernel(gpu, monkeypatch, capsys):
    from hira.ops import triton

    form = triton.form
    monkeypatch.setattr(triton, "form", lambda *a, **k: 1.001 * form(*a, **k))
    with pytest.raises(SystemExit, match="wrong"):
        gpu.measured(torch.device(DEVICE), 16)
    assert "form, float32, float32: it is off by" in capsys.readouterr().out


def test_the_gpu_script_says_how_it_is_used():
    done = subprocess.run([FOLDER / "gpu.sh"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "gpu.sh run OUT" in done.stderr
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parent)}
    done = subprocess.run([sys.executable, FOLDER / "gpu.py"], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "gpu.py OUT" in done.stderr


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_merge_script_makes_a_model_and_an_adapter_that_load(tmp_path, dtype):
    import merge

    model = merge.Model.of_size(0.002, dtype, hidden=64, shard=10**6)
    base, adapter = model.made(tmp_path)
    assert abs(merge.size_of(base) / 2e6 - 1) < 0.1
    assert len(list(base.glob(merge.WEIGHTS))) > 1
    times = {path: path.stat().st_mtime_ns for folder in (base, adapter) for path in folder.iterdir()}
    assert model.made(tmp_path) == (base, adapter)
    assert {path: path.stat().st_mtime_ns for folder in (base, adapter) for path in folder.iterdir()} == times

    loaded, report = AutoModelForCausalLM.from_pretrained(base, dtype="auto", output_loading_info=True)
    assert loaded.dtype == dtype
    assert not any(report.values())
    adapted = PeftModel.from_pretrained(loaded, adapter)
    layers = [layer for layer in adapted.modules() if isinstance(layer, hira.Linear)]
    assert len(layers) == 7 * model.layers
    BA = torch.cat([(layer.hira_B["default"] @ layer.hira_A["default"]).flatten() for layer in layers]).detach()
    assert abs(BA.std() / merge.BA_DEVIATION - 1) < 0.05


def test_the_merge_script_times_no_wrong_merge(tmp_path, monkeypatch):
    import merge

    copies = tmp_path / "copies"
    copies.write_text('#!/bin/sh\ncp -r "$2" "$5"\n')
    copies.chmod(0o755)
    monkeypatch.setattr(merge, "COMMAND", copies)
    with pytest.raises(SystemExit, match="q_proj"):
        merge.check(torch.bfloat16, tmp_path)


def test_the_merge_script_refuses_a_folder_in_memory(tmp_path, monkeypatch):
    import merge

    monkeypatch.setattr(merge.subprocess, "check_output", lambda *arguments, **how: "Type\ntmpfs\n")
    with pytest.raises(SystemExit, match=r"tmpfs.* --folder"):
        merge.measured(argparse.Namespace(), tmp_path)


def test_the_page_on_serving_has_the_table_of_the_committed_results():
    import serving

    page = serving.PAGE.read_text()
    assert serving.with_table(page) == page
    records = json.loads(serving.RESULTS.read_text())["records"]
    assert {record["dtype"] for record in records} == {"float32", "bfloat16"}
    assert all(record["bytes"] >= 1e9 and record["times_merged"] <= serving.GOAL for record in records)
    assert all(len({run["sha256"] for of in record["runs"].values() for run in of}) == 1 for record in records)
