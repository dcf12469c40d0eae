"""Do A and B train in bfloat16 as they do in float32? On a model of 4 bits, whose adapters TRL casts to bfloat16.

    python -m benchmarks.adapter_dtype --seed 0 [--seed 1 ...] [--out FILE.json]

A tiny language model (tiny_lm.py) is quantised to 4 bits and adapted to other text under bfloat16 autocast, as TRL
trains by default, with A and B in float32, in bfloat16, and in bfloat16 beside float32 copies that the optimiser steps,
which is what DeepSpeed does. The arms of a seed have the same start and batches. The results of a seed are added to the
JSON file; without a seed, the table of docs/learning_rate.md is printed from what is there.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import bitsandbytes as bnb
import torch
from benchmarks import tiny_lm
from benchmarks.comparison.report import machine
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from hira import HiraConfig

FLOAT32, BFLOAT16, COPIES = "float32", "bfloat16", "bfloat16, float32 copies"
DTYPES = (FLOAT32, BFLOAT16, COPIES)
STEPS, RANK, PART = 200, 8, 10  # a curve has the mean loss of each PART steps
METHODS = {
    "HiRA, hira_alpha": (HiraConfig, {"hira_alpha": 2 * RANK}, (3e-4, 3e-3)),
    "HiRA": (HiraConfig, {}, (3e-3, 3e-2)),
    "LoRA": (LoraConfig, {"lora_alpha": 2 * RANK}, (3e-4, 3e-3)),
}
RESULTS = Path(__file__).parent / "results" / "adapter_dtype.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, action="append", default=[])
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file to add to")
    parser.add_argument("--weights", type=Path, default=Path("demo-output"), help="where the pretrained model is kept")
    options = parser.parse_args()
    found = json.loads(options.out.read_text()) if options.out.exists() else {"seeds": {}}
    warnings.filterwarnings("ignore", "The CPU kernel for 4-bit", UserWarning)
    for seed in options.seed:
        base = tiny_lm.pretrained(options.weights)
        train_text, validation_text = tiny_lm.reference_text()
        found["machine"] = machine()
        found["settings"] = {"steps": STEPS, "rank": RANK, "batch": tiny_lm.BATCH, "context": tiny_lm.CONTEXT}
        found["seeds"][str(seed)] = {
            method: {
                str(rate): {
                    dtype: run(base, method, rate, dtype, seed, train_text, validation_text) for dtype in DTYPES
                }
                for rate in rates
            }
            for method, (_, _, rates) in METHODS.items()
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(table(found["seeds"])))


def quantised(model: nn.Module) -> nn.Module:
    """A copy of the model with 4-bit weights, which multiply in bfloat16, but in `down_proj`.

    Its width is no multiple of 64, for which bitsandbytes' layer fails on some processors when it is evaluated.
    """
    copy = tiny_lm.bare()
    copy.load_state_dict(model.state_dict())
    for name, module in list(copy.named_modules()):
        if name.rpartition(".")[2] in tiny_lm.TARGETS and module.in_features % 64 == 0:
            layer = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16
            )
            layer.load_state_dict(module.state_dict())
            copy.set_submodule(name, layer.to("cpu"))
    return copy.requires_grad_(False)


def run(
    base: nn.Module, method: str, rate: float, dtype: str, seed: int, text: Tensor, validation: Tensor
) -> dict[str, Any]:
    """Adapt the model in one arm: the curve of training, and the loss on other text."""
    config, options, _ = METHODS[method]
    torch.manual_seed(seed)
    model = get_peft_model(quantised(base), config(r=RANK, target_modules=tiny_lm.TARGETS, **options))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    copies = [nn.Parameter(parameter.detach().clone()) for parameter in trained]
    if dtype != FLOAT32:
        for parameter in trained:
            parameter.data = parameter.data.bfloat16()
    losses = train(model, trained, copies if dtype == COPIES else trained, tiny_lm.batches(text, STEPS, seed), rate)
    with torch.autocast("cpu", torch.bfloat16):
        return {"curve": curve(losses), "validation": tiny_lm.loss_on(model, validation)}


def train(model: nn.Module, trained: list[Any], stepped: list[Any], batches: Any, rate: float) -> list[float]:
    """Train with AdamW and linear decay, the optimiser on ``stepped``, whose values ``trained`` takes."""
    optimizer = torch.optim.AdamW(stepped, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    losses = []
    model.train()
    for ids in batches:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        model.zero_grad()
        loss.backward()
        for parameter, copy in zip(trained, stepped, strict=True):
            copy.grad = parameter.grad.to(copy.dtype)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for parameter, copy in zip(trained, stepped, strict=True):
                parameter.copy_(copy)
        losses.append(loss.item())
    return losses


def curve(losses: list[float]) -> list[float]:
    return [round(mean(losses[i : i + PART]), 5) for i in range(0, len(losses), PART)]


def table(seeds: dict[str, Any]) -> Iterator[str]:
    """The lines of a table of validation losses: with float32, and how much more the others have."""
    yield f"| | rate | float32 | {BFLOAT16} | {COPIES} |"
    yield "|---|---|---|---|---|"
    for method, (_, _, rates) in METHODS.items():
        for rate in map(str, rates):
            arms = [{dtype: seed[method][rate][dtype]["validation"] for dtype in DTYPES} for seed in seeds.values()]
            more = [spread([arm[dtype] - arm[FLOAT32] for arm in arms], "+") for dtype in (BFLOAT16, COPIES)]
            yield f"| {method} | {rate} | {spread([arm[FLOAT32] for arm in arms])} | {more[0]} | {more[1]} |"


def spread(values: list[float], sign: str = "") -> str:
    return f"{mean(values):{sign}.4f} ± {stdev(values) if len(values) > 1 else 0:.4f}"


if __name__ == "__main__":
    main()
