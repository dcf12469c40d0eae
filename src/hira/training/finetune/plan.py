"""What a run would train, from a model on the meta device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from peft import get_peft_model

from hira.errors import HiraError
from hira.layers.alpha_scale import takes_files_as_they_are
from hira.layers.base import HiraLayer
from hira.training.finetune.arguments import Arguments
from hira.training.finetune.base_model import auto_class, base_config
from hira.training.finetune.memory import Memory, bytes_of, dtypes


class Adapted(NamedTuple):
    """What is trained of a model.

    Args:
        modules: how many adapted modules there are of each name.
        trainable, total: numbers of parameters.
    """

    modules: dict[str, int]
    trainable: int
    total: int

    @classmethod
    def of(cls, model: Any) -> Adapted:
        """Count in a PeftModel."""
        layers = [name for name, module in model.named_modules() if isinstance(module, HiraLayer)]
        return cls(dict(Counter(name.rpartition(".")[2] for name in layers)), *model.get_nb_trainable_parameters())

    def lines(self) -> Iterator[str]:
        """The counts, for people."""
        yield "adapted: " + ", ".join(f"{count} {name}" for name, count in self.modules.items())
        share = 100 * self.trainable / self.total
        yield f"trainable params: {self.trainable:,} || all params: {self.total:,} || trainable%: {share:.4f}"


def plan(arguments: Arguments, labels: int | None = None) -> tuple[Adapted, Memory]:
    """Adapt the model on the meta device, and count.

    Args:
        arguments: the run's.
        labels: the number of classes of a classifier.

    Raises:
        HiraError: the base model's configuration cannot be read, or the adapter does not fit it.
    """
    config = base_config(arguments)
    if labels is not None:
        config.num_labels = labels
    token = takes_files_as_they_are.set(True)  # hira_alpha would read weights, which have no values here
    try:
        loaded, computed = dtypes(config, arguments.model, arguments.training)
        with torch.device("meta"):
            base = auto_class(arguments).from_config(config, dtype=computed, trust_remote_code=arguments.trusts_code)
        weights = bytes_of(base, arguments.model, loaded)
        model = get_peft_model(base, arguments.config())
    except (ValueError, KeyError) as error:
        raise error if isinstance(error, HiraError) else HiraError(str(error)) from error
    finally:
        takes_files_as_they_are.reset(token)
    adapted = Adapted.of(model)
    return adapted, Memory.of(base, weights, adapted.trainable, arguments.training)
