"""How a base layer's weight is read, written and restored: one small class for each way of storing it.

A layer needs four things of its base weight. What autograd saves of it for backward, and what turns that into W0
(`saved_for_backward`); W0 itself (`read`); a merged weight put in its place (`write`); and the way back (`snapshot` and
`restore`). Nothing else in this package touches a base weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hira.base_weights import offloaded
from hira.distributed.detection import is_dtensor, sharded_by
from hira.errors import HiraError
from hira.ops.linear import Dequantize

DENSE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DENSE_LAYERS = (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_DENSE_FORWARDS = tuple(kind.forward for kind in DENSE_LAYERS)


class Storage:
    """A weight held as a dense parameter of shape (out, in, *kernel), or (num_embeddings, dim).

    `write` installs a new parameter instead of changing the old one. A layer that shares the old parameter, such as an
    output layer tied to an embedding, keeps it, and `restore` puts it back, bit for bit and with its ties.

    Where accelerate offloads the weight, the layer holds a placeholder, which autograd saves, and W0 is loaded for each
    product. A merged weight is stored where accelerate's hook on the base layer will look for it.

    Args:
        layer: the base layer.
        name: the name of its parameter.
    """

    # whether the layer's own forward computes with a dense weight in the place of the stored one
    takes_dense: ClassVar[bool] = True
    # whether the stored weight is dense, so that it can be fetched from where accelerate keeps it
    is_dense: ClassVar[bool] = True
    # whether a state dict has the stored weight as one entry, the parameter
    is_one_parameter: ClassVar[bool] = True

    def __init__(self, layer: nn.Module, name: str = "weight") -> None:
        self.layer: Any = layer
        self.name = name

    @classmethod
    def serves(cls, layer: Any, name: str = "weight") -> bool:
        """Whether a weight of a layer is stored like this."""
        weight = getattr(layer, name)
        if is_dtensor(weight):  # a tensor that FSDP has sharded is whole when the layer computes; one of A or B is not
            return weight.dtype in DENSE_DTYPES and sharded_by(layer, name) == "tensor parallelism"
        return weight.dtype in DENSE_DTYPES and type(weight.data) in (Tensor, nn.Parameter)

    @property
    def plain_forwards(self) -> tuple[Callable[..., Any], ...]:
        """The forwards that compute the plain function of W0, which one product with W' can replace."""
        return _DENSE_FORWARDS

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """The dtype to which the base layer casts x for its product; None where it does not."""
        return None

    def is_computed_by_hook(self) -> bool:
        """Whether a hook before the layer's forward computes the weight again, as `torch.nn.utils.weight_norm` does."""
        return self.name in self.layer.__dict__ and self.name not in self.layer._parameters

    @property
    def stored(self) -> Any:
        """The tensor that the layer holds."""
        return getattr(self.layer, self.name)

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias."""
        bias: Tensor | None = self.layer.bias
        return bias if bias is None or not bias.is_meta else offloaded.load(self.layer, "bias")

    def saved_for_backward(self) -> tuple[Tensor, Dequantize | None]:
        """The tensor that autograd saves, and what turns it into W0; None where it is W0 itself, oriented (out, in)."""
        stored = self.stored
        if is_dtensor(stored):
            raise HiraError(
                f"The {self.name} of {type(self.layer).__name__} is divided over processes by "
                f"{sharded_by(self.layer, self.name)} where it is read: call the model as a whole, so that hooks can "
                "gather the weight; or leave the module out with exclude_modules, or FSDP's shard group for it."
            )
        elsewhere = offloaded.find(self.layer, self.name) if offloaded.is_hooked(self.layer) else None
        if elsewhere is None:
            return self._oriented(stored), None
        return self._oriented(stored), lambda placeholder: self._oriented(elsewhere.fetch(placeholder))

    def _oriented(self, weight: Tensor) -> Tensor:
        return weight

    def read(self) -> Tensor:
        """W0, dense, oriented (out, in, *kernel)."""
        saved, dequantize = self.saved_for_backward()
        return saved if dequantize is None else dequantize(saved)

    def write(self, weight: Tensor) -> None:
        """Put a dense weight, oriented as `read` gives it, in the place of the stored one."""
        if offloaded.offloading_hook(self.layer) is not None:
            offloaded.replace(self.layer, self.name, weight)
        else:
            setattr(self.layer, self.name, nn.Parameter(weight, requires_grad=self.stored.requires_grad))

    def snapshot(self) -> Any:
        """What `restore` needs to put the present weight back; no copy of data.

        Raises:
            HiraError: the weight is not a parameter of the layer, so that none can be put in its place; or it is spread
                over processes.
        """
        if by := sharded_by(self.layer, self.name):
            raise HiraError(
                f"The {self.name} of {type(self.layer).__name__} is spread over processes by {by}, so nothing can be "
                "merged into it or unmerged; save the adapter, load it on a model that is not sharded and merge there."
            )
        if self.name not in self.layer._parameters:
            raise HiraError(
                f"The {self.name} of {type(self.layer).__name__} is computed, not stored, so nothing can be merged "
                "into it; remove its parametrization first."
            )
        hook = offloaded.offloading_hook(self.layer)
        return self.stored if hook is None else offloaded.Snapshot(hook.weights_map, self.name)

    def identity(self) -> tuple[Any, int]:
        """An object and its version, both the same as long as nobody replaces the weight."""
        hook = offloaded.offloading_hook(self.layer)
        return (self.stored, self.stored._version) if hook is None else (hook.weights_map, 0)

    def check_here(self) -> None:
        """Raise a HiraError if accelerate offloads the weight in a form that cannot be loaded here."""
        if not self.is_dense and offloaded.offloading_hook(self.layer) is not None:
            raise HiraError(
                f"accelerate offloads the weight of {type(self.layer).__name__}, which is quantised; HiRA loads "
                "dense weights only. Leave this module on its device in the device map, or out of target_modules."
            )

    def restore(self, snapshot: Any) -> None:
        """Put back the weight of a snapshot, on the device and in the dtype that the layer has now."""
        if offloaded.offloading_hook(self.layer) is not None:
            offloaded.replace(self.layer, self.name, snapshot)
            return
        if isinstance(snapshot, offloaded.Snapshot):  # the weights are no longer offloaded
            snapshot = nn.Parameter(snapshot.value.detach(), requires_grad=self.stored.requires_grad)
        snapshot.data = self.value_of(snapshot).data
        setattr(self.layer, self.name, snapshot)

    def value_of(self, snapshot: Any) -> Tensor:
        """The weight of a snapshot, on the device and in the dtype that the layer has now."""
        if isinstance(snapshot, offloaded.Snapshot):
            snapshot = snapshot.value
        value: Tensor = snapshot.to(self.stored.device, self.stored.dtype)
        return value


class Transposed(Storage):
    """A weight held as (in, out), as in a transformers `Conv1D` and wherever `fan_in_fan_out` says so."""

    def saved_for_backward(self) -> tuple[Tensor, Dequantize | None]:
        # ZeRO-3 frees a weight by giving the parameter other data; a view would keep the old
        if hasattr(self.stored, "ds_id") and not self.stored.requires_grad:
            return self.stored, Tensor.t
        return super().saved_for_backward()

    def _oriented(self, weight: Tensor) -> Tensor:
        return weight.t()

    def write(self, weight: Tensor) -> None:
        super().write(weight.t())


class ReadOnly(Storage):
    """A weight that can be read but not written, such as one that is quantised by calibration."""

    takes_dense = False
    is_dense = False

    def snapshot(self) -> Any:
        raise HiraError(
            f"The weight of {type(self.layer).__name__} can be read but not written, so nothing can be merged into it; "
            "save the adapter, load it on the model as it was before it was quantised, and merge it there."
        )
