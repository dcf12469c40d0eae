"""Which learning rate suits HiRA, plain and with hira_alpha, where LoRA's is known.

    python experiments/learning_rate/study.py run RESULTS.json --processes 2
    python experiments/learning_rate/study.py table RESULTS.json

Three models that this script trains itself, and MiniLM, are adapted to another task by four methods with equal numbers
of parameters, at the same rates: LoRA; HiRA; HiRA with `hira_alpha`; and HiRA with A's start times the same scale
instead. All use Adam without weight decay, a cosine schedule and alpha = 2 r. The adapters are on every linear layer
and convolution, in MiniLM on query, key and value; its new head trains too, at a rate of its own that is the same for
all. A run that is in RESULTS already is not repeated. `table` writes what docs/learning_rate.md shows.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, pstdev
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import hira
from hira import HiraConfig
from hira.layers.alpha_scale import scale_of_alpha

sys.path.append(str(Path(__file__).parents[2] / "examples" / "docstrings"))

METHODS = ("LoRA", "HiRA", "HiRA, hira_alpha", "HiRA, A's start")
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
RANKS = (4, 16)
SEEDS = (0, 1, 2)
PRETRAINING_STEPS, STEPS, BATCH, LENGTH = 1500, 120, 16, 64
# of MiniLM, which takes more time
MINILM_STEPS, TOKENS, HEAD, HEAD_RATE = 60, 16, "classifier", 0.1


class Run(NamedTuple):
    """One training run."""

    model: str
    r: int
    method: str
    rate: float
    seed: int

    @property
    def key(self) -> str:
        """Its name in the results."""
        return f"{self.model} | {self.r} | {self.method} | {self.rate:g} | {self.seed}"

    @property
    def accuracy_key(self) -> str:
        """The name of its accuracy in the results."""
        return f"{self.key} | accuracy"


class Task(NamedTuple):
    """Data of two tasks, the one that a model is trained on first, if it is not yet, and the one it is adapted to."""

    before: tuple[Tensor, Tensor] | None
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


# Data


def python_files() -> list[str]:
    """The source of the standard library's modules, in the order of their names."""
    folder = Path(sysconfig.get_path("stdlib"))
    return [path.read_text(encoding="utf-8", errors="ignore") for path in sorted(folder.glob("*.py"))]


def docstrings(source: str) -> Iterator[str]:
    """The docstrings of a module's classes and functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.Module) and (text := ast.get_docstring(node)):
            yield text


def windows(text: str) -> tuple[Tensor, Tensor]:
    """Bytes of a text, (n, LENGTH), and the bytes after each of them."""
    data = torch.tensor(list(text.encode()), dtype=torch.int64)
    rows = (len(data) - 1) // LENGTH
    return data[: rows * LENGTH].view(rows, LENGTH), data[1 : rows * LENGTH + 1].view(rows, LENGTH)


@cache
def language() -> Task:
    """From source code to the English of docstrings, of modules that come later in the alphabet for the test."""
    files = python_files()
    half = len(files) // 2
    texts = ["\n\n".join(text for file in part for text in docstrings(file)) for part in (files[:half], files[half:])]
    code = "\n".join(line for file in files for line in file.splitlines() if "#" not in line)
    inputs, targets = windows(texts[1])
    return Task(windows(code), windows(texts[0]), (inputs[:400], targets[:400]))


@cache
def digits() -> Task:
    """From images of digits to the same digits lying on their side; a third of them is the test."""
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(bunch.target)
    turned, last = images.rot90(1, (2, 3)), len(images) // 3
    return Task((images[last:], labels[last:]), (turned[last:], labels[last:]), (turned[:last], labels[:last]))


@cache
def packages() -> Task:
    """Which package is a docstring from? The task of examples/docstrings, on the first tokens of each text."""
    from data import load_docstrings
    from model import load_tokenizer

    data, tokenizer = load_docstrings(), load_tokenizer()

    def tensors(split: str, step: int) -> tuple[Tensor, Tensor]:
        texts, labels = data[split]["text"][::step], data[split]["label"][::step]
        options = {"truncation": True, "max_length": TOKENS, "padding": "max_length", "return_tensors": "pt"}
        return tokenizer(texts, **options)["input_ids"], torch.tensor(labels)

    return Task(None, tensors("train", 1), tensors("test", 2))


# Models


class ConvNet(nn.Module):
    """Two convolutions and two linear layers over an image of 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1)
        self.third, self.last = nn.Linear(64 * 4, 128), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, 1, 8, 8) -> logits (batch, 10)."""
        x = torch.max_pool2d(torch.relu(self.first(x)), 2)
        x = torch.max_pool2d(torch.relu(self.second(x)), 2)
        return self.last(torch.relu(self.third(x.flatten(1))))


class Decoder(nn.Module):
    """A Llama of two layers over bytes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.llama = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=256,
                hidden_size=width,
                intermediate_size=3 * width,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=4,
                max_position_embeddings=LENGTH,
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, LENGTH) -> logits (batch, LENGTH, 256)."""
        logits: Tensor = self.llama(x, use_cache=False).logits
        return logits


class Classifier(nn.Module):
    """MiniLM with a new head over the classes of `packages`."""

    def __init__(self) -> None:
        super().__init__()
        from model import load_base

        self.bert = load_base(int(packages().train[1].max()) + 1)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, TOKENS), padded with zeros -> logits (batch, classes)."""
        logits: Tensor = self.bert(input_ids=x, attention_mask=(x != 0).long()).logits
        return logits


MODELS = {
    "decoder of width 64": (lambda: Decoder(64), language, "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"),
    "decoder of width 128": (lambda: Decoder(128), language, "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"),
    "convolutional net": (ConvNet, digits, "first second third last"),
    "MiniLM": (Classifier, packages, "query key value"),
}


# Training


def fit(model: nn.Module, data: tuple[Tensor, Tensor], rate: float, steps: int, seed: int) -> None:
    """Train what has requires_grad."""
    inputs, targets = data
    generator = torch.Generator().manual_seed(seed)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    head = [p for name, p in trained if HEAD in name]
    rest = [p for name, p in trained if HEAD not in name]
    optimizer = torch.optim.Adam([{"params": rest}, {"params": head, "lr": HEAD_RATE}], lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps))
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(inputs), (BATCH,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[rows]).flatten(0, -2), targets[rows].flatten()).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def measured(model: nn.Module, data: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """The mean cross entropy, infinity where training has left no number, and the share of right answers."""
    model.eval()
    logits, targets = model(data[0]).flatten(0, -2), data[1].flatten()
    loss = float(nn.functional.cross_entropy(logits, targets))
    return loss if math.isfinite(loss) else math.inf, float((logits.argmax(-1) == targets).float().mean())


def pretrain(name: str, folder: Path) -> None:
    """Train a model on its first task and keep it in a folder; nothing where it is there already."""
    path = folder / f"{name}.pt"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(1)
        torch.manual_seed(0)
        make, task, _ = MODELS[name]
        model, before = make(), task().before
        if before is not None:
            fit(model, before, 2e-3, PRETRAINING_STEPS, seed=0)
        torch.save(model.state_dict(), path)


def adapt(run: Run, folder: Path) -> tuple[float, float]:
    """The loss and the accuracy on the test data after a run."""
    torch.set_num_threads(1)
    make, task, targets = MODELS[run.model]
    data = task()
    model = make()
    model.load_state_dict(torch.load(folder / f"{run.model}.pt", weights_only=True))
    torch.manual_seed(run.seed)
    options: dict[str, Any] = {"r": run.r, "target_modules": targets.split()}
    if run.method == "LoRA":
        adapted = get_peft_model(model, LoraConfig(lora_alpha=2 * run.r, **options))
    else:
        alpha = {"hira_alpha": 2 * run.r} if run.method == "HiRA, hira_alpha" else {}
        adapted = get_peft_model(model, HiraConfig(**alpha, **options))
    if run.method == "HiRA, A's start":
        for layer in adapted.modules():
            if isinstance(layer, hira.HiraLayer):
                layer.hira_A["default"].data *= scale_of_alpha(2 * run.r, run.r, layer.get_base_layer().weight)
    for name, parameter in adapted.named_parameters():
        if HEAD in name:
            parameter.requires_grad_(True)
    fit(adapted, data.train, run.rate, MINILM_STEPS if run.model == "MiniLM" else STEPS, run.seed)
    return measured(adapted, data.test)


def study(path: Path, folder: Path, processes: int) -> None:
    """Run what is not in a file of results yet, and write the file after each run."""
    results: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    runs = [Run(*each) for each in product(MODELS, RANKS, METHODS, RATES, SEEDS)]
    runs = [run for run in runs if run.key not in results]
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        for future in [pool.submit(pretrain, model, folder) for model in dict.fromkeys(run.model for run in runs)]:
            future.result()
        waiting = {pool.submit(adapt, run, folder): run for run in runs}
        for count, future in enumerate(as_completed(waiting), 1):
            run = waiting[future]
            results[run.key], accuracy = future.result()
            if run.model == "MiniLM":
                results[run.accuracy_key] = accuracy
            path.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
            print(f"\r{count} of {len(waiting)} runs", end="", flush=True)
    print()


def table(path: Path) -> Iterator[str]:
    """The lines of a table of what is complete: each method's best rate, its loss there, and at LoRA's best rate."""
    results = json.loads(path.read_text())
    complete = [
        (model, r)
        for model, r in product(MODELS, RANKS)
        if all(Run(model, r, *others).key in results for others in product(METHODS, RATES, SEEDS))
    ]

    def losses(model: str, r: int, method: str, rate: float) -> list[float]:
        return [results[Run(model, r, method, rate, seed).key] for seed in SEEDS]

    def shown(model: str, r: int, method: str, rate: float) -> str:
        values = losses(model, r, method, rate)
        keys = [Run(model, r, method, rate, seed).accuracy_key for seed in SEEDS]
        accuracy = f", {mean(results[key] for key in keys):.1%}".replace("%", " %") if keys[0] in results else ""
        return f"{mean(values):.3f} ± {pstdev(values):.3f}{accuracy}"

    yield "| model | r | method | best rate | loss there | loss at LoRA's best rate |"
    yield "|---|---|---|---|---|---|"
    for model, r in complete:
        best = {method: min(RATES, key=lambda rate: mean(losses(model, r, method, rate))) for method in METHODS}
        for method, rate in best.items():
            there, at_loras = (shown(model, r, method, each) for each in (rate, best["LoRA"]))
            yield f"| {model} | {r} | {method} | {rate:g} | {there} | {at_loras} |"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "table"))
    parser.add_argument("results", type=Path)
    parser.add_argument("--models", type=Path, default=Path("tmp"), help="the folder for the models that are adapted")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.action == "run":
        study(arguments.results, arguments.models, arguments.processes)
    else:
        print("\n".join(table(arguments.results)))


if __name__ == "__main__":
    main()
