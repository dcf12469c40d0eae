"""What a run leaves beside its adapter: a model card, and a picture of the loss."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hira.files.io.model_card import CARD, card, quoted
from hira.training.finetune.arguments import Arguments
from hira.training.finetune.dataset import Data
from hira.training.finetune.plan import Adapted

CURVE = "loss.png"
_LOSSES = {"train_loss": "training loss", "eval_loss": "evaluation loss", "eval_accuracy": "evaluation accuracy"}
_METRICS = {**_LOSSES, "epoch": "epochs", "train_runtime": "seconds"}


def write_card(arguments: Arguments, adapted: Adapted, data: Data, metrics: Mapping[str, float]) -> None:
    """Write README.md into the output folder: base, data, adapter, metrics, versions and command."""
    hira, training = arguments.hira, arguments.training
    base = str(arguments.model.model_name_or_path)
    alpha = arguments.alpha
    facts = {
        "base model": quoted(base),
        "data": ", ".join(quoted(name) for name in data.names),
        "rows": data.rows(),
        "task": arguments.run.task_type,
        "adapter": f"r {hira.hira_r}, hira_alpha {'none' if alpha is None else f'{alpha:g}'}, on "
        + ", ".join(f"{count} {quoted(name)}" for name, count in adapted.modules.items()),
        "trained parameters": f"{adapted.trainable:,} of {adapted.total:,}",
        "learning rate": f"{training.learning_rate:g}, {training.lr_scheduler_type.value}",
        **{name: f"{metrics[key]:,.6g}" for key, name in _METRICS.items() if key in metrics},
        "trained with": ", ".join(f"{name} {version(name)}" for name in ("trl", "accelerate", "datasets")),
    }
    text = [
        "An adapter of HiRA, W' = W0 ⊙ (1 + BA). Load it with PEFT's `PeftModel.from_pretrained`, "
        "or merge it into its base model with `hira merge`.",
        f"![The loss by step]({CURVE})",
    ]
    title = Path(training.output_dir).resolve().name
    command = ["hira", "finetune", *_without_token(arguments.command)]
    on_hub = None if Path(base).exists() else base
    content = card(title, text, facts, command, on_hub, ["hira", "peft"], library="peft")
    (Path(training.output_dir) / CARD).write_bytes(content)


def _without_token(command: Sequence[str]) -> list[str]:
    """The arguments but the hub's token, which is a secret."""
    kept = [given for given in command if not re.match("--hub[_-]token=", given)]
    while secret := {"--hub_token", "--hub-token"} & set(kept):
        position = kept.index(secret.pop())
        del kept[position : position + 2]
    return kept


def summary(metrics: Mapping[str, float]) -> str:
    """The losses, and the accuracy of a classifier, in a line."""
    return ", ".join(f"{name} {metrics[key]:.4f}" for key, name in _LOSSES.items() if key in metrics)


def draw_curve(history: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the losses of a trainer's history by step, to a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "evaluation", "o-")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    FigureCanvasAgg(figure).print_png(str(path))
