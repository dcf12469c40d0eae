"""What a run would train, and the memory that it takes, from a model on the meta device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from hira.errors import HiraError
from hira.layers.base import HiraLayer
from hira.training.finetune.arguments import Arguments

_TRAINED = 16  # bytes for a trained parameter: itself, its gradient, and Adam's two averages, in float32
# bytes for a weight of bitsandbytes: 4 bits and a float32 for 64 of them, or a byte for 64 if that is quantised too
_4BIT, _4BIT_NESTED, _8BIT = 0.5 + 4 / 64, 0.5 + 1 / 64, 1.0


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


class Memory(NamedTuple):
    """Bytes in a process that holds the whole model, about.

    Args:
        weights: of the base model.
        training: of what is trained, its gradients and the averages of Adam.
        activations: of what a batch of full length keeps for backward, without the loss's; None where the model does
            not run without values.
        batch: sequences, and tokens in each.
    """

    weights: int
    training: int
    activations: int | None
    batch: tuple[int, int]

    def lines(self) -> Iterator[str]:
        """The bytes, for people."""
        tokens = f"{self.batch[0]} x {self.batch[1]} tokens"
        kept = f"not known for {tokens}" if self.activations is None else f"{_size(self.activations)} for {tokens}"
        together = self.weights + self.training + (self.activations or 0)
        yield f"memory, about: {_size(together)} in a process that holds the whole model"
        yield f"  weights {_size(self.weights)}; adapter, gradients and Adam {_size(self.training)}; activations {kept}"


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
    training = arguments.training
    try:
        with torch.device("meta"):
            base = auto_class(arguments).from_config(config, trust_remote_code=arguments.trusts_code)
        weights = _bytes_of(base, arguments)
        model = get_peft_model(base, arguments.config(weights=False))
    except (ValueError, KeyError) as error:
        raise error if isinstance(error, HiraError) else HiraError(str(error)) from error
    adapted = Adapted.of(model)
    longest = getattr(config.get_text_config(), "max_position_embeddings", 1024)
    batch = training.per_device_train_batch_size, min(training.max_length or longest, longest)
    return adapted, Memory(weights, _TRAINED * adapted.trainable, _activations(base, batch, training), batch)


def base_config(arguments: Arguments) -> Any:
    """The base model's configuration.

    Raises:
        HiraError: no model is named, or its configuration cannot be read.
    """
    from transformers import AutoConfig

    name = arguments.model.model_name_or_path
    if not name:
        raise HiraError("no base model is named: use --model_name_or_path FOLDER, or owner/name on the hub.")
    revision = arguments.model.model_revision
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=arguments.trusts_code)
    except (OSError, ValueError) as error:
        raise HiraError(f"the base model {name} cannot be read: {error}") from error


def auto_class(arguments: Arguments) -> Any:
    """The class of transformers that makes a model for the task."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if arguments.classifies else AutoModelForCausalLM


def _bytes_of(base: Any, arguments: Arguments) -> int:
    """Bytes of the base model's weights, as they will be loaded."""
    model = arguments.model
    given = base.config.dtype if model.dtype in (None, "auto") else getattr(torch, model.dtype)
    plain = (given or torch.float32).itemsize
    quantised: dict[Tensor, float] = {}
    if model.load_in_4bit or model.load_in_8bit:
        each = _8BIT if model.load_in_8bit else _4BIT_NESTED if model.use_bnb_nested_quant else _4BIT
        head = base.get_output_embeddings()
        quantised = {m.weight: each for m in base.modules() if isinstance(m, nn.Linear) and m is not head}
    return sum(round(parameter.numel() * quantised.get(parameter, plain)) for parameter in base.parameters())


def _activations(base: Any, batch: tuple[int, int], training: Any) -> int | None:
    """Bytes that the layers keep for backward; with checkpointing what is kept, and one layer's as it is recomputed."""
    scale = 0.5 if training.bf16 or training.fp16 else 1.0
    try:
        kept = _kept(base, batch)
        if training.gradient_checkpointing:
            base.enable_input_require_grads()
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            base.config.use_cache = False
            between = _kept(base, batch)
            kept = between + (kept - between) // base.config.get_text_config().num_hidden_layers
    except (
        RuntimeError,
        NotImplementedError,
        AttributeError,
        TypeError,
    ):  # it asks a tensor for its values, or takes no ids
        return None
    return round(scale * kept)


def _kept(base: Any, batch: tuple[int, int]) -> int:
    """Bytes of float32 that a forward of the model without its head saves for backward."""
    own = {tensor.untyped_storage()._cdata for tensor in (*base.parameters(), *base.buffers())}
    storages: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage
        return tensor

    count, length = batch
    ids = torch.zeros(count, length, dtype=torch.long, device="meta")
    mask = torch.ones(count, 1, length, length, dtype=torch.bool, device="meta")  # of four dimensions: taken as it is
    base.train()
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        base.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    return sum(int(storage.nbytes()) for storage in storages.values())


def _size(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"
