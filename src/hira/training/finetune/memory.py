"""About how much memory a run takes, from a model on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from hira.layers.base import HiraLayer
from hira.layers.linear import Linear
from hira.tuner.model import hira_layers

_TRAINED = 16  # bytes for a trained parameter: itself, its gradient, and Adam's two averages, in float32
# bytes for a weight of bitsandbytes: 4 bits and a float32 for 64 of them, or a byte for 64 if that is quantised too
_4BIT, _4BIT_NESTED, _8BIT = 0.5 + 4 / 64, 0.5 + 1 / 64, 1.0


class Memory(NamedTuple):
    """Bytes in a process that holds the whole model, about.

    Args:
        weights: of the base model.
        kept: of W' that layers keep, with keep_weight.
        training: of what is trained, its gradients and the averages of Adam.
        activations: of what a batch of full length keeps for backward, without the loss's; None where the model does
            not run without values.
        batch: sequences, and tokens in each.
    """

    weights: int
    kept: int
    training: int
    activations: int | None
    batch: tuple[int, int]

    @classmethod
    def of(cls, base: Any, weights: int, trainable: int, training: Any) -> Memory:
        """Estimate.

        Args:
            base: the base model on the meta device, in the dtype that it computes in, adapted.
            weights: the bytes of its weights.
            trainable: the number of parameters that are trained.
            training: TRL's SFTConfig.
        """
        longest = getattr(base.config.get_text_config(), "max_position_embeddings", 1024)
        batch = training.per_device_train_batch_size, min(training.max_length or longest, longest)
        kept = sum(_bytes_kept(layer) for layer in hira_layers(base))
        return cls(weights, kept, _TRAINED * trainable, _activations(base, batch, training), batch)

    def lines(self) -> Iterator[str]:
        """The bytes, for people."""
        tokens = f"{self.batch[0]} x {self.batch[1]} tokens"
        kept = f"not known for {tokens}" if self.activations is None else f"{_size(self.activations)} for {tokens}"
        together = self.weights + self.kept + self.training + (self.activations or 0)
        with_kept = f"{_size(self.weights)}, and W' of them {_size(self.kept)}" if self.kept else _size(self.weights)
        yield f"memory, about: {_size(together)} in a process that holds the whole model"
        yield f"  weights {with_kept}; adapter, gradients and Adam {_size(self.training)}; activations {kept}"


def _bytes_kept(layer: HiraLayer) -> int:
    """Bytes of the W' that a layer keeps, which is dense, in the dtype of the product."""
    weight = layer.get_base_layer().weight
    return weight.numel() * weight.element_size() if isinstance(layer, Linear) and layer.keep_weight else 0


def dtypes(config: Any, model: Any, training: Any) -> tuple[torch.dtype, torch.dtype]:
    """The dtype that the base model is loaded in, and the one that it computes in.

    Args:
        config: the base model's configuration.
        model, training: TRL's ModelConfig and SFTConfig.
    """
    given = config.dtype if model.dtype in (None, "auto") else getattr(torch, model.dtype)
    loaded = given or torch.float32
    return loaded, torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else loaded


def bytes_of(base: Any, model: Any, loaded: torch.dtype) -> int:
    """Bytes of the base model's weights, as TRL's ModelConfig has them loaded in a dtype."""
    plain = loaded.itemsize
    quantised: dict[Tensor, float] = {}
    if model.load_in_4bit or model.load_in_8bit:
        each = _8BIT if model.load_in_8bit else _4BIT_NESTED if model.use_bnb_nested_quant else _4BIT
        head = base.get_output_embeddings()
        quantised = {m.weight: each for m in base.modules() if isinstance(m, nn.Linear) and m is not head}
    return sum(round(parameter.numel() * quantised.get(parameter, plain)) for parameter in base.parameters())


def _activations(base: Any, batch: tuple[int, int], training: Any) -> int | None:
    """Bytes that the layers keep for backward; with checkpointing what is kept, and one layer's as it is recomputed."""
    try:
        kept = _kept(base, batch)
        if training.gradient_checkpointing:
            base.enable_input_require_grads()
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            base.config.use_cache = False
            between = _kept(base, batch)
            kept = between + (kept - between) // base.config.get_text_config().num_hidden_layers
    except (RuntimeError, AttributeError, TypeError):  # it asks a tensor for its values, or takes other inputs
        return None
    return kept


def _kept(base: Any, batch: tuple[int, int]) -> int:
    """Bytes that a forward of the model without its head saves for backward."""
    count, length = batch
    ids = torch.zeros(count, length, dtype=torch.long, device="meta")
    mask = torch.ones(count, 1, length, length, dtype=torch.bool, device="meta")  # of four dimensions: taken as it is
    base.train()
    return kept_for_backward(base, lambda: base.base_model(input_ids=ids, attention_mask=mask, use_cache=False))


def kept_for_backward(model: nn.Module, forward: Callable[[], object]) -> int:
    """Bytes that a forward of a model saves for backward, beside the model's own parameters and buffers.

    Args:
        model: on the meta device, where attention counts as a fused kernel keeps it.
        forward: calls the model.
    """
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    storages: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor), _FusedAttention():
        forward()
    return sum(int(storage.nbytes()) for storage in storages.values())


class _Attention(torch.autograd.Function):
    """Saves what a fused kernel saves: its inputs, its output, and a float32 for each row; computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output


class _FusedAttention(TorchFunctionMode):
    """On the meta device PyTorch computes attention step by step, and keeps a matrix of tokens by tokens."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        replacement = _attention if func is F.scaled_dot_product_attention else func
        return replacement(*args, **(kwargs or {}))


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
    return _Attention.apply(query, key, value)


def _size(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"
