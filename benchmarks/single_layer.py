"""One layer's training step: hira against PEFT's own HiRA and LoRA, interleaved in one process.

    python benchmarks/single_layer.py [--out FILE.json]

Every variant's outputs and gradients are checked against the float64 reference first; a wrong one stops the run.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import hira
from hira.ops import reference

LORA, OURS, STOCK = "LoRA", "hira", "PEFT's HiRA"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=2048, help="the layer's inputs and outputs")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", type=Path, help="write the raw times to this JSON file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    models = {LORA: lora(options), OURS: adapted(options)}
    hira.unregister()
    models[STOCK] = adapted(options)
    hira.register()
    x = torch.randn(options.tokens, options.size)
    dy = torch.randn(options.tokens, options.size)
    for name in (OURS, STOCK):
        check(name, models[name], x, dy)

    times: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(options.repeats + 2):
        for name, model in models.items():
            start = time.perf_counter()
            step(model, x, dy)
            if repeat >= 2:  # the first two warm up
                times[name].append(1e3 * (time.perf_counter() - start))
    report(times, options)


def adapted(options: argparse.Namespace) -> nn.Module:
    """A linear layer with HiRA, of whichever implementation is registered."""
    from peft import HiraConfig

    model = get_peft_model(bare(options), HiraConfig(r=options.rank, target_modules=["0"]))
    with torch.no_grad():
        model.base_model.model[0].hira_B["default"].normal_(std=0.01)
    return model


def lora(options: argparse.Namespace) -> nn.Module:
    return get_peft_model(bare(options), LoraConfig(r=options.rank, target_modules=["0"]))


def bare(options: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(options.size, options.size, bias=False))


def step(model: Any, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward, with the gradient of the input as inside a network."""
    x = x.detach().requires_grad_()
    y = model(x)
    model.zero_grad()
    y.backward(dy)
    return y, x.grad


def check(name: str, model: Any, x: Tensor, dy: Tensor) -> None:
    """Compare outputs and gradients with the reference in float64."""
    y, dx = step(model, x, dy)
    layer = model.base_model.model[0]
    A, B = layer.hira_A["default"], layer.hira_B["default"]
    leaves = [t.detach().double().requires_grad_() for t in (x, A, B)]
    expected = reference.linear(leaves[0], layer.base_layer.weight.double(), leaves[1], leaves[2])
    gradients = torch.autograd.grad(expected, leaves, dy.double())
    for what, found, right in zip(
        ("y", "dx", "dA", "dB"), (y, dx, A.grad, B.grad), (expected, *gradients), strict=True
    ):
        error = float((found.detach() - right.detach()).norm() / right.detach().norm())
        if not error < 1e-5:
            raise SystemExit(f"{name}: {what} is wrong, relative error {error:.1e}; no times for it")


def report(times: dict[str, list[float]], options: argparse.Namespace) -> None:
    medians = {name: statistics.median(values) for name, values in times.items()}
    table = Table(title=f"{options.size} x {options.size}, {options.tokens} tokens, r = {options.rank}, float32")
    for column in ("", "median ms", "of LoRA's", "faster than PEFT's HiRA"):
        table.add_column(column, justify="right")
    for name, median in medians.items():
        to_lora, to_stock = median / medians[LORA], medians[STOCK] / median
        table.add_row(name, f"{median:.1f}", f"{to_lora:.2f}", f"{to_stock:.2f}")
    Console().print(table)
    if options.out:
        settings = {k: v for k, v in vars(options).items() if k != "out"}
        record = {"machine": machine(), "settings": settings, "median_ms": medians, "times_ms": times}
        options.out.write_text(json.dumps(record, indent=1) + "\n")


def machine() -> dict[str, str]:
    """What a reader needs to judge the times by."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {"cpu": cpu, "python": platform.python_version(), "commit": commit} | {
        package: version(package) for package in ("torch", "peft", "hira")
    }


if __name__ == "__main__":
    main()
