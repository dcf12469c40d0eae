"""What `--dry-run` says is what a model would have."""

from __future__ import annotations

import pytest
import torch
from finetune_runs import with_changed
from peft import get_peft_model
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM

from hira.training.finetune.arguments import parse
from hira.training.finetune.plan import plan


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_counts_and_bytes(checkpointing, dtype, flags):
    flags = [*flags, "--gradient_checkpointing", str(checkpointing), "--hira_modules_to_save", "lm_head"]
    arguments = parse([*flags, "--dtype", str(dtype).removeprefix("torch.")])
    adapted, memory = plan(arguments)
    base = AutoModelForCausalLM.from_pretrained(arguments.model.model_name_or_path, dtype=dtype)
    assert memory.weights == sum(parameter.nbytes for parameter in base.parameters())
    model = get_peft_model(base, arguments.config())
    assert (adapted.trainable, adapted.total) == model.get_nb_trainable_parameters()
    assert sum(adapted.modules.values()) == 28
    assert memory.training == 16 * adapted.trainable
    assert memory.batch == (4, 48)

    own = {parameter.data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.zeros(4, 48, dtype=torch.long)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        base.train().model(input_ids=ids, use_cache=False)
    real = sum(storage.nbytes() for storage in kept.values())
    if checkpointing:
        assert memory.activations < real / 2
    else:
        # the plan has a mask, and so a copy of key and value for each head
        assert real * 0.98 <= memory.activations <= real * 1.1


def test_activations_are_of_the_dtype_that_is_computed_in(flags, tmp_path):
    """Whatever dtype the model's file names; autocast halves what is kept."""
    model = AutoModelForCausalLM.from_pretrained(
        dict(zip(flags[::2], flags[1::2], strict=True))["--model_name_or_path"]
    )
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype).save_pretrained(tmp_path / str(dtype))
        for bf16 in ("false", "true"):
            changed = with_changed(flags, model_name_or_path=tmp_path / str(dtype), bf16=bf16)
            found[dtype, bf16] = plan(parse([*changed, "--dtype", "float32"]))[1].activations
    assert found[torch.float32, "false"] == found[torch.bfloat16, "false"]
    assert found[torch.float32, "true"] == found[torch.bfloat16, "true"]
    assert found[torch.float32, "true"] < 0.75 * found[torch.float32, "false"]


def test_long_sequences_keep_no_matrix_of_tokens_by_tokens(flags):
    """Twice the tokens keep twice as much, but for the mask of a byte."""
    kept = {n: plan(parse(with_changed(flags, max_length=n)))[1].activations for n in (64, 128)}
    assert kept[128] - 2 * kept[64] <= 4 * (128**2 - 2 * 64**2)


@pytest.mark.parametrize(("flag", "bits"), [("--load_in_4bit", 4.5), ("--load_in_8bit", 8)])
def test_a_quantised_base_takes_fewer_bytes(flag, bits, flags):
    _, memory = plan(parse([*flags, flag]))
    linear = 4 * (4 * 128 * 128 + 3 * 128 * 352)
    others = 2 * 256 * 128 + 9 * 128
    assert memory.weights == pytest.approx(linear * bits / 8 + others * 4, rel=1e-6)


def test_kept_weights_are_dense(flags):
    for more in ([], ["--load_in_4bit"]):
        _, memory = plan(parse([*flags, *more, "--hira_keep_weight", "true"]))
        assert memory.kept == 4 * 4 * (4 * 128 * 128 + 3 * 128 * 352)
        assert "and W' of them" in next(line for line in memory.lines() if "weights" in line)
    assert plan(parse(flags))[1].kept == 0
