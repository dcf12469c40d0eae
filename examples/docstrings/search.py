"""Search the learning rates that demo.py uses, on the validation split; the test split is never touched.

Every method gets its own grid, over the adapter's rate and the head's, because LoRA and HiRA want rates about ten times
apart: a comparison at one shared rate would say nothing. Takes about a quarter of an hour for each seed on two quiet
cores and writes learning_rates.json, which is committed.
"""

import argparse
import json
import platform
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import mean

import quiet  # noqa: F401

# isort: split
from data import load_docstrings
from training import METHODS, RATES_FILE, STEPS, Method, Rates, tokenize, train

HEADS_BESIDE_ADAPTER = [1e-2, 1e-1]
GRIDS: dict[Method, list[Rates]] = {
    "head": [Rates(head) for head in (1e-2, 3e-2, 1e-1, 3e-1, 1.0)],
    "LoRA": [Rates(head, adapter) for adapter in (1e-3, 3e-3, 1e-2) for head in HEADS_BESIDE_ADAPTER],
    "HiRA": [Rates(head, adapter) for adapter in (1e-2, 3e-2, 1e-1) for head in HEADS_BESIDE_ADAPTER],
}


def main() -> None:
    """Run every method at every rate with every seed, and write what was found after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="the demo's default seed is 0")
    seeds = parser.parse_args().seeds
    data = load_docstrings()
    del data["test"]
    data = tokenize(data)
    found: dict[Method, dict[Rates, list[float]]] = {method: {} for method in METHODS}
    for seed in seeds:
        for method in METHODS:
            for rates in GRIDS[method]:
                with tempfile.TemporaryDirectory() as folder:
                    run = train(method, rates, data, seed, STEPS, Path(folder))
                accuracy = run.curve("eval_accuracy")[1][-1]
                print(f"seed {seed}  {method}  {rates}: validation accuracy {accuracy:.3f}, {run.seconds:.0f} s")
                found[method].setdefault(rates, []).append(round(accuracy, 4))
                RATES_FILE.write_text(json.dumps(summarize(found, seeds), indent=2) + "\n")


def summarize(found: dict[Method, dict[Rates, list[float]]], seeds: list[int]) -> dict:
    """The best rates of each method by mean validation accuracy, every accuracy, and the versions that ran."""
    methods = {}
    for method, accuracies in found.items():
        if accuracies:
            best = max(accuracies, key=lambda rates: mean(accuracies[rates]))
            tried = [asdict(rates) | {"validation_accuracy": values} for rates, values in accuracies.items()]
            methods[method] = {"rates": asdict(best), "tried": tried}
    versions = {"python": platform.python_version()}
    versions |= {package: version(package) for package in ("torch", "transformers", "peft")}
    return {"steps": STEPS, "seeds": seeds, "versions": versions, "methods": methods}


if __name__ == "__main__":
    main()
