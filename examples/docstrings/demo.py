"""Fine-tune MiniLM to tell which standard-library package a docstring is from: the head alone, LoRA, and HiRA.

    python demo.py [--quick] [--output FOLDER] [--seed N]

Each method trains at the learning rates that search.py found for it on the validation split.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import quiet  # noqa: F401

# isort: split
import matplotlib
from datasets import DatasetDict
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from data import load_docstrings
from model import compute_logits
from training import DESCRIPTIONS, METHODS, RATES_FILE, STEPS, Method, Rates, Run, tokenize, train

matplotlib.use("Agg")
import matplotlib.pyplot as plt

QUICK_STEPS = 2
QUICK_ROWS = 32  # of every split: one batch
COMPARED_TEXTS = 8
PURPOSES = {"train": "train", "validation": "choose the learning rates", "test": "test"}


def main() -> None:
    """Train, compare, save, and load again in a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that everything runs")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for adapter and curves")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    steps = QUICK_STEPS if options.quick else STEPS

    texts = load_docstrings()
    if options.quick:
        texts = DatasetDict({name: split.shuffle(seed=0).select(range(QUICK_ROWS)) for name, split in texts.items()})
        print("--quick: a few steps on a few texts show that everything runs; the numbers mean nothing.")
    data = tokenize(texts)
    counts = ", ".join(f"{len(data[name])} to {purpose}" for name, purpose in PURPOSES.items())
    print(f"Docstrings of {1 + max(data['train']['label'])} packages: {counts}")

    found = json.loads(RATES_FILE.read_text())["methods"]
    rates: dict[Method, Rates] = {method: Rates(**found[method]["rates"]) for method in METHODS}
    runs: dict[Method, Run] = {}
    for number, method in enumerate(METHODS, start=1):
        print(f"\nMethod {number} of {len(METHODS)}: {DESCRIPTIONS[method]}")
        runs[method] = train(method, rates[method], data, options.seed, steps, options.output / "trainer")

    save_and_reload(runs["HiRA"].trainer.model, texts["test"]["text"][:COMPARED_TEXTS], options.output)
    draw(runs, options.output / "curves.png")
    report(runs, rates, data, options.quick)


def save_and_reload(model: PeftModel, texts: list[str], output: Path) -> None:
    """Save the adapter and some logits; a fresh process loads, merges and compares them."""
    adapter = output / "adapter"
    model.save_pretrained(adapter)
    save_file({"logits": compute_logits(model, texts)}, output / "logits.safetensors")
    (output / "texts.json").write_text(json.dumps(texts))
    print(f"\nSaved the adapter to {adapter}; a fresh process loads it:")
    subprocess.run([sys.executable, Path(__file__).with_name("reload.py"), output], check=True)


def draw(runs: dict[Method, Run], path: Path) -> None:
    """Draw training loss and validation accuracy by step."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for method, run in runs.items():
        left.plot(*run.curve("loss"), label=method)
        right.plot(*run.curve("eval_accuracy"), marker="o", label=method)
    left.set(xlabel="step", ylabel="training loss")
    right.set(xlabel="step", ylabel="validation accuracy")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150)
    print(f"Drew {path}")


def report(runs: dict[Method, Run], rates: dict[Method, Rates], data: DatasetDict, quick: bool) -> None:
    """Print the table, with the accuracies on texts that neither training nor the search has seen."""
    table = Table(title=f"Which of {1 + max(data['test']['label'])} packages is a docstring from?")
    for column in ("", "trainable", "learning rates*", "seconds", "validation", "test"):
        table.add_column(column, justify="right")
    for method, run in runs.items():
        trainable = sum(p.numel() for p in run.trainer.model.parameters() if p.requires_grad)
        test = run.trainer.evaluate(data["test"], metric_key_prefix="test")["test_accuracy"]
        table.add_row(
            method,
            f"{trainable:,}",
            ", ".join(f"{rate:g}" for rate in (rates[method].head, rates[method].adapter) if rate is not None),
            f"{run.seconds:.0f}",
            f"{run.curve('eval_accuracy')[1][-1]:.3f}",
            f"{test:.3f}",
        )
    table.caption = "* of the head, of the adapter" + ("; --quick: the accuracies mean nothing" if quick else "")
    Console().print(table)


if __name__ == "__main__":
    main()
