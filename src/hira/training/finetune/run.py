"""One run of `hira finetune`: check everything, then train, or launch the processes that do."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hira.files.io.model_card import CARD
from hira.training.finetune import checkpoints, dataset, results, trainers
from hira.training.finetune.arguments import Arguments, parse
from hira.training.finetune.base_model import base_config, tokenizer_of
from hira.training.finetune.classifier import labels_of
from hira.training.finetune.launch import launch, needs_launcher
from hira.training.finetune.plan import Adapted, plan


def finetune(command: Sequence[str], launched: bool = False) -> None:
    """Train an adapter as the arguments say, and leave it in the output folder with a card and the loss's curve.

    Args:
        command: the arguments of `hira finetune`.
        launched: whether this is one of the processes that accelerate launched; one of torchrun's is known as such.

    Raises:
        HiraError: arguments, data or base model cannot be used, and the output folder is as it was; or a launched
            process failed.
        SystemExit: the help was asked for and printed.
    """
    launched = launched or "LOCAL_RANK" in os.environ
    arguments = parse(command)
    trainers.check(arguments)
    base_config(arguments)
    if not launched:
        dataset.check(arguments)
    output = Path(arguments.training.output_dir)
    checkpoint = checkpoints.checkpoint_to_resume(output, arguments.training.resume_from_checkpoint)
    data = dataset.load(arguments)
    labels = labels_of(arguments, data)
    tokenizer = tokenizer_of(arguments, data)
    if not launched:
        adapted, memory = plan(arguments, None if labels is None else len(labels))
        print(f"data: {', '.join(data.names)}; {data.rows()}", *adapted.lines(), *memory.lines(), sep="\n", flush=True)
        if arguments.run.dry_run:
            return
        if needs_launcher(arguments):
            launch(arguments)
            return
    _train(trainers.trainer_for(arguments, data, tokenizer, labels), arguments, data, checkpoint)


def _train(trainer: Any, arguments: Arguments, data: dataset.Data, checkpoint: str | None) -> None:
    """Train, evaluate, and write the adapter and what belongs to it."""
    output = Path(arguments.training.output_dir)
    adapted = Adapted.of(trainer.model)
    metrics: dict[str, Any] = {}

    def write_card(*_: Any, **__: Any) -> None:
        if trainer.is_world_process_zero():
            results.write_card(arguments, adapted, data, metrics)

    trainer.create_model_card = write_card  # in the place of TRL's, at checkpoints and when the folder is pushed
    metrics.update(trainer.train(resume_from_checkpoint=checkpoint).metrics)
    if data.test is not None:
        metrics.update(trainer.evaluate())
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        trainer.save_metrics("all", metrics, combined=False)
        results.draw_curve(trainer.state.log_history, output / results.CURVE)
        write_card()
        steps = f"{trainer.state.global_step} steps, {results.summary(metrics)}"
        print(f"{output}: adapter, {CARD}, {results.CURVE}; {steps}")
    if arguments.training.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.wait_for_everyone()  # a process that ends while others write would take the group from them
    if hasattr(trainer, "end"):  # transformers 5.18 and later: the trackers' end, and that of the process group
        trainer.end()
