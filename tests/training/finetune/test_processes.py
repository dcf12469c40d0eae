"""`hira finetune` in processes of its own: two at once, and one that is killed."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest
import torch
from finetune_runs import ENVIRONMENT, HIRA, assert_two_processes_train_as_one, losses, with_changed
from safetensors.torch import load_file

from hira import HiraError
from hira.training.finetune.checkpoints import checkpoint_to_resume
from hira.training.finetune.run import finetune


def test_two_processes_train_as_one(flags):
    flags = with_changed(flags, test_split_size=0.1)  # the same rows in each process
    finetune(flags)
    assert_two_processes_train_as_one(flags, "ddp", "ddp")


def test_a_killed_run_is_resumed(flags):
    """It ends with the losses and the adapter of the run that nobody killed."""
    flags = with_changed(flags, max_steps=40, save_steps=5, per_device_train_batch_size=2)
    command = [*HIRA, "finetune", *with_changed(flags, output_dir="killed")]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        while not Path("killed/checkpoint-10").exists():  # the one before it is complete
            assert process.poll() is None, process.stdout.read().decode()
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -9
    assert not Path("killed/adapter_model.safetensors").exists()

    finetune(flags)
    finetune(with_changed(flags, output_dir="killed", resume_from_checkpoint=True))
    assert len(losses("killed")) == 40
    assert losses("killed") == losses("out")
    expected, found = (load_file(f"{folder}/adapter_model.safetensors") for folder in ("out", "killed"))
    assert [name for name, value in expected.items() if not torch.equal(value, found[name])] == []


def test_a_checkpoint_that_is_not_complete_is_passed_over(tmp_path):
    for step, state in ((5, "{}"), (10, "{}"), (15, ""), (20, '{"epoch": 1'), (25, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert checkpoint_to_resume(tmp_path, "true") == str(tmp_path / "checkpoint-10")
    assert checkpoint_to_resume(tmp_path, None) is None
    for step in (15, 20, 25):
        with pytest.raises(HiraError, match=f"checkpoint-{step}"):
            checkpoint_to_resume(tmp_path, str(tmp_path / f"checkpoint-{step}"))
