"""The trainers of `hira finetune`: TRL's SFTTrainer for language models, transformers' Trainer for classifiers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import MISSING, fields
from importlib.util import find_spec
from typing import Any

import numpy as np
from transformers.integrations import get_available_reporting_integrations, is_deepspeed_zero3_enabled

from hira.errors import HiraError
from hira.training.callback import HiraCallback
from hira.training.finetune.arguments import Arguments
from hira.training.finetune.dataset import Data
from hira.training.finetune.plan import auto_class, base_config

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


def tokenizer_of(arguments: Arguments, data: Data) -> Any:
    """The base model's tokenizer, or its processor.

    Raises:
        HiraError: it cannot be read, has neither a padding nor an end token, or lacks a chat template for messages.
    """
    from transformers import AutoProcessor, AutoTokenizer

    name, revision = arguments.model.model_name_or_path, arguments.model.model_revision
    loader = AutoTokenizer if arguments.classifies else AutoProcessor  # as SFTTrainer does
    try:
        found = loader.from_pretrained(name, revision=revision, trust_remote_code=arguments.trusts_code)
    except (OSError, ValueError, KeyError) as error:
        raise HiraError(f"the tokenizer of {name} cannot be read: {error}") from error
    tokenizer = getattr(found, "tokenizer", found)
    end = arguments.training.eos_token or tokenizer.eos_token
    if tokenizer.pad_token is None and end is None:
        raise HiraError(f"the tokenizer of {name} has no padding token and no end token; name one by --eos_token.")
    row = next(iter(data.train))
    if not arguments.classifies:
        chats = any(isinstance(row.get(name), list) for name in ("messages", "conversations", "prompt"))
        if chats and not found.chat_template and not arguments.training.chat_template_path:
            raise HiraError(
                f"the data has messages, and the tokenizer of {name} no chat template; name one by "
                "--chat_template_path."
            )
    elif tokenizer.pad_token is None:
        tokenizer.pad_token = end
    return found


def labels_of(arguments: Arguments, data: Data) -> list[str | int] | None:
    """The classes in the data, in order; None for a language model.

    Raises:
        HiraError: there is only one class, they are of different types, or the data is streamed.
    """
    if not arguments.classifies:
        return None
    column = arguments.run.dataset_label_field
    if not hasattr(data.train, "unique"):
        raise HiraError("a classifier's data cannot be streamed: its classes are found in all of its rows.")
    feature = data.train.features[column]
    if hasattr(feature, "names"):
        return list(range(feature.num_classes))
    found = {value for rows in (data.train, data.test) if rows is not None for value in rows.unique(column)}
    if len(found) < 2:
        raise HiraError(f"all rows have the {column} {found.pop()!r}; a classifier needs two at least.")
    return sorted(found)


def trainer_for(arguments: Arguments, data: Data, tokenizer: Any, labels: list[Any] | None) -> Any:
    """The trainer, with the base model loaded and adapted.

    Raises:
        HiraError: the model cannot be loaded, or options contradict one another.
    """
    try:
        if labels is None:
            trainer = _language_model(arguments, data, tokenizer)
        else:
            trainer = _classifier(arguments, data, tokenizer, labels)
    except (OSError, ValueError) as error:
        raise error if isinstance(error, HiraError) else HiraError(str(error)) from error
    if not (trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled()):  # HiraCallback reads whole weights
        trainer.add_callback(HiraCallback(trainer, arguments.run.measure_steps or sys.maxsize))
    return trainer


def _model_options(arguments: Arguments) -> dict[str, Any]:
    """What `from_pretrained` gets."""
    from trl import get_quantization_config

    model, training = arguments.model, arguments.training
    options = {
        "revision": model.model_revision,
        "trust_remote_code": arguments.trusts_code,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    }
    if (quantised := get_quantization_config(model)) is not None:
        options["quantization_config"] = quantised
    return {**options, **(training.model_init_kwargs or {})}


def _language_model(arguments: Arguments, data: Data, tokenizer: Any) -> Any:
    from trl import SFTTrainer

    arguments.training.model_init_kwargs = _model_options(arguments)
    return SFTTrainer(
        model=arguments.model.model_name_or_path,
        args=arguments.training,
        train_dataset=data.train,
        eval_dataset=data.test,
        processing_class=tokenizer,
        peft_config=arguments.config(),
    )


def _classifier(arguments: Arguments, data: Data, tokenizer: Any, labels: list[Any]) -> Any:
    from peft import get_peft_model
    from transformers import DataCollatorWithPadding, Trainer, set_seed

    training = arguments.training
    feature = data.train.features[arguments.run.dataset_label_field]
    names = [str(name) for name in getattr(feature, "names", labels)]
    set_seed(training.seed)  # the head and A start at random
    config = base_config(arguments)
    config.num_labels = len(names)
    config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    if config.get_text_config().pad_token_id is None:
        config.get_text_config().pad_token_id = tokenizer.pad_token_id
    # a head of another task, with other classes, starts anew
    options = {**_model_options(arguments), "config": config, "ignore_mismatched_sizes": True}
    base = auto_class(arguments).from_pretrained(arguments.model.model_name_or_path, **options)
    model = get_peft_model(base, arguments.config())
    if training.gradient_checkpointing:
        model.enable_input_require_grads()
    longest = training.max_length and min(
        training.max_length, tokenizer.model_max_length, getattr(config, "max_position_embeddings", training.max_length)
    )
    encode = _encoder(arguments, tokenizer, labels, longest)
    encoded = [
        None if rows is None else rows.map(encode, batched=True, remove_columns=rows.column_names)
        for rows in (data.train, data.test)
    ]
    return Trainer(
        model=model,
        args=training,
        train_dataset=encoded[0],
        eval_dataset=encoded[1],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=_accuracy,
    )


def _encoder(
    arguments: Arguments, tokenizer: Any, labels: list[Any], longest: int | None
) -> Callable[[dict[str, list[Any]]], Any]:
    numbers = {label: number for number, label in enumerate(labels)}
    text, label = arguments.training.dataset_text_field, arguments.run.dataset_label_field

    def encode(rows: dict[str, list[Any]]) -> Any:
        encoded = tokenizer(rows[text], truncation=True, max_length=longest)
        return {**encoded, "labels": [numbers[value] for value in rows[label]]}

    return encode


def _accuracy(prediction: Any) -> dict[str, float]:
    """The share of texts whose class has the largest logit."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float((np.argmax(logits, axis=-1) == prediction.label_ids).mean())}
