"""HiRA on the 4-bit and 8-bit linear layers of bitsandbytes.

A target can only be such a layer if bitsandbytes was imported already, so this module never imports it for a check.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from hira.base_weights.dense import Storage
from hira.errors import HiraError
from hira.layers.linear import Linear
from hira.ops.linear import Dequantize

bnb: Any = None  # bitsandbytes, once a layer of it has been seen


class _Snapshot4bit(NamedTuple):
    weight: Any
    may_be_repacked: bool


class Packed4bit(Storage):
    """A weight packed to 4 bits: blocks of codes and their scales, in a `Params4bit`.

    On a processor with AVX512-BF16 bitsandbytes repacks it for its CPU kernel when the layer is called for evaluation,
    which rounds the scales and gives x no gradient any more. W0 is kept from that; a merged weight is not.
    """

    takes_dense = False
    is_dense = False
    is_one_parameter = False

    @property
    def plain_forwards(self) -> tuple[Callable[..., Any], ...]:
        return (bnb.nn.Linear4bit.forward,)

    @property
    def compute_dtype(self) -> torch.dtype | None:
        dtype: torch.dtype | None = self.layer.compute_dtype
        return dtype

    def saved_for_backward(self) -> tuple[Tensor, Dequantize]:
        state = getattr(self.layer.weight, "quant_state", None)
        return self.stored, partial(_dequantize_4bit, state=_quantised(state, self.layer))

    def write(self, weight: Tensor) -> None:
        old = self.layer.weight
        self._install(
            bnb.nn.Params4bit(
                weight,
                requires_grad=False,
                blocksize=old.blocksize,
                compress_statistics=old.compress_statistics,
                quant_type=old.quant_type,
                quant_storage=old.quant_storage,
                module=self.layer,
            ).to(old.device)
        )
        self.allow_repacking()

    def snapshot(self) -> _Snapshot4bit:
        return _Snapshot4bit(super().snapshot(), self.layer.support_avx512bf16_for_cpu)

    def restore(self, snapshot: Any) -> None:
        device = self.layer.weight.device
        weight, may_be_repacked = snapshot
        self._install(weight if weight.device == device else weight.to(device))
        self.layer.support_avx512bf16_for_cpu = may_be_repacked

    def prevent_repacking(self) -> None:
        """Have bitsandbytes leave the weight in the format that it has."""
        self.layer.support_avx512bf16_for_cpu = False

    def allow_repacking(self) -> None:
        """Have bitsandbytes repack the weight again where its CPU kernel runs."""
        self.layer.support_avx512bf16_for_cpu = bnb.functional.has_avx512bf16()

    def unpack(self) -> None:
        """Put a weight that was repacked already in the format for all devices, its rounded scales as they are."""
        weight = self.layer.weight
        if _is_repacked(getattr(weight, "quant_state", None)):
            weight.data, weight.quant_state = _unpacked(weight.data, weight.quant_state)
            self._install(weight)

    def _install(self, weight: Any) -> None:
        self.layer.weight = weight
        self.layer.quant_state = weight.quant_state


class _Int8Snapshot(NamedTuple):
    weight: Any
    codes: Tensor
    scales: Tensor


class RowwiseInt8(Storage):
    """A weight of 8-bit integers with a scale for each row, W0 = codes * scales / 127, in an `Int8Params`.

    The layer multiplies integers, x rounded to 8 bits as well, for which no product with W' can stand in.
    """

    takes_dense = False
    is_dense = False
    is_one_parameter = False

    @property
    def plain_forwards(self) -> tuple[Callable[..., Any], ...]:
        return ()

    def saved_for_backward(self) -> tuple[Tensor, Dequantize]:
        return self._codes(), partial(_dequantize_8bit, scales=self._scales())

    def _codes(self) -> Tensor:
        state = self.layer.state
        codes: Tensor = self.layer.weight.data if state.CB is None else state.CB
        return codes

    def write(self, weight: Tensor) -> None:
        device = self.layer.weight.device
        # bitsandbytes quantises on the way from the CPU to a device
        new = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False).to(device)
        self._install(_Int8Snapshot(new, new.CB, new.SCB))

    def snapshot(self) -> _Int8Snapshot:
        return _Int8Snapshot(self.layer.weight, self._codes(), self._scales())

    def restore(self, snapshot: Any) -> None:
        device = self.layer.weight.device
        weight, codes, scales = snapshot
        weight.data = codes.to(device)
        self._install(_Int8Snapshot(weight, weight.data, scales.to(device)))

    def _scales(self) -> Tensor:
        state = self.layer.state
        scales: Tensor = _quantised(self.layer.weight.SCB if state.SCB is None else state.SCB, self.layer)
        return scales

    def _install(self, snapshot: _Int8Snapshot) -> None:
        weight, codes, scales = snapshot
        weight.CB = weight.SCB = None
        self.layer.weight = weight
        self.layer.state.CB, self.layer.state.SCB = codes, scales


def _quantised(statistics: Any, layer: nn.Module) -> Any:
    if statistics is None:
        raise HiraError(
            f"The weight of {type(layer).__name__} is not quantised yet: bitsandbytes does so when the model is moved "
            "to its device; call model.to(device) first."
        )
    return statistics


def _dequantize_4bit(packed: Tensor, state: Any) -> Tensor:
    packed = packed.detach()
    if _is_repacked(state):
        packed, state = _unpacked(packed, state)
    weight: Tensor = bnb.functional.dequantize_4bit(packed, state)
    return weight


def _is_repacked(state: Any) -> bool:
    return getattr(state, "packing_format_for_cpu", False)


def _unpacked(packed: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Codes and state as before a repacking; bitsandbytes' inverse changes the state, and its scales once more."""
    state = copy.copy(state)
    scales, state.original_nested = state.absmax.t().reshape(-1).float(), False  # repacked they are (in / block, out)
    packed, state = bnb.functional._convert_weight_packed_for_cpu_inverse(packed, state)
    state.absmax = scales
    return packed, state


def _dequantize_8bit(codes: Tensor, scales: Tensor) -> Tensor:
    return codes * (scales.float() / 127).unsqueeze(1)


class Linear4bit(Linear):
    """HiRA on a bitsandbytes `Linear4bit`: one product with W' of the dequantised weight, in its compute dtype.

    Merging packs W' again, with the base layer's settings; unmerging puts the packed weight back, bit for bit.

    Args:
        base_layer, adapter_name, config, r: as for Linear.
    """

    storage_type = Packed4bit

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, r: int | None = None) -> None:
        super().__init__(base_layer, adapter_name, config, r)
        storage: Any = self.storage
        storage.prevent_repacking()
        storage.unpack()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the base layer as any HiRA layer does; bitsandbytes may repack its weight again."""
        base = super().unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        Packed4bit(base).allow_repacking()
        return base


class Linear8bitLt(Linear):
    """HiRA on a bitsandbytes `Linear8bitLt`: its integer product of x, plus a product of x with the update.

    Merging quantises W' again; unmerging puts the integers and scales back, bit for bit.

    Args:
        base_layer, adapter_name, config, r: as for Linear.
    """

    storage_type = RowwiseInt8


def dispatch_bnb_8bit(target: nn.Module, adapter_name: str, hira_config: Any, **kwargs: Any) -> nn.Module | None:
    """Return a HiRA layer for a bitsandbytes `Linear8bitLt`, None for another module.

    Args:
        target: the module, or another tuner's layer around it.
        adapter_name: the adapter's name.
        hira_config: its HiraConfig.
        **kwargs: `r`, the rank, if not the config's; PEFT passes more, which is not needed.
    """
    return _dispatch("Linear8bitLt", Linear8bitLt, target, adapter_name, hira_config, **kwargs)


def dispatch_bnb_4bit(target: nn.Module, adapter_name: str, hira_config: Any, **kwargs: Any) -> nn.Module | None:
    """Return a HiRA layer for a bitsandbytes `Linear4bit`, None for another module; arguments as its sibling's."""
    return _dispatch("Linear4bit", Linear4bit, target, adapter_name, hira_config, **kwargs)


def _dispatch(
    name: str, layer: type[Linear], target: nn.Module, adapter_name: str, config: Any, r: int | None = None, **_: Any
) -> nn.Module | None:
    global bnb
    bnb = sys.modules.get("bitsandbytes")
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if bnb is None or not isinstance(base, getattr(bnb.nn, name)):
        return None
    # one that is not quantised yet will be, on the way to its device; an 8-bit layer may be told to keep floats
    keeps_floats = layer is Linear8bitLt and base.state.has_fp16_weights
    return None if keeps_floats else layer(target, adapter_name, config, r)
