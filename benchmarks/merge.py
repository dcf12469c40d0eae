"""How long does `hira merge` take beside `cp -r` with `sync`, and beside PEFT, and how much memory does each need?

    python -m benchmarks.merge [--gigabytes 4] [--dtype bfloat16|float32] [--rounds 3] [--folder FOLDER] [--double]

A Llama with random weights, in shards, and an adapter of all its linear layers are made on the disk. Each measurement
is a process of its own, and ends with `sync`: in every round `cp -r` and `hira merge`, and in the last one PEFT's own
HiRA, which loads the model, merges and saves it. All read files that the page cache holds, since they were just read.
Before anything is timed, a small model's merged tensors are compared with those of `merge_and_unload`, bit for bit.
One size and dtype at a time, added to the JSON file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from benchmarks.comparison.report import machine
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

import hira
from hira.files.io.safetensors_file import (
    TensorEntry,
    entry_of,
    header_bytes,
    read_header,
    safetensors_order,
    tensor_bytes,
)

CP, HIRA, PEFT = "cp -r", "hira merge", "PEFT's HiRA"
RESULTS = Path(__file__).parent / "results" / "merge.json"
COMMAND = Path(sys.executable).with_name("hira")
INDEX, WEIGHTS, ADAPTER_WEIGHTS = "model.safetensors.index.json", "*.safetensors", "adapter_model.safetensors"
TARGETS = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}

SEED, RANK = 0, 32
SHARD = 10**9  # bytes, at most
W0_DEVIATION, BA_DEVIATION = 0.02, 1e-2
CHECKED_GIGABYTES, CHECKED_HIDDEN, CHECKED_SHARD = 0.002, 64, 10**6  # the model whose merged tensors are compared

# Starts a command and waits for it, from a process that is smaller than any command: the peak that the kernel reports
# of a process begins with the memory of the one that started it.
STARTER = """
import json, os, sys, time
start = time.perf_counter()
pid = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ)
_, status, usage = os.wait4(pid, 0)
ended = time.perf_counter()
os.sync()
synced = time.perf_counter()
times = {"seconds": synced - start, "of which sync": synced - ended}
cpu = {"user CPU seconds": usage.ru_utime, "system CPU seconds": usage.ru_stime}
found = {**times, **cpu, "peak_bytes": 1024 * usage.ru_maxrss, "exit": os.waitstatus_to_exitcode(status)}
with open(sys.argv[1], "w") as file:
    json.dump(found, file)
"""
TOUCH = "import sys; b'1' * int(sys.argv[1])"
MERGE_WITH_PEFT = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out, shard = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
model.save_pretrained(out, max_shard_size=int(shard))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="the model's size, in 10^9 bytes")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--hidden", type=int, default=2048, help="the model's width, a multiple of 64")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--double", action="store_true", help="merge a model with twice the layers too, once")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; models are kept there, and found again")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file to add to")
    options = parser.parse_args()
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
        record = measured(options, options.folder.resolve())
    else:
        with TemporaryDirectory(prefix="merge-", dir=".") as folder:
            record = measured(options, Path(folder).resolve())
    records = json.loads(options.out.read_text()) if options.out.exists() else []
    records = [old for old in records if old["settings"] != record["settings"]] + [record]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(records, indent=1) + "\n")
    for record in records:
        Console(width=100).print(table(record))


def measured(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The record of one size and dtype."""
    filesystem = subprocess.check_output(["df", "--output=fstype", folder], text=True).split()[-1]
    if filesystem in ("tmpfs", "ramfs"):
        raise SystemExit(f"{folder} is on a {filesystem}, which is memory; choose a --folder on a disk")
    check(getattr(torch, options.dtype), folder)
    model = Model.of_size(options.gigabytes, getattr(torch, options.dtype), options.hidden)
    models = [model, Model(2 * model.layers, model.dtype, model.hidden)] if options.double else [model]
    settings = {"gigabytes": options.gigabytes, "dtype": options.dtype, "hidden": options.hidden, "rank": RANK}
    found = []
    for index, model in enumerate(models):
        base, adapter = model.made(folder)
        measure(CP, base, adapter, folder / "out")  # not counted: a disk takes longer where it was never written
        methods = [CP, HIRA] * (1 if index else options.rounds) + [PEFT] * (index == 0)
        runs: dict[str, list[dict[str, Any]]] = {}
        for method in methods:
            runs.setdefault(method, []).append(measure(method, base, adapter, folder / "out"))
        found.append(
            {"layers": model.layers, "bytes": size_of(base), "shards": len(list(base.glob(WEIGHTS))), **summary(runs)}
        )
    disk = {
        "filesystem": filesystem,
        "page cache": "warm: the files were read just before each measurement",
        "free memory": "as much as the model takes was touched just before each measurement",
    }
    return {"machine": machine(), "disk": disk, "settings": settings, "models": found}


# Models


@dataclass(frozen=True)
class Model:
    """A Llama to be made, and an adapter of it.

    Args:
        layers: the number of its layers.
        dtype: that of its weights.
        hidden: its width, a multiple of 64, by which the other sizes go.
        shard: the most bytes of tensors in a file.
    """

    layers: int
    dtype: torch.dtype
    hidden: int
    shard: int = SHARD

    @classmethod
    def of_size(cls, gigabytes: float, dtype: torch.dtype, hidden: int, shard: int = SHARD) -> Model:
        """The model with a number of layers, one at least, that comes nearest to a size."""
        none, one = (sum(e.nbytes for e in cls(n, dtype, hidden).entries()) for n in (0, 1))
        return cls(max(round((1e9 * gigabytes - none) / (one - none)), 1), dtype, hidden, shard)

    def made(self, folder: Path) -> tuple[Path, Path]:
        """The folders of the model and of its adapter, made unless they are there."""
        name = f"llama-{self.layers}x{self.hidden}-{str(self.dtype).removeprefix('torch.')}"
        base, adapter = folder / name, folder / f"{name}-adapter"
        for path, write in ((base, self.write), (adapter, self.write_adapter)):
            if not path.exists():
                partial = path.with_suffix(".partial")
                remove(partial)
                partial.mkdir()
                write(partial)
                partial.rename(path)
        for path, expected in ((base, self.entries()), (adapter, self.adapter_entries())):
            found = {
                e.name: (e.code, e.shape) for file in path.glob(WEIGHTS) for e in read_header(file).entries.values()
            }
            if found != {entry.name: (entry.code, entry.shape) for entry in expected}:
                raise SystemExit(f"{path} is not what this script makes; remove it")
        return base, adapter

    @property
    def config(self) -> LlamaConfig:
        return LlamaConfig(
            architectures=["LlamaForCausalLM"],
            dtype=self.dtype,
            hidden_size=self.hidden,
            intermediate_size=self.hidden * 11 // 4,
            num_attention_heads=32,
            num_hidden_layers=self.layers,
            num_key_value_heads=8,
            vocab_size=16 * self.hidden,
        )

    def linear_layers(self) -> Iterator[tuple[str, int, int]]:
        """The name, inputs and outputs of each that the adapter adapts."""
        config = self.config
        keys = config.num_key_value_heads * config.head_dim
        outputs = {"k_proj": keys, "v_proj": keys} | dict.fromkeys(("gate_proj", "up_proj"), config.intermediate_size)
        inputs = {"down_proj": config.intermediate_size}
        for layer in range(self.layers):
            for block, names in TARGETS.items():
                for name in names:
                    yield (
                        f"model.layers.{layer}.{block}.{name}",
                        inputs.get(name, self.hidden),
                        outputs.get(name, self.hidden),
                    )

    def entries(self) -> list[TensorEntry]:
        """The model's tensors, in the order of its modules."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (16 * self.hidden, self.hidden)}
        shapes |= {name: (outputs, inputs) for name, inputs, outputs in self.linear_layers()}
        for layer in range(self.layers):
            for name in ("input_layernorm", "post_attention_layernorm"):
                shapes[f"model.layers.{layer}.{name}"] = (self.hidden,)
        shapes |= {"model.norm": (self.hidden,), "lm_head": (16 * self.hidden, self.hidden)}
        return [entry_of(f"{name}.weight", self.dtype, shape) for name, shape in shapes.items()]

    def adapter_entries(self) -> list[TensorEntry]:
        return [
            entry_of(f"base_model.model.{name}.hira_{factor}", torch.float32, shape)
            for name, inputs, outputs in self.linear_layers()
            for factor, shape in (("A", (RANK, inputs)), ("B", (outputs, RANK)))
        ]

    def write(self, folder: Path) -> None:
        """Write the model as `save_pretrained` would, with one tensor at a time in memory."""
        self.config.save_pretrained(folder)
        GenerationConfig(bos_token_id=1, eos_token_id=2).save_pretrained(folder)
        vocabulary = {f"token{index}": index for index in range(16 * self.hidden)}
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary))).save_pretrained(folder)
        shards: list[list[TensorEntry]] = [[]]
        for entry in self.entries():
            if shards[-1] and sum(e.nbytes for e in shards[-1]) + entry.nbytes > self.shard:
                shards.append([])
            shards[-1].append(entry)
        places = {}
        for number, shard in enumerate(shards, 1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            write_tensors(folder / file, shard, {"format": "pt"}, W0_DEVIATION)
            places.update({entry.name: file for entry in shard})
        size = sum(entry.nbytes for entry in self.entries())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def write_adapter(self, folder: Path) -> None:
        """Write an adapter as PEFT would, whose BA has entries of a known deviation."""
        targets = [name for names in TARGETS.values() for name in names]
        hira.HiraConfig(r=RANK, target_modules=targets, task_type="CAUSAL_LM", inference_mode=True).save_pretrained(
            folder
        )
        deviation = math.sqrt(BA_DEVIATION / math.sqrt(RANK))
        write_tensors(folder / ADAPTER_WEIGHTS, self.adapter_entries(), {"format": "pt"}, deviation)


def write_tensors(path: Path, entries: Iterable[TensorEntry], metadata: Mapping[str, str], deviation: float) -> None:
    """Write normal random numbers that depend on the names of the tensors and nothing else; around 1 for norms."""
    entries = sorted(entries, key=safetensors_order)
    with path.open("wb") as file:
        file.write(header_bytes(entries, metadata))
        for entry in entries:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{SEED} {entry.name}".encode()))
            tensor = torch.empty(entry.shape, dtype=entry.dtype)
            file.write(tensor_bytes(tensor.normal_(float(tensor.ndim == 1), deviation, generator=generator)))


# Checks and measurements


def check(dtype: torch.dtype, folder: Path) -> None:
    """Refuse to go on unless `hira merge` of a small model gives the bits of `merge_and_unload`."""
    with TemporaryDirectory(prefix="check-", dir=folder) as name:
        base, adapter = Model.of_size(CHECKED_GIGABYTES, dtype, CHECKED_HIDDEN, CHECKED_SHARD).made(Path(name))
        out = Path(name, "out")
        done = subprocess.run(command(HIRA, base, adapter, out), capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{HIRA} fails with a small model; nothing is timed\n{done.stderr}{done.stdout}")
        hira.register()
        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        expected = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().state_dict()
        merged = AutoModelForCausalLM.from_pretrained(out, dtype="auto").state_dict()
        unlike = sorted(merged.keys() ^ expected.keys())
        unlike += [key for key in merged.keys() & expected.keys() if not same_bits(merged[key], expected[key])]
        if unlike:
            raise SystemExit(f"{HIRA} differs from merge_and_unload in {', '.join(unlike)}; nothing is timed")
        changed = sum(not same_bits(before[key], expected[key]) for key in before)
        if changed != 7 * len(model.model.layers):
            raise SystemExit(f"merging changed {changed} tensors, so it was not checked; nothing is timed")


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and tensor_bytes(one) == tensor_bytes(other)


def command(method: str, base: Path, adapter: Path, out: Path) -> list[str]:
    if method == CP:
        return ["cp", "-r", str(base), str(out)]
    if method == HIRA:
        return [str(COMMAND), "merge", str(base), str(adapter), "-o", str(out)]
    return [sys.executable, "-c", MERGE_WITH_PEFT, str(base), str(adapter), str(out), str(SHARD)]


def measure(method: str, base: Path, adapter: Path, out: Path) -> dict[str, Any]:
    """Seconds of a method with the `sync` after it, from warm files to a disk at rest, and the peak of its memory."""
    remove(out)
    for folder in (base, adapter):
        read(folder)
    os.sync()
    # A virtual machine may have given free memory back, and is slow where it has to get it anew.
    subprocess.run([sys.executable, "-I", "-S", "-c", TOUCH, str(size_of(base) + size_of(adapter))], check=True)
    with TemporaryDirectory(prefix="measured-") as name:
        result = Path(name, "result.json")
        line = [sys.executable, "-I", "-S", "-c", STARTER, str(result), *command(method, base, adapter, out)]
        done = subprocess.run(line, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{method} cannot be started:\n{done.stderr}")
        found: dict[str, Any] = json.loads(result.read_text())
    if found.pop("exit"):
        raise SystemExit(f"{method} failed:\n{done.stderr}{done.stdout}")
    written, expected = (sum(entry.nbytes for entry in tensors(folder)) for folder in (out, base))
    if written != expected:
        raise SystemExit(f"{method} wrote {written} bytes of tensors, not {expected}")
    remove(out)
    os.sync()
    return found


def read(folder: Path) -> None:
    buffer = bytearray(16 << 20)
    for path in folder.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def tensors(folder: Path) -> Iterator[TensorEntry]:
    for path in folder.glob(WEIGHTS):
        yield from read_header(path).entries.values()


def remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


# What was found


def summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The runs, their median seconds and highest peaks, and how many times as long as copying each takes."""
    medians = {method: statistics.median(run["seconds"] for run in of) for method, of in runs.items()}
    return {
        "runs": runs,
        "median_seconds": medians,
        "times_cp": {method: seconds / medians[CP] for method, seconds in medians.items()},
        "peak_bytes": {method: max(run["peak_bytes"] for run in of) for method, of in runs.items()},
    }


def table(record: dict[str, Any]) -> Table:
    settings, disk = record["settings"], record["disk"]
    title = f"{settings['dtype']}, {record['machine']['hardware']}, {disk['filesystem']}"
    result = Table(title=title, title_justify="left")
    result.add_column("model")
    result.add_column("")
    for column in ("s, with sync", "each round", "of cp -r", "GB/s", "peak MB"):
        result.add_column(column, justify="right")
    for model in record["models"]:
        name = f"{model['bytes'] / 1e9:.3g} GB, {model['layers']} layers"
        for method, runs in model["runs"].items():
            seconds = model["median_seconds"][method]
            result.add_row(
                name,
                method,
                f"{seconds:.2f}",
                " ".join(f"{run['seconds']:.2f}" for run in runs),
                f"{model['times_cp'][method]:.2f}",
                f"{model['bytes'] / 1e9 / seconds:.2f}",
                f"{model['peak_bytes'][method] / 1e6:,.0f}",
            )
            name = ""
    return result


if __name__ == "__main__":
    main()
