"""The examples run from end to end, in small."""

from __future__ import annotations

import copy
import importlib.util
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


def test_every_script_is_run():
    folders = [EXAMPLES / "trl", EXAMPLES / "transformers"]
    found = {f"{path.parent.name}/{path.name}" for folder in folders for path in folder.glob("*.py")}
    assert found - {"trl/stand_ins.py"} == set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_learns_and_its_adapter_loads(script, tmp_path, monkeypatch):
    path, (steps, inputs) = EXAMPLES / script, SCRIPTS[script]
    monkeypatch.syspath_prepend(str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    trainer = module.main(["--steps", str(steps), "--output", str(tmp_path)])

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


def test_a_script_is_lora_s_but_for_one_line():
    """What is said of LoRA in a comment above that line has LoRA's names for the same values."""
    for script in SCRIPTS:
        lines = (EXAMPLES / script).read_text().splitlines()
        (i,) = [i for i, line in enumerate(lines) if "# with LoRA: " in line]
        said = lines[i].partition("# with LoRA: ")[2].replace("LoraConfig", "HiraConfig").replace("lora_", "hira_")
        assert said in lines[i + 1], script
        assert sum("hira" in line.lower() for line in lines[i + 2 :]) == 0, script
