"""Folders of models without a configuration, of adapters on them, and a small file system to put them on."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hira.files.io.manifest import STATE, verify
from hira.files.io.model_folder import INDEX, SINGLE

P = "base_model.model."


def save_model(folder: Path, shards: Mapping[str, dict[str, Tensor]], config: dict[str, Any] | None = None) -> Path:
    """Save tensors by the names of files, with an index unless there is one file."""
    folder.mkdir(parents=True)
    for name, tensors in shards.items():
        save_file(tensors, folder / name, {"format": "pt"})
    if [*shards] != [SINGLE]:
        size = sum(tensor.nbytes for tensors in shards.values() for tensor in tensors.values())
        weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_adapter(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    """Save an adapter's tensors, which are given without PEFT's prefix."""
    folder.mkdir(parents=True)
    save_file({P + name: tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "HIRA", "r": 2} | config))
    return folder


def pair(module: str, rows: int, columns: int, rank: int = 2) -> dict[str, Tensor]:
    """Random A and B for a weight (rows, columns)."""
    return {f"{module}.hira_A": torch.randn(rank, columns), f"{module}.hira_B": torch.randn(rows, rank)}


def save_sharded(folder: Path, shards: int, rows: int) -> Path:
    """Save a model of many files, every third of which no adapter is on, and an adapter."""
    torch.manual_seed(0)
    files = {}
    for i in range(shards):
        weight = torch.randn(rows, rows)
        files[f"part-{i:02d}.safetensors"] = {f"layers.{i}.weight": weight, f"layers.{i}.norm": torch.ones(rows)}
    save_model(folder / "base", files, {"hidden_size": rows})
    (folder / "base" / "tokenizer.json").write_text("{}")
    factors: dict[str, Tensor] = {}
    for i in range(shards):
        factors |= pair(f"layers.{i}", rows, rows) if i % 3 != 2 else {}
    save_adapter(folder / "adapter", factors)
    return folder


def bytes_of(folder: Path) -> dict[str, bytes]:
    """The content of every file in a folder that verifies."""
    assert verify(folder) == []
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def everything(folder: Path) -> dict[str, Any]:
    """All that is in a folder, links and folders included."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        found[name] = path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else None
    return found


def finished(root: Path) -> set[str]:
    """The files of weights that a merge that was killed had finished, as its notes say."""
    notes = root / ".out.hira-staging" / STATE
    names = json.loads(notes.read_text())["files"] if notes.exists() else {}
    return {name for name in names if name.endswith(".safetensors")}


@contextmanager
def file_system(folder: Path, options: str) -> Iterator[Path]:
    """A small file system of its own, mounted on a folder that is made for it."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
