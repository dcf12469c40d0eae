"""How W' should be rounded in bfloat16: which training curve is nearest to that in float32?

    python -m benchmarks.bfloat16_rounding --seed 0 [--seed 1 ...] [--out FILE.json]

A tiny language model (tiny_lm.py) whose weights are numbers of bfloat16 is adapted to other text: in float32, and in
bfloat16 with W' rounded to nearest, with W' rounded with a dither, and by PEFT's own HiRA, which has two products, with
W0 and with W0 * BA. Adapters and the optimiser are in float32 throughout; the arms of a seed have the same start and
batches. The results of a seed are added to the JSON file; without a seed, what is there is shown and drawn again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib
import torch
from benchmarks import tiny_lm
from benchmarks.comparison.report import machine
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import hira
from hira.ops import heuristics, modulated_weight

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FLOAT32, NEAREST, DITHER, PEFT = "float32", "to nearest", "dither", "PEFT's HiRA"
ARMS = (FLOAT32, NEAREST, DITHER, PEFT)
RATES = (3e-2, 3e-4)  # one that trains well, and that of PEFT's example: its updates are so small that rounding counts
STEPS, RANK = 100, 8
RESULTS = Path(__file__).parent / "results" / "bfloat16_rounding.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, action="append", default=[])
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file to add to; the picture lies beside it")
    parser.add_argument("--weights", type=Path, default=Path("demo-output"), help="where the pretrained model is kept")
    options = parser.parse_args()
    found = json.loads(options.out.read_text()) if options.out.exists() else {"seeds": {}}
    for seed in options.seed:
        base = tiny_lm.pretrained(options.weights).to(torch.bfloat16)
        train_text, validation_text = tiny_lm.reference_text()
        found["machine"] = machine()
        found["settings"] = {"steps": STEPS, "rank": RANK, "batch": tiny_lm.BATCH, "context": tiny_lm.CONTEXT}
        found["seeds"][str(seed)] = {
            str(rate): {arm: run(base, arm, rate, seed, train_text, validation_text) for arm in ARMS} for rate in RATES
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    show(found["seeds"])
    draw(found["seeds"], options.out.with_suffix(".png"))


def run(base: nn.Module, arm: str, rate: float, seed: int, text: Tensor, validation: Tensor) -> dict[str, Any]:
    """Adapt the model in one arm: the losses in training and on other text, and what rounding leaves of the update."""
    bare = tiny_lm.bare()
    bare.load_state_dict(base.state_dict())
    bare = bare.to(torch.float32 if arm == FLOAT32 else torch.bfloat16)
    heuristics.DITHER = arm == DITHER
    if arm == PEFT:
        hira.unregister()
    from peft import HiraConfig

    torch.manual_seed(seed)
    model = get_peft_model(bare, HiraConfig(r=RANK, target_modules=tiny_lm.TARGETS))
    hira.register()
    losses = tiny_lm.train(model, tiny_lm.batches(text, STEPS, seed), STEPS, rate)
    result = {"losses": losses, "validation": tiny_lm.loss_on(model, validation)}
    if arm == FLOAT32:
        result["share of the update kept"] = {how: kept(model, how == DITHER) for how in (NEAREST, DITHER)}
    return result


@torch.no_grad()
def kept(model: nn.Module, dither: bool) -> float:
    """The update that W' in bfloat16 has, projected on W0 * BA, over all layers: 1 if rounding loses nothing."""
    heuristics.DITHER = dither
    along = size = 0.0
    for layer in model.modules():
        if isinstance(layer, hira.Linear):
            W0, A, B = layer.base_layer.weight.bfloat16(), layer.hira_A["default"], layer.hira_B["default"]
            update = W0.double() * (B.double() @ A.double())
            along += float(((modulated_weight(W0, A, B).double() - W0.double()) * update).sum())
            size += float(update.square().sum())
    return along / size


def distances(seeds: dict[str, Any], rate: str, arm: str) -> tuple[list[float], list[float]]:
    """Over the seeds: the mean distance of the training curve to float32's, and the difference in validation loss."""
    curves, finals = [], []
    for arms in (seed[rate] for seed in seeds.values()):
        pairs = zip(arms[arm]["losses"], arms[FLOAT32]["losses"], strict=True)
        curves.append(statistics.mean(abs(a - b) for a, b in pairs))
        finals.append(arms[arm]["validation"] - arms[FLOAT32]["validation"])
    return curves, finals


def show(seeds: dict[str, Any]) -> None:
    for rate in map(str, RATES):
        runs = [seed[rate] for seed in seeds.values()]
        table = Table(title=f"{len(runs)} seeds, learning rate {rate}", title_justify="left")
        for column in ("", "validation loss", "minus float32's", "curve's distance to float32's"):
            table.add_column(column, justify="right")
        for arm in ARMS:
            validation = [arms[arm]["validation"] for arms in runs]
            curves, finals = distances(seeds, rate, arm)
            table.add_row(arm, spread(validation), spread(finals, 5), spread(curves, 5))
        Console(width=100).print(table)
        for how in (NEAREST, DITHER):
            shares = [arms[FLOAT32]["share of the update kept"][how] for arms in runs]
            print(f"share of float32's update that rounding W' once leaves, {how}: {spread(shares, 3)}")


def spread(values: list[float], digits: int = 4) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def draw(seeds: dict[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(1, len(RATES), figsize=(10, 4), layout="constrained")
    for rate, plot in zip(map(str, RATES), axes, strict=True):
        for arm in ARMS[1:]:
            curves = [
                [abs(a - b) for a, b in zip(seed[rate][arm]["losses"], seed[rate][FLOAT32]["losses"], strict=True)]
                for seed in seeds.values()
            ]
            plot.plot([statistics.mean(step) for step in zip(*curves, strict=True)], label=arm, linewidth=1)
        plot.set(title=f"learning rate {rate}", xlabel="step", ylabel="|loss - loss in float32|", yscale="log")
        plot.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
