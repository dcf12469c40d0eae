"""The examples run from end to end, in small."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest
import torch
from peft import PeftModel

import hira

EXAMPLES = Path(__file__).parents[1] / "examples"
# a script, its steps here, and what its model gets where two are compared
SCRIPTS = {
    "trl/sft.py": (10, {"input_ids": torch.arange(12)[None]}),
    "trl/dpo.py": (10, {"input_ids": torch.arange(12)[None]}),
    "trl/reward.py": (10, {"input_ids": torch.arange(12)[None]}),
    "trl/grpo.py": (16, {"input_ids": torch.arange(12)[None]}),
    "transformers/text_classification.py": (10, {"input_ids": torch.arange(1000, 1012)[None]}),
    "transformers/image_classification.py": (30, {"pixel_values": torch.ones(1, 1, 8, 8)}),
    "transformers/audio_classification.py": (60, {"input_values": torch.sin(torch.arange(800.0))[None]}),
}
# and those with a trainer or a loop of their own
OTHERS = ["diffusers/unet.py", "sentence_transformers/retrieval.py"]


def test_the_demo(tmp_path):
    command = [sys.executable, EXAMPLES / "docstrings" / "demo.py", "--quick", "--output", tmp_path]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stderr == ""
    assert "--quick" in finished.stdout and "mean nothing" in finished.stdout
    assert "Method 1 of 3" in finished.stdout and "Method 3 of 3" in finished.stdout
    assert "{'" not in finished.stdout, "the trainer's log is printed as raw dictionaries"
    assert "trainable params: " in finished.stdout
    assert "merged: largest difference" in finished.stdout
    assert any(line.startswith("│ HiRA") for line in finished.stdout.splitlines())
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_the_notebook_runs(tmp_path):
    """As a script, in a folder of its own."""
    environment = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, EXAMPLES / "hira_in_ten_minutes.py"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=tmp_path, env=environment)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    printed = finished.stdout
    assert re.search(r"LoRA's update: +2\n.*HiRA's update: 32\n", printed)
    losses = [float(loss) for loss in re.findall(r"(?:adapted:|parameters, loss) (\d\.\d+)", printed)]
    assert len(losses) == 3 and max(losses[1:]) < losses[0] - 0.1, "an adapter did not learn"
    assert "LoRA: 4 of 64 singular values" in printed
    assert int(re.search(r"HiRA: (\d+) of 64 singular values", printed)[1]) > 32
    assert "the same logits: True" in printed
    assert float(re.search(r"difference of the logits: (\S+)", printed)[1]) < 1e-4
    before, after = re.findall(r"^(?:before|after): +(.*)$", printed, re.MULTILINE)
    assert before != after


def test_the_notebook_and_its_script_agree():
    """Cell by cell; the notebook holds no outputs, which would be those of another run."""
    script = (EXAMPLES / "hira_in_ten_minutes.py").read_text()
    _, *parts = re.split(r"^# %%(.*)\n", script, flags=re.MULTILINE)
    cells = []
    for kind, source in zip(parts[::2], parts[1::2], strict=True):
        text = re.sub(r"^# ?", "", source, flags=re.MULTILINE) if kind == " [markdown]" else source
        cells.append(("markdown" if kind else "code", text.strip()))
    notebook = json.loads((EXAMPLES / "hira_in_ten_minutes.ipynb").read_text())
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]] == cells
    assert all(cell.get("outputs", []) == [] for cell in notebook["cells"])


def test_every_script_is_run():
    found = {f"{path.parent.name}/{path.name}" for path in EXAMPLES.glob("*/*.py") if path.parent.name != "docstrings"}
    assert found - {"trl/stand_ins.py"} == {*SCRIPTS, *OTHERS}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_learns_and_its_adapter_loads(script, tmp_path, monkeypatch):
    steps, inputs = SCRIPTS[script]
    monkeypatch.syspath_prepend(str((EXAMPLES / script).parent))
    trainer = loaded(script).main(["--steps", str(steps), "--output", str(tmp_path)])

    name, sign = ("reward", -1) if script == "trl/grpo.py" else ("loss", 1)
    values = [sign * entry[name] for entry in trainer.state.log_history if name in entry]
    part = len(values) // 3 or 1
    assert mean(values[-part:]) < mean(values[:part]), values

    trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()  # without autocast
    assert any(isinstance(layer, hira.Linear) for layer in trained.modules())
    unloaded = copy.deepcopy(trained).unload()
    base = type(unloaded)(unloaded.config)  # TRL has given the other a forward that is bound to the trained model
    base.load_state_dict(unloaded.state_dict())
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, trained(**inputs).logits, rtol=1e-4, atol=1e-5)
        with trained.disable_adapter():
            assert not torch.allclose(again(**inputs).logits, trained(**inputs).logits, atol=1e-3)


def test_a_unet_learns_and_its_adapter_loads(tmp_path):
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    script = loaded("diffusers/unet.py")
    model, losses = script.main(["--steps", "40", "--output", str(tmp_path)])
    assert mean(losses[-10:]) < 0.8 * mean(losses[:10])
    assert any(isinstance(layer, hira.Conv2d) for layer in model.modules())
    again = PeftModel.from_pretrained(script.unet(), tmp_path).eval()
    inputs = torch.ones(2, 1, 8, 8), 5, torch.ones(2, 1, 32)
    with torch.no_grad():
        assert torch.equal(again(*inputs).sample, model(*inputs).sample)
        with model.disable_adapter():
            assert not torch.allclose(again(*inputs).sample, model(*inputs).sample, atol=1e-3)
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")


def test_a_sentence_encoder_learns_and_its_adapter_loads(tmp_path):
    transformers = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    trainer = loaded("sentence_transformers/retrieval.py").main(["--steps", "20", "--output", str(tmp_path)])
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert mean(losses[-2:]) < mean(losses[:2])
    again = transformers.SentenceTransformer(str(tmp_path), device="cpu")
    assert any(isinstance(layer, hira.Linear) for layer in again.modules())
    sentences = ["open(file, mode)", "Open a file."]
    found = trainer.model.encode(sentences)
    assert (again.encode(sentences) == found).all()
    again.disable_adapters()
    assert abs(again.encode(sentences) - found).max() > 1e-3


def loaded(script: str):
    """A script, as a module."""
    spec = importlib.util.spec_from_file_location(Path(script).stem, EXAMPLES / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_script_is_lora_s_but_for_one_line():
    """What is said of LoRA in a comment above that line has LoRA's names for the same values."""
    for script in (*SCRIPTS, *OTHERS):
        lines = (EXAMPLES / script).read_text().splitlines()
        (i,) = [i for i, line in enumerate(lines) if "# with LoRA: " in line]
        said = lines[i].partition("# with LoRA: ")[2].replace("LoraConfig", "HiraConfig").replace("lora_", "hira_")
        assert said in lines[i + 1], script
        assert sum("hira" in line.lower() for line in lines[i + 2 :]) == 0, script
