"""A classifier of texts, for transformers' Trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from peft import get_peft_model
from transformers import DataCollatorWithPadding, Trainer, set_seed

from hira.errors import HiraError
from hira.training.finetune.arguments import Arguments
from hira.training.finetune.base_model import auto_class, base_config, model_options
from hira.training.finetune.dataset import Data


def labels_of(arguments: Arguments, data: Data) -> list[str | int] | None:
    """The classes in the data, in order; None for a language model.

    Raises:
        HiraError: there is only one class, a row has none, or the data is streamed.
    """
    if not arguments.classifies:
        return None
    column = arguments.run.dataset_label_field
    if not hasattr(data.train, "unique"):
        raise HiraError("a classifier's data cannot be streamed: its classes are found in all of its rows.")
    found = {value for rows in (data.train, data.test) if rows is not None for value in rows.unique(column)}
    feature = data.train.features[column]
    if hasattr(feature, "names"):  # a ClassLabel, of which -1 stands for no class
        if unknown := found - set(range(feature.num_classes)):
            raise HiraError(
                f"some rows have the {column} {unknown.pop()}, no class; name another --dataset_test_split."
            )
        return list(range(feature.num_classes))
    if len(found) < 2:
        raise HiraError(f"all rows have the {column} {found.pop()!r}; a classifier needs two at least.")
    return sorted(found)


def classifier(arguments: Arguments, data: Data, tokenizer: Any, labels: list[Any]) -> Trainer:
    """The trainer, with the base model loaded and adapted, that reports the accuracy on the test data."""
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
    options = {**model_options(arguments), "config": config, "ignore_mismatched_sizes": True}
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
