"""A language model that the repository pretrains, for a few steps only, and data for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from benchmarks import tiny_lm
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory) -> Path:
    """The folder of `python -m benchmarks.tiny_lm`: `model` and `reference.jsonl`, here of 200 rows."""
    folder = tmp_path_factory.mktemp("pretrained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_lm, "PRETRAINING_STEPS", 20)
        tiny_lm.write(folder)
    rows = (folder / "reference.jsonl").read_text().splitlines(keepends=True)
    (folder / "reference.jsonl").write_text("".join(rows[:200]))
    return folder


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    """The folder of a model of one layer, with random weights, and the same tokenizer."""
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=256, max_position_embeddings=tiny_lm.CONTEXT, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_lm.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def flags(pretrained, tmp_path, monkeypatch) -> list[str]:
    """Flags of a short run in float32, whose output is `out` in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    options = {
        "model_name_or_path": pretrained / "model",
        "dataset_name": pretrained / "reference.jsonl",
        "output_dir": "out",
        "hira_r": 4,
        "hira_target_modules": "all-linear",
        "learning_rate": 1e-2,
        "max_steps": 6,
        "max_length": 48,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    return [str(part) for name, value in options.items() for part in (f"--{name}", value)]


@pytest.fixture
def write(tmp_path):
    """Writes rows to a JSONL file and returns its name."""

    def written(rows: list[object], name: str = "rows.jsonl") -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return name

    return written
