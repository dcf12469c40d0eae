"""`hira finetune` under DeepSpeed's ZeRO-2 and ZeRO-3."""

from __future__ import annotations

import pytest
from finetune_runs import assert_two_processes_train_as_one

from hira.training.finetune.run import finetune


def test_two_processes_train_as_one(flags):
    """Under ZeRO-3 `hira_alpha` reads base weights that are spread over the processes."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: make setup-source")
    finetune(flags)
    for config in ("zero2", "zero3"):
        assert_two_processes_train_as_one(flags, config, config)
