"""Mixed precision, compilation, checkpointing and accumulation train as the plain float32 run does, to rounding."""

from __future__ import annotations

import pytest
import torch
from benchmarks import tiny_lm
from finetune_runs import FLOAT32, losses, with_changed
from peft import HiraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hira.training.finetune.run import finetune

RATE = 2e-3  # at which the loss falls evenly, so that steps do not enlarge what rounding changed
# bfloat16 keeps 8 bits: a unit is 2^-8, and roundings of a mean over more than hundred tokens partly cancel.
BFLOAT16 = 2**-8


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"gradient_checkpointing": True}, 0),  # the same operations again
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, FLOAT32),
        ({"torch_compile": True, "torch_compile_backend": "eager"}, FLOAT32),
        ({"bf16": True}, BFLOAT16),
    ],
    ids=["checkpointing", "accumulation", "compile", "bf16"],
)
def test_the_losses_are_those_of_the_plain_run(options, tolerance, flags, small):
    flags = with_changed(flags, learning_rate=RATE)
    if "torch_compile" in options:  # which takes its time for each layer
        flags = with_changed(flags, model_name_or_path=small)
    finetune(flags)
    finetune(with_changed(flags, output_dir="other", **options))
    assert len(losses("other")) == 6
    assert losses("other") == pytest.approx(losses("out"), rel=tolerance, abs=0)
    adapter, other = (load_file(f"{folder}/adapter_model.safetensors") for folder in ("out", "other"))
    assert all(value.any() for value in adapter.values())
    if not tolerance:
        assert [name for name, value in adapter.items() if not torch.equal(value, other[name])] == []


def test_float16_with_a_scaler(small):
    """By hand, because accelerate takes fp16 on GPUs only: float16's autocast and a scaler, against float32."""
    ids = next(tiny_lm.batches(tiny_lm.reference_text()[0], 1, seed=0))[:2, :32]
    losses = {}
    for half in (False, True):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
        model = get_peft_model(base, HiraConfig(r=4, hira_alpha=8, target_modules="all-linear"))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", enabled=half, init_scale=2.0**12)
        losses[half] = []
        for _ in range(6):
            with torch.autocast("cpu", torch.float16, enabled=half):
                loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses[half].append(loss.item())
        assert not half or scaler.get_scale() == 2.0**12, "gradients overflowed, so that steps were left out"
    assert losses[False][-1] < losses[False][0] - 0.01
    assert losses[True] == pytest.approx(losses[False], rel=2**-9)  # float16 keeps 11 bits; as for bfloat16 above
