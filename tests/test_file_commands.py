"""`hira merge` and `hira convert`: what they print, what they leave, and how they end."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from commands import run_in_this_process
from safetensors.torch import save_file
from torch import nn

import hira

HIRA = str(Path(sys.executable).with_name("hira"))
LORA = ["--to", "lora", "--rank", "2", "--base", "base"]
COMMANDS = {
    "lora": ["convert", "adapter", "-o", "lora", *LORA],
    "fold": ["convert", "adapter", "--out", "folded", "--fold"],
    "original": ["convert", "original", "-o", "from_original", "--from", "original", "--allow-pickle", *LORA],
    "not empty": ["convert", "adapter", "-o", "full", "--fold"],
    "overwrite": ["convert", "adapter", "-o", "old", "--fold", "--overwrite"],
    "pickle": ["convert", "original", "-o", "none", "--from", "original"],
    "itself": ["convert", "adapter", "-o", "adapter", "--fold", "--overwrite"],
    "no adapter": ["convert", "base", "-o", "none", "--fold"],
    "no out": ["convert", "adapter", "--fold"],
    "nothing": ["convert", "adapter", "-o", "none"],
    "no base": ["convert", "adapter", "-o", "none", "--to", "lora", "--rank", "2"],
    "both": ["convert", "adapter", "-o", "none", "--fold", *LORA],
    "rank 0": ["convert", "adapter", "-o", "none", "--to", "lora", "--rank", "0", "--base", "base"],
    "to what": ["convert", "adapter", "-o", "none", "--to", "dora"],
    "merge": ["merge", "base", "adapter", "-o", "merged"],
    "dry run": ["merge", "base", "adapter", "-o", "none", "--dry-run", "--dtype", "bfloat16", "--rounding", "nearest"],
    "two": ["merge", "base", "adapter", "adapter", "-o", "two", "--weight", "0.5", "--weight", "2"],
    "old merge": ["merge", "base", "adapter", "-o", "full"],
    "merge no adapter": ["merge", "base", "base", "-o", "none"],
    "one weight": ["merge", "base", "adapter", "adapter", "-o", "none", "--weight", "0.5"],
    "size": ["merge", "base", "adapter", "-o", "none", "--max-shard-size", "5 apples"],
    "dtype": ["merge", "base", "adapter", "-o", "none", "--dtype", "int8"],
    "adapter": ["merge", "base", "-o", "none"],
    "swapped": ["merge", "adapter", "base", "-o", "none"],
    "twice": ["merge", "twice", "adapter", "-o", "none"],
    "twice after all": ["merge", "twice", "adapter", "-o", "again", "--any-base"],
    "inspect a model": ["inspect", "base"],
    "inspect a file": ["inspect", "adapter/adapter_config.json"],
    "verify nothing": ["verify", "nothing"],
    "page nowhere": ["inspect", "adapter", "--html", "nowhere/page.html"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, a HiRA adapter on it, and one of the paper's repository."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("convert")
    (folder / "base").mkdir()
    body = nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 7))
    save_file(body.state_dict(), folder / "base" / "model.safetensors")
    config = peft.HiraConfig(r=4, rank_pattern={"2": 3}, target_modules=["0", "2"], init_weights=False)
    peft.get_peft_model(body, config).save_pretrained(folder / "adapter")
    (folder / "original").mkdir()
    pair = {"base_model.model.0.lora_A": torch.randn(2, 9), "base_model.model.0.lora_B": torch.randn(8, 2)}
    torch.save(pair, folder / "original" / "adapter_model.bin")
    text = json.dumps({"peft_type": "LORA", "r_ab": 2, "target_modules": ["0"]})
    (folder / "original" / "adapter_config.json").write_text(text)
    hira.merge_checkpoint(folder / "base", folder / "adapter", folder / "twice")
    for name in ("full", "old"):
        (folder / name).mkdir()
        (folder / name / "mine").write_text("precious")
    return folder


# one command for each exit status runs in a process of its own, by the console script
IN_PROCESSES = ("merge", "not empty", "no out")


@pytest.fixture(scope="module")
def done(folder) -> dict[str, subprocess.CompletedProcess[str]]:
    """What came of each command."""
    pipes = {"cwd": folder, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = {name: subprocess.Popen([HIRA, *COMMANDS[name]], **pipes) for name in IN_PROCESSES}
    results = {}
    for name, process in running.items():
        out, err = process.communicate(timeout=120)
        results[name] = subprocess.CompletedProcess(process.args, process.returncode, out, err)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, arguments in COMMANDS.items():
            if name not in results:
                results[name] = run_in_this_process(*arguments)
    return results


def test_merging(done, folder, tmp_path):
    assert (done["merge"].returncode, done["merge"].stderr) == (0, "")
    report = hira.merge_checkpoint(folder / "base", folder / "adapter", tmp_path / "merged")
    first, second, note = done["merge"].stdout.splitlines()
    size = f"{report.nbytes / 1e9:.3g} GB"
    assert re.fullmatch(rf"{folder / 'merged'}: {size} in 1 file, \S+ s, \S+ GB/s", first)
    assert second == "tensors: 2 merged, 0 replaced, 0 added, of 4"
    assert note == f"note: {report.notes[0]}" and "not checked whether" in note
    for name in ("model.safetensors", "README.md"):
        assert (folder / "merged" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()
    assert hira.verify_folder(folder / "merged") == []


def test_merging_with_weights(done, folder, tmp_path):
    assert done["two"].returncode == 0, done["two"].stderr
    hira.merge_checkpoint(folder / "base", [folder / "adapter"] * 2, tmp_path / "two", weights=[0.5, 2])
    name = "model.safetensors"
    assert (folder / "two" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_dry_run_says_what_would_be_written(done, folder):
    assert (done["dry run"].returncode, done["dry run"].stderr) == (0, "")
    lines = done["dry run"].stdout.splitlines()
    assert re.fullmatch(rf"{folder / 'none'}: \S+ GB in 1 file would be written, \S+ GB are free", lines[0])
    assert lines[1:4] == ["tensors: 2 merged, 0 replaced, 0 added, of 4", "merged: 0.weight", "merged: 2.weight"]
    assert [line.split(":")[0] for line in lines[4:]] == ["note"]
    assert not (folder / "none").exists()


def test_files_are_worked_on_without_peft(done, folder):
    """Its import takes longer than most of these commands."""
    code = """
import sys, hira.cli.app as cli
for command in ("verify merged", "inspect adapter --base base --json", "merge base adapter -o without_peft"):
    cli.app(command.split(), standalone_mode=False)
    assert "peft" not in sys.modules, command
import hira
print(hira.is_registered())
"""
    python = [sys.executable, "-c", code]
    run = subprocess.run(python, cwd=folder, capture_output=True, text=True, timeout=120)
    assert run.stdout.splitlines()[-1:] == ["True"], run.stderr  # and who imports it then gets all of it


def test_a_lora_is_printed_with_what_it_loses(done, folder, tmp_path):
    assert done["lora"].returncode == 0, done["lora"].stderr
    options = {"to": "lora", "rank": 2, "base": folder / "base"}
    lora = hira.convert_adapter(folder / "adapter", tmp_path / "lora", **options).lora
    lines = [line.split() for line in done["lora"].stdout.splitlines()]
    for layer in lora.layers:
        assert [layer.name, f"{layer.relative_error:.4f}"] in lines
    assert ["all", f"{lora.relative_error:.4f}"] in lines
    assert lora.statement in " ".join(done["lora"].stdout.split())
    assert f"{folder / 'lora'}: LoRA of rank 2, modules: 2" in done["lora"].stdout
    assert hira.verify_folder(folder / "lora") == []
    name = "adapter_model.safetensors"
    assert (folder / "lora" / name).read_bytes() == (tmp_path / "lora" / name).read_bytes()


@pytest.mark.parametrize(
    ("command", "out", "said"),
    [
        ("fold", "folded", "HiRA of rank 4, modules: 2"),
        ("original", "from_original", "LoRA of rank 2, modules: 1"),
        ("overwrite", "old", "HiRA of rank 4, modules: 2"),
        ("twice after all", "again", "note: the adapter"),
    ],
)
def test_a_folder_is_written(done, folder, command, out, said):
    assert done[command].returncode == 0, done[command].stderr
    assert f"{folder / out}: " in done[command].stdout and said in done[command].stdout
    assert hira.verify_folder(folder / out) == []
    assert not (folder / out / "mine").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("not empty", "is not empty; name another folder, or pass --overwrite."),
        ("pickle", "pass --allow-pickle (allow_pickle=True)."),
        ("itself", "which is read; name another folder."),
        ("no adapter", "adapter_config.json is missing"),
        ("old merge", "is not empty; name another folder, or pass --overwrite."),
        ("merge no adapter", "adapter_config.json is missing"),
        ("swapped", "The base model comes first: hira merge BASE"),
        ("twice", "twice already: `hira merge` wrote that model. If it is meant: --any-base"),
        ("inspect a model", "base is a model's folder, where an adapter's was expected"),
        ("inspect a file", "is not a folder but a file; pass its folder"),
        ("verify nothing", "the folder 'nothing' is not a folder here; check the path, or download it first"),
    ],
)
def test_failures(done, folder, command, message):
    assert (done[command].returncode, done[command].stdout) == (1, "")
    # other libraries may have written before
    assert done[command].stderr.splitlines()[-1].startswith("hira: ")
    assert message in done[command].stderr
    assert "Traceback" not in done[command].stderr
    assert (folder / "full" / "mine").read_text() == "precious"
    assert (folder / "adapter" / "adapter_config.json").is_file()
    assert not (folder / "none").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("no out", "Missing option '-o' / '--out'"),
        ("nothing", "There is nothing to convert: pass --from original, --to lora or --fold"),
        ("no base", "pass --rank and --base with --to"),
        ("both", "pass --to lora or --fold (to=, fold=), not both."),
        ("rank 0", "Invalid value for '--rank'"),
        ("to what", "Invalid value for '--to'"),
        ("one weight", "1 weights for 2 adapters"),
        ("size", "'5 apples' is not a size such as 5GB"),
        ("dtype", "Invalid value for '--dtype'"),
        ("adapter", "Missing argument 'ADAPTER...'"),
        ("page nowhere", "Invalid value for --html: nowhere is not a folder"),
    ],
)
def test_usage_errors(done, folder, command, message):
    assert (done[command].returncode, done[command].stdout) == (2, "")
    assert message in " ".join(done[command].stderr.replace("│", " ").split())
    assert "Usage: " in done[command].stderr
    assert not (folder / "none").exists()
