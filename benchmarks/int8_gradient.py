"""Does `weight_gradient="int8"` train as well as the exact gradient? Curves, errors by layer, times and memory.

    python -m benchmarks.int8_gradient --task docstrings|tiny_lm|errors|step [--seed N] [--arms ARM ...]

One task and seed at a time, added to the JSON file; without a task, what is there is shown and drawn again. The arms of
a seed start from the same model and see the same batches. "nudged" is exact as well, from an A larger by 1e-6: what
two runs differ by where nothing but the rounding of the numbers differs.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from benchmarks import tiny_lm
from benchmarks.comparison.report import machine
from benchmarks.int8_report import EXACT, INT8, LORA, NUDGED, draw, show
from peft import get_peft_model
from torch import Tensor, nn

import hira

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "docstrings"))
from transformers import DataCollatorWithPadding

import training
from data import load_docstrings
from model import load_tokenizer
from training import BATCH, RATES_FILE, STEPS, Rates, arrange, build, build_optimizer, tokenize

NUDGE = 1 + 1e-6
TINY_STEPS, TINY_RATE, TINY_RANK, TINY_EVERY = 200, 3e-2, 8, 20
RESULTS = Path(__file__).parent / "results" / "int8_gradient.json"

ERROR_BATCHES = 16
ERROR_STATES = (0, STEPS // 10, STEPS)  # steps trained before the errors are measured
# Of a gradient in 8 bits against the same in float64: float32's sums, and codes that it rounds the other way at ties.
TOLERANCE = 1e-3
ROUNDS = 48
MEMORY_PROCESSES = 3

Batch = dict[str, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("docstrings", "tiny_lm", "errors", "step"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arms", nargs="+", choices=(EXACT, INT8, NUDGED), default=[EXACT, INT8], help="of training")
    parser.add_argument("--weights", type=Path, default=Path("demo-output"), help="where tiny_lm.py keeps its model")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file to add to; the picture lies beside it")
    options = parser.parse_args()
    records = json.loads(options.out.read_text()) if options.out.exists() else []
    if options.task:
        tasks: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
            "docstrings": docstrings,
            "tiny_lm": language_model,
            "errors": errors,
            "step": step,
        }
        result = tasks[options.task](options)
        records = add(records, {"task": options.task, "seed": options.seed, "machine": machine(), **result})
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(records, indent=1) + "\n")
    show(records)
    draw(records, options.out.with_suffix(".png"))


def add(records: list[dict[str, Any]], record: dict[str, Any]) -> list[dict[str, Any]]:
    """The records with one more, in the place of an older one of its task and seed; arms that it lacks are kept."""
    others = []
    for old in records:
        if (old["task"], old["seed"]) != (record["task"], record["seed"]):
            others.append(old)
        elif "arms" in record and old["settings"] == record["settings"]:
            record = {**record, "arms": {**old["arms"], **record["arms"]}}
    return sorted([*others, record], key=lambda r: (r["task"], r["seed"]))


# Training


def docstrings(options: argparse.Namespace) -> dict[str, Any]:
    """The demo's own training run, once for each arm."""
    data, rates = tokenize(load_docstrings()), hira_rates()
    arms = {}
    for arm in options.arms:
        run = train_demo(arm, data, options.seed, STEPS)
        curves = {name: run.curve(name) for name in ("loss", "eval_loss", "eval_accuracy")}
        test = run.trainer.evaluate(data["test"], metric_key_prefix="test")
        final = {
            "training loss": curves["loss"][1][-1],
            "validation loss": curves["eval_loss"][1][-1],
            "validation accuracy": curves["eval_accuracy"][1][-1],
            "test loss": test["test_loss"],
            "test accuracy": test["test_accuracy"],
        }
        arms[arm] = {"curves": curves, "final": final, "seconds": run.seconds}
    settings = {"steps": STEPS, "batch": BATCH, "rank": training.RANK, "rates": vars(rates)}
    return {"settings": settings, "arms": arms}


def hira_rates() -> Rates:
    return Rates(**json.loads(RATES_FILE.read_text())["methods"]["HiRA"]["rates"])


def train_demo(arm: str, data: Any, seed: int, steps: int) -> training.Run:
    """The demo's `train`, with the arm's configuration in the place of its own."""
    with patch.object(training, "build", partial(build_arm, arm)), TemporaryDirectory() as folder:
        return training.train("HiRA", hira_rates(), data, seed, steps, Path(folder))


def build_arm(arm: str, method: training.Method, classes: int) -> Any:
    weight_gradient = INT8 if arm == INT8 else EXACT
    with patch.object(training, "HiraConfig", partial(hira.HiraConfig, weight_gradient=weight_gradient)):
        model = build(method, classes)
    if arm == NUDGED:
        nudge(model)
    return model


@torch.no_grad()
def nudge(model: nn.Module) -> None:
    """Change the start by about as much as float32 rounds."""
    for name, parameter in model.named_parameters():
        if "hira_A" in name:
            parameter.mul_(NUDGE)


def language_model(options: argparse.Namespace) -> dict[str, Any]:
    """The language model of tiny_lm.py, adapted to the language reference."""
    base = tiny_lm.pretrained(options.weights)
    text, validation = tiny_lm.reference_text()
    arms = {}
    for arm in options.arms:
        bare = tiny_lm.bare()
        bare.load_state_dict(base.state_dict())
        torch.manual_seed(options.seed)
        weight_gradient = INT8 if arm == INT8 else EXACT
        config = hira.HiraConfig(r=TINY_RANK, target_modules=tiny_lm.TARGETS, weight_gradient=weight_gradient)
        arms[arm] = train_tiny(get_peft_model(bare, config), arm, options.seed, text, validation)
    settings = {"steps": TINY_STEPS, "batch": tiny_lm.BATCH, "rank": TINY_RANK, "rate": TINY_RATE}
    return {"settings": settings, "arms": arms}


def train_tiny(model: nn.Module, arm: str, seed: int, text: Tensor, validation: Tensor) -> dict[str, Any]:
    """Curves and final losses; a training loss is the mean over the steps since the last one."""
    if arm == NUDGED:
        nudge(model)
    watched: list[float] = []

    def watch(step: int) -> None:
        if (step + 1) % TINY_EVERY == 0:
            watched.append(tiny_lm.loss_on(model, validation))
            model.train()

    start = time.perf_counter()
    losses = tiny_lm.train(model, tiny_lm.batches(text, TINY_STEPS, seed), TINY_STEPS, TINY_RATE, watch)
    seconds = time.perf_counter() - start
    steps = list(range(TINY_EVERY, TINY_STEPS + 1, TINY_EVERY))
    means = [statistics.mean(losses[step - TINY_EVERY : step]) for step in steps]
    curves = {"loss": (steps, means), "eval_loss": (steps, watched)}
    return {"curves": curves, "final": {"training loss": means[-1], "validation loss": watched[-1]}, "seconds": seconds}


# Errors by layer


def errors(options: argparse.Namespace) -> dict[str, Any]:
    """How far dA and dB in 8 bits are from the exact ones, and one batch's from the mean, at three points of a run."""
    data = tokenize(load_docstrings())
    batches = demo_batches(data, options.seed, ERROR_BATCHES)
    states = {}
    for steps in ERROR_STATES:
        if steps:
            model = train_demo(EXACT, data, options.seed, steps).trainer.model
        else:
            training.set_seed(options.seed)
            model = build_arm(EXACT, "HiRA", classes_of(data))
        states[str(steps)] = layer_errors(model, batches)
    return {"settings": {"batches": ERROR_BATCHES, "batch": BATCH, "states": ERROR_STATES}, "states": states}


def classes_of(data: Any) -> int:
    return 1 + max(data["train"]["label"])


def demo_batches(data: Any, seed: int, count: int) -> list[Batch]:
    """The first batches that the demo trains on with this seed."""
    rows = arrange(data["train"], seed, count)
    collate = DataCollatorWithPadding(load_tokenizer())
    return [dict(collate([rows[i] for i in range(k * BATCH, (k + 1) * BATCH)])) for k in range(count)]


def layer_errors(model: nn.Module, batches: list[Batch]) -> dict[str, dict[str, dict[str, float]]]:
    """By factor, measure and layer: root mean squares over the batches, relative to that of the batches' gradients.

    "int8": the error of one batch's gradient in 8 bits. "batch": its distance from the mean over all batches. "mean":
    the error of the mean of those in 8 bits, relative to the exact mean.
    """
    exact = [factor_gradients(model, batch, EXACT, seed) for seed, batch in enumerate(batches)]
    rounded = [factor_gradients(model, batch, INT8, seed) for seed, batch in enumerate(batches)]
    measures: dict[str, dict[str, dict[str, float]]] = {"dA": {}, "dB": {}}
    for name in exact[0]:
        G, G8 = (torch.stack([gradients[name] for gradients in of]) for of in (exact, rounded))
        if not G.any():  # dA where B is zero
            if G8.any():
                raise SystemExit(f"{name}: zero, but not in 8 bits")
            continue
        if torch.equal(G, G8):
            raise SystemExit(f"{name}: no difference, so it was not computed in 8 bits")
        mean, mean8 = G.mean(0), G8.mean(0)
        layer, factor = name.rsplit(".hira_", 1)
        found = measures["d" + factor[0]]
        found.setdefault("int8", {})[layer] = float((G8 - G).norm() / G.norm())
        found.setdefault("batch", {})[layer] = float((G - mean).norm() / G.norm())
        found.setdefault("mean", {})[layer] = float((mean8 - mean).norm() / mean.norm())
    return measures


def factor_gradients(model: nn.Module, batch: Batch, weight_gradient: str, seed: int) -> dict[str, Tensor]:
    """dA and dB of every layer in training, with the dropout that belongs to the seed."""
    for layer in model.modules():
        if isinstance(layer, hira.HiraLayer):
            layer.weight_gradient = dict.fromkeys(layer.weight_gradient, weight_gradient)
    model.train().zero_grad()
    torch.manual_seed(seed)
    model(**batch).loss.backward()
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): parameter.grad.double()
        for name, parameter in model.named_parameters()
        if "hira_" in name and parameter.grad is not None
    }


# Times and memory


def step(options: argparse.Namespace) -> dict[str, Any]:
    """The demo's training step: times interleaved, on the same batch in turn; memory on its longest batch."""
    data = tokenize(load_docstrings())
    batches = demo_batches(data, options.seed, ROUNDS)
    check_gradients(data, batches[0])
    steps = {arm: Step(arm, classes_of(data)) for arm in (LORA, EXACT, INT8)}
    times: dict[str, list[float]] = {arm: [] for arm in steps}
    for batch in batches[:2] + batches:
        for arm, run in steps.items():
            start = time.perf_counter()
            run(batch)
            times[arm].append(1e3 * (time.perf_counter() - start))
    times = {arm: values[2:] for arm, values in times.items()}  # the first two warm up
    longest = max(batches, key=lambda batch: batch["input_ids"].numel())
    kept = {arm: kept_bytes(run.model, longest) for arm, run in steps.items()}
    peaks = {arm: [peak_apart(arm, longest, classes_of(data)) for _ in range(MEMORY_PROCESSES)] for arm in steps}
    tokens = [batch["input_ids"].numel() for batch in batches]
    settings = {"rounds": ROUNDS, "batch": BATCH, "tokens": tokens, "threads": torch.get_num_threads()}
    return {"settings": settings, "times_ms": times, "peak_bytes": peaks, "kept_bytes": kept}


class Step:
    """The model of an arm and its optimizer; a call is one training step."""

    def __init__(self, arm: str, classes: int) -> None:
        training.set_seed(0)
        self.model = (build("LoRA", classes) if arm == LORA else build_arm(arm, "HiRA", classes)).train()
        self.optimizer = build_optimizer(self.model, Rates(1e-3, 1e-3))  # no rate changes what a step costs

    def __call__(self, batch: Batch) -> None:
        self.optimizer.zero_grad()
        self.model(**batch).loss.backward()
        self.optimizer.step()


def check_gradients(data: Any, batch: Batch) -> None:
    """Stop before a time is taken for a gradient that is wrong: compare with codes and products made in float64."""
    run = Step(INT8, classes_of(data))
    run(batch)  # B is no longer zero
    seen: dict[str, list[Tensor]] = {}
    layers = {name: layer for name, layer in run.model.named_modules() if isinstance(layer, hira.Linear)}
    for name, layer in layers.items():
        layer.register_forward_hook(partial(watch_layer, seen, name))
    run.model.zero_grad()
    run.model(**batch).loss.backward()
    for name, layer in layers.items():
        x, dy = (rounded_to_8_bits(tensor.double().flatten(0, -2)) for tensor in seen[name])
        A, B = layer.hira_A["default"], layer.hira_B["default"]
        H = (dy.T @ x) * layer.base_layer.weight.double()
        for factor, expected in ((A, B.double().T @ H), (B, H @ A.double().T)):
            error = float((factor.grad - expected).detach().norm() / expected.detach().norm())
            if not error < TOLERANCE:
                raise SystemExit(f"{name}: off by {error:.1e} from the gradient in 8 bits; no times for it")


def watch_layer(seen: dict[str, list[Tensor]], name: str, layer: nn.Module, args: Any, y: Tensor) -> None:
    seen[name] = [args[0].detach()]
    y.register_hook(seen[name].append)


def rounded_to_8_bits(x: Tensor) -> Tensor:
    scale = x.abs().amax(0) / 127
    return (x / scale.clamp_min(1e-30)).round() * scale


def kept_bytes(model: nn.Module, batch: Batch) -> int:
    """What autograd keeps between forward and backward, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    del loss
    return sum(kept.values())


def peak_apart(arm: str, batch: Batch, classes: int) -> int:
    """`peak` in a process of its own."""
    arrays = {name: tensor.tolist() for name, tensor in batch.items()}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(peak, arm, arrays, classes).result()


def peak(arm: str, arrays: dict[str, Any], classes: int) -> int:
    """Bytes resident at a step's height, above what was before; a step on little data has made what stays."""
    batch = {name: torch.tensor(values) for name, values in arrays.items()}
    run = Step(arm, classes)
    run({name: tensor[:2, :8] if tensor.ndim == 2 else tensor[:2] for name, tensor in batch.items()})
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident now
    run(batch)
    return resident("VmHWM") - before


def resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


if __name__ == "__main__":
    main()
