"""`hira finetune` under FSDP2, in two processes on a CPU, with the environment that accelerate makes of TRL's fsdp2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from finetune_runs import ENVIRONMENT, FLOAT32, losses, with_changed
from safetensors.torch import load_file

from hira.training.finetune.arguments import parse
from hira.training.finetune.launch import launch_flags
from hira.training.finetune.run import finetune

PROCESS = Path(__file__).parents[2] / "fsdp2_on_cpus.py"


def environment(command: list[str]) -> dict[str, str]:
    """What the launcher that hira starts sets for its processes, here without accelerators."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.accelerator.is_available", lambda: True)
        flags = launch_flags(parse([*command, "--use_cpu", "true"]))
    given, *_ = _validate_launch_command(launch_command_parser().parse_args([*flags, "script.py"]))
    return {**ENVIRONMENT, **prepare_multi_gpu_env(given), "ACCELERATE_USE_CPU": "true"}


def test_two_processes_train_as_one(flags):
    """Of the same global batch; checkpoints are written, the best is read again, and the adapter is whole."""
    kept = {"test_split_size": 0.1, "eval_strategy": "steps", "eval_steps": 3, "save_steps": 3}
    flags = with_changed(flags, **kept, load_best_model_at_end=True, gradient_checkpointing=True)
    finetune(flags)
    two = {"output_dir": "two", "per_device_train_batch_size": 2, "accelerate_config": "fsdp2", "num_processes": 2}
    command = with_changed(flags, **two)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", PROCESS]
    ended = subprocess.run([*launcher, *command], env=environment(command), capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stderr
    assert Path("two/checkpoint-6/pytorch_model_fsdp.bin").is_file(), "it did not run under FSDP"
    assert losses("two") == pytest.approx(losses("out"), rel=FLOAT32)
    found, expected = (load_file(f"{name}/adapter_model.safetensors") for name in ("two", "out"))
    assert found.keys() == expected.keys()
    largest = max(value.abs().max() for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-3 * float(largest))
