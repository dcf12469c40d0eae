"""How long does vLLM take to load a base model with a HiRA adapter, beside the merged folder, and how much memory?

    make .venv-vllm/.done
    .venv-vllm/bin/python -m benchmarks.serving [--rounds 5] [--gigabytes 1.2] [--folder FOLDER]
    python -m benchmarks.serving --table    # writes the table of docs/serving.md

A Llama with random weights, in shards, and an adapter of all its linear layers are made on the disk, and merged there
by `hira merge`. Each measurement is a process of its own, in turns, on a CPU: vLLM loads files that were just read.
The process ends as soon as it has the model, so bfloat16 is loaded where the processor could not compute with it. Times
are of the whole of vLLM's loading. Memory is what the process gets meanwhile, without the pages of files. Nothing is
written unless all processes have the same numbers in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.comparison.report import machine
from benchmarks.readme_table import with_lines

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "benchmarks/results/serving.json", ROOT / "docs/serving.md"
BEGIN = "<!-- benchmarks/serving.py writes from here -->\n"
MERGED, HIRA = "the merged folder", "the base model and the adapter"
DTYPES = ("float32", "bfloat16")
GOAL = 1.5  # times the merged folder's seconds

LOAD = """
import hashlib, json, os, sys, threading, time
import torch
from vllm import LLM
from vllm.v1.worker import cpu_model_runner

def anonymous():
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("RssAnon"))

def measured(*args, **kwargs):
    before, done = anonymous(), threading.Event()
    peak = before
    def watch():
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous())
    watcher = threading.Thread(target=watch)
    watcher.start()
    cpu, start = time.process_time(), time.perf_counter()
    model = get_model(*args, **kwargs)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    done.set()
    watcher.join()
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().contiguous().view(torch.uint8).numpy().data)
    found = {"seconds": seconds, "CPU seconds": cpu, "peak_bytes": peak - before, "kept_bytes": anonymous() - before}
    print("FOUND", json.dumps({**found, "sha256": digest.hexdigest()}), flush=True)
    os._exit(0)

get_model, cpu_model_runner.get_model = cpu_model_runner.get_model, measured
LLM(**json.loads(sys.argv[1]), enforce_eager=True, max_model_len=128, distributed_executor_backend="uni")
"""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",  # two that wait for each other, and for other work, say little of either
    "LD_PRELOAD": str(Path(sys.prefix, "lib", "libiomp5.so")),
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.2, help="the model's size, in 10^9 bytes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where models are kept, and found again")
    parser.add_argument(
        "--table", action="store_true", help="measure nothing, and write the table of committed results"
    )
    options = parser.parse_args()
    if not options.table:
        with TemporaryDirectory(prefix="serving-", dir=".") as folder:
            records = [measured(options, dtype, (options.folder or Path(folder)).resolve()) for dtype in DTYPES]
        RESULTS.write_text(json.dumps({"machine": machine(), "records": records}, indent=1) + "\n")
    PAGE.write_text(with_table(PAGE.read_text()))


def measured(options: argparse.Namespace, dtype: str, folder: Path) -> dict[str, Any]:
    """The record of a dtype: each run's numbers, the medians, and their ratio."""
    import torch
    from benchmarks.merge import RANK, Model, read, size_of

    from hira import merge_checkpoint

    folder.mkdir(parents=True, exist_ok=True)
    model = Model.of_size(options.gigabytes, getattr(torch, dtype), 2048)
    base, adapter = model.made(folder)
    out = folder / f"{base.name}-merged"
    if not out.exists():
        merge_checkpoint(base, adapter, out)
    extra = {"load_format": "hira", "model_loader_extra_config": {"adapters": [str(adapter)]}}
    arguments = {MERGED: {"model": str(out)}, HIRA: {"model": str(base), **extra}}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments}
    load = []
    for _ in range(options.rounds):
        for name, given in arguments.items():
            for each in (out, base, adapter):
                read(each)
            load.append(os.getloadavg()[0])
            runs[name].append(loaded({**given, "dtype": dtype}))
            print(dtype, name, runs[name][-1], flush=True)
    if len({run["sha256"] for of in runs.values() for run in of}) != 1:
        raise SystemExit("the two load different numbers; nothing is written")
    medians = {name: statistics.median(run["seconds"] for run in of) for name, of in runs.items()}
    return {
        "dtype": dtype,
        "bytes": size_of(base),
        "layers": model.layers,
        "rank": RANK,
        "load_average": load,
        "runs": runs,
        "median_seconds": medians,
        "times_merged": medians[HIRA] / medians[MERGED],
        "peak_bytes": {name: max(run["peak_bytes"] for run in of) for name, of in runs.items()},
    }


def loaded(arguments: dict[str, Any]) -> dict[str, Any]:
    """What a process measures that loads a model."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD, json.dumps(arguments)],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    if "FOUND " not in done.stdout:
        raise SystemExit(f"vLLM failed:\n{done.stdout}{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.rpartition("FOUND ")[2])
    return found


def rows() -> list[str]:
    """The table of the committed results, in Markdown."""
    content = json.loads(RESULTS.read_text())
    lines = [f"| | {MERGED} | {HIRA} | times the merged folder |", "|---|---|---|---|"]
    for record in content["records"]:
        name = f"{record['bytes'] / 1e9:.2f} GB of {record['dtype']}, r = {record['rank']}"
        cells = []
        for kind in (MERGED, HIRA):
            runs = record["runs"][kind]
            times = [run["seconds"] for run in runs]
            cpu = statistics.median(run["CPU seconds"] for run in runs)
            cells.append(
                f"{record['median_seconds'][kind]:.1f} s ({min(times):.1f} to {max(times):.1f}), {cpu:.1f} s of CPU, "
                f"peak {record['peak_bytes'][kind] / 1e9:.2f} GB"
            )
        missed = "" if record["times_merged"] <= GOAL else f", above {GOAL}"
        lines.append(f"| {name} | {' | '.join(cells)} | {record['times_merged']:.2f}{missed} |")
    loads = [load for record in content["records"] for load in record["load_average"]]
    rounds = {len(of) for record in content["records"] for of in record["runs"].values()}
    lines += [
        "",
        f"{content['machine']['hardware']}; PyTorch with one; medians of {max(rounds)} runs each, in turns, the range "
        f"in brackets; other work on the machine had it at a load of {min(loads):.0f} to {max(loads):.0f}.",
    ]
    return lines


def with_table(page: str) -> str:
    """The page with the table between its two marks."""
    return with_lines(page, BEGIN, rows())


if __name__ == "__main__":
    main()
