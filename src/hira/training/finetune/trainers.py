"""The trainer of a run: TRL's SFTTrainer for language models, transformers' Trainer for classifiers."""

from __future__ import annotations

import sys
from dataclasses import MISSING, fields
from importlib.util import find_spec
from typing import Any

from transformers.integrations import get_available_reporting_integrations, is_deepspeed_zero3_enabled

from hira.errors import HiraError
from hira.training.callback import HiraCallback
from hira.training.finetune.arguments import Arguments
from hira.training.finetune.base_model import model_options
from hira.training.finetune.classifier import classifier
from hira.training.finetune.dataset import Data

# TRL's options for language models, which would do nothing for a classifier
_OF_LANGUAGE_MODELS = ("packing", "padding_free", "completion_only_loss", "assistant_only_loss", "chat_template_path")


def check(arguments: Arguments) -> None:
    """Refuse what the task's trainer would ignore, and what needs a package that is not there.

    Raises:
        HiraError: an option is for language models, and a classifier is trained; fp16 is asked of a CPU; bitsandbytes
            or a reporter is missing.
    """
    defaults = {each.name: each.default for each in fields(arguments.training) if each.default is not MISSING}
    for name in _OF_LANGUAGE_MODELS if arguments.classifies else ():
        if getattr(arguments.training, name) != defaults[name]:
            raise HiraError(f"{name} is for language models; leave it out with task_type SEQ_CLS.")
    if (arguments.model.load_in_4bit or arguments.model.load_in_8bit) and find_spec("bitsandbytes") is None:
        raise HiraError("load_in_4bit and load_in_8bit need bitsandbytes: pip install 'hira[bnb]'.")
    if arguments.training.fp16 and arguments.training.use_cpu:
        raise HiraError("fp16 needs a GPU: on a CPU accelerate would train in float32 in its place. Use --bf16 true.")
    known = get_available_reporting_integrations()
    for name in arguments.training.report_to:
        if name not in known:
            raise HiraError(f"report_to {name!r} is not installed here; there is {', '.join(known) or 'nothing'}.")


def trainer_for(arguments: Arguments, data: Data, tokenizer: Any, labels: list[Any] | None) -> Any:
    """The trainer, with the base model loaded and adapted.

    Raises:
        HiraError: the model cannot be loaded, or options contradict one another.
    """
    try:
        if labels is None:
            trainer = _language_model(arguments, data, tokenizer)
        else:
            trainer = classifier(arguments, data, tokenizer, labels)
    except (OSError, ValueError) as error:
        raise error if isinstance(error, HiraError) else HiraError(str(error)) from error
    if not (trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled()):  # HiraCallback reads whole weights
        trainer.add_callback(HiraCallback(trainer, arguments.run.measure_steps or sys.maxsize))
    return trainer


def _language_model(arguments: Arguments, data: Data, tokenizer: Any) -> Any:
    from trl import SFTTrainer

    arguments.training.model_init_kwargs = model_options(arguments)
    return SFTTrainer(
        model=arguments.model.model_name_or_path,
        args=arguments.training,
        train_dataset=data.train,
        eval_dataset=data.test,
        processing_class=tokenizer,
        peft_config=arguments.config(),
    )
