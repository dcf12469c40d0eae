"""Merging the adapters of one layer into its base weight, and getting the base weight back: functions of the layer.

A layer remembers `merged_adapters`, with `merged_scaling` their scales, and in `record` the weight as it was before;
`others_merged` says that other tuners' adapters are merged into the same weight, over what this layer wrote.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from hira.base_weights.dense import DENSE_DTYPES
from hira.errors import HiraError
from hira.layers.substitution import exclusive
from hira.ops import heuristics

if TYPE_CHECKING:
    from hira.layers.base import HiraLayer


Factors = tuple[Tensor, Tensor, int]  # A, B and the rank of LoRA in them, as `HiraLayer._factors` joins them


class Record(NamedTuple):
    """What a merged layer remembers: the weight before, and what it wrote, to notice a later change."""

    original: Any
    written: Any
    version: int
    kind: tuple[torch.dtype, torch.device]
    fingerprint: int | None  # none of a quantised weight, whose library may change its codes
    factors: Factors | None  # copies of A and B; None where no adapter was merged


def keep_original(layer: HiraLayer) -> None:
    """Have other tuners merge into a copy of W0, so that adapters that are not merged go on acting on W0."""
    if layer.record is None:
        original = layer.storage.snapshot()
        _write_merged(layer, None, original)
        layer.record = _recorded(layer, original, None)


def read_original(layer: HiraLayer) -> Tensor:
    """W0, dense, whether adapters are merged or not."""
    return layer.storage.read() if layer.record is None else _read_original_of_merged(layer)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _read_original_of_merged(layer: HiraLayer) -> Tensor:
    with holding_W0(layer):
        return layer.storage.read()


def merge(layer: HiraLayer, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
    """`HiraLayer.merge`, which says what it does."""
    settle(layer)
    names = _names_to_merge(layer, adapter_names)
    if not names:
        return
    if safe_merge:
        check_merge(layer, names)
    original = layer.record.original if layer.record else layer.storage.snapshot()
    factors = _copies(layer, [*layer.merged_adapters, *names])
    _write_merged(layer, factors, original)
    layer.record = _recorded(layer, original, factors)
    layer.merged_adapters.extend(names)
    layer.merged_scaling.update({name: layer.scaling[name] for name in names})


def unmerge(layer: HiraLayer) -> None:
    """Put W0 back, bit for bit. A base weight that was loaded while merged is kept instead, as the new W0."""
    if layer.record is None:
        warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        return
    settle(layer)
    if layer.record is not None:
        layer.storage.restore(layer.record.original)
    _forget_merge(layer)


@contextmanager
def holding_W0(layer: HiraLayer) -> Iterator[None]:
    """Have the base layer hold W0 in the body, merged or not, as a checkpoint that has A and B has to."""
    settle(layer, by_value=False)
    storage = layer.storage
    with exclusive(storage.layer):
        record = layer.record
        if record is None:
            yield
            return
        merged = storage.snapshot()
        storage.restore(record.original)
        try:
            yield
        finally:
            storage.restore(merged)
            written, version = storage.identity()
            layer.record = record._replace(written=written, version=version)


def check_merge(layer: HiraLayer, adapter_names: list[str] | None = None) -> None:
    """Raise a HiraError if merging some adapters would give a weight that is not finite; changes no weight."""
    settle(layer)
    names = layer._present(layer.active_adapters if adapter_names is None else adapter_names)
    new = [name for name in names if name not in layer.merged_adapters]
    if new and not _merges_finite(layer, [*layer.merged_adapters, *new]):
        raise HiraError(
            f"NaNs detected in the merged weights. The adapter {','.join(new)} seems to be broken: W0 * (1 + BA) "
            f"of {layer.name or 'this layer'} would not be finite. Nothing was changed."
        )


def unload(layer: HiraLayer, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> nn.Module:
    """Return the base layer, merged if asked for, without keeping a copy of W0; PEFT calls this to unload."""
    settle(layer)
    names = _names_to_merge(layer, adapter_names) if merge else []
    if names:
        if safe_merge:
            check_merge(layer, names)
        original = layer.record.original if layer.record else layer.storage.snapshot()
        _write_merged(layer, _copies(layer, [*layer.merged_adapters, *names]), original)
    _tie_merged(layer)
    _forget_merge(layer)
    base: nn.Module = layer.get_base_layer()
    return base


def _tie_merged(layer: HiraLayer) -> None:
    """Have a layer that is tied to another hold the other's merged weight, where it is the same."""
    for source in layer.tied_to.values():
        if torch.equal(source.storage.read(), layer.storage.read()):
            layer.storage.restore(source.storage.snapshot())


def _names_to_merge(layer: HiraLayer, adapter_names: list[str] | None) -> list[str]:
    return layer._present(check_adapters_to_merge(layer, adapter_names))


def _write_merged(layer: HiraLayer, factors: Factors | None, original: Any) -> None:
    """Write W' for A and B, or W0 for None, over the original weight, or leave the present one if that fails."""
    storage, present = layer.storage, layer.storage.snapshot()
    try:
        storage.restore(original)
        # what is written in inference mode could not be trained on or versioned after it
        with torch.inference_mode(False), torch.no_grad():
            W0 = storage.read()
            storage.write(layer._effective_weight(W0, *factors) if factors else W0.clone())
    except BaseException:
        storage.restore(present)
        raise


def _merges_finite(layer: HiraLayer, names: list[str]) -> bool:
    storage, present = layer.storage, layer.storage.snapshot()
    try:
        if layer.record is not None:
            storage.restore(layer.record.original)
        with torch.no_grad():
            weight = layer._effective_weight(storage.read(), *layer._factors(names))
        return bool(torch.isfinite(weight).all())
    finally:
        storage.restore(present)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def settle(layer: HiraLayer, *, by_value: bool = True) -> None:
    """Find out whether the base weight was replaced while merged: W0, as a state dict has it, is merged into again.

    Another weight is the new W0, and nothing is merged. What is written through ``.data`` is seen by value alone.
    """
    layer.storage.check_here()
    if layer.record is not None:
        with exclusive(layer.storage.layer):
            _settle_merged(layer, by_value)


def _settle_merged(layer: HiraLayer, by_value: bool) -> None:
    record, storage = layer.record, layer.storage
    if record is None:  # another thread unmerged meanwhile
        return
    written, version = storage.identity()
    if written is record.written and version == record.version:
        shared = layer.others_merged or isinstance(layer.base_layer, BaseTunerLayer)  # others add to what was written
        if not by_value or shared or record.fingerprint is None:
            return
        weight = storage.read()
        if _kind(weight) != record.kind or _fingerprint(weight) == record.fingerprint:
            return
    present, found = storage.snapshot(), storage.read()
    storage.restore(record.original)
    is_original = torch.equal(storage.read(), found)
    storage.restore(present)
    factors = _copies(layer, layer.merged_adapters) if is_original else record.factors
    if factors is not None:
        A, B, lora_r = factors
        factors = A.to(found.device), B.to(found.device), lora_r
    _write_merged(layer, factors, record.original)
    written = storage.read()
    # what was written may have been cast back and forth since
    if is_original or any(torch.equal(written.to(dtype).to(found.dtype), found) for dtype in DENSE_DTYPES):
        layer.record = _recorded(layer, record.original, factors)
    else:
        storage.restore(present)
        warnings.warn(
            f"The base weight of {layer.name or 'a layer'} was replaced while {layer.merged_adapters} were merged; "
            "it is kept, and the adapters count as unmerged.",
            stacklevel=4,
        )
        _forget_merge(layer)


def _copies(layer: HiraLayer, names: list[str]) -> Factors | None:
    """A and B of some adapters, joined, as they are now; None for no adapter."""
    if not names:
        return None
    with torch.inference_mode(False), torch.no_grad():
        A, B, lora_r = layer._factors(names)
        return A.clone(), B.clone(), lora_r


def _recorded(layer: HiraLayer, original: Any, factors: Factors | None) -> Record:
    storage = layer.storage
    weight = storage.read()
    fingerprint = _fingerprint(weight) if storage.takes_dense else None
    return Record(original, *storage.identity(), _kind(weight), fingerprint, factors)


def _forget_merge(layer: HiraLayer) -> None:
    layer.record = None
    layer.others_merged = False
    layer.merged_adapters.clear()
    layer.merged_scaling.clear()


def settle_after_loading(layer: HiraLayer, _: Any) -> None:
    if layer.merged:
        settle(layer)


def _kind(weight: Tensor) -> tuple[torch.dtype, torch.device]:
    return weight.dtype, weight.device


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def _fingerprint(weight: Tensor) -> int:
    """A 64-bit hash of a weight's bits, which a change of a single entry always changes."""
    matrix = weight.detach().reshape(len(weight), -1)
    rows, columns = (_odd_numbers(n, weight.device) for n in matrix.shape)
    total = rows.new_zeros(())
    for chunk in heuristics.chunks(matrix):
        bits = matrix[chunk].contiguous().view(_BITS[matrix.element_size()]).long()
        total += ((bits * columns).sum(1) * rows[chunk]).sum()
    return int(total)


def _odd_numbers(n: int, device: torch.device) -> Tensor:
    """As many different ones, spread over 64 bits."""
    numbers = torch.arange(1, n + 1, device=device) * -0x61C8864680B583EB
    numbers ^= numbers >> 29
    return numbers * -0x40A7B892E31B1A47 | 1
