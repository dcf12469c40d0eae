"""Merging the adapters of one layer into its base weight, and getting the base weight back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from hira.base_weights.dense import DENSE_DTYPES, Storage
from hira.errors import HiraError
from hira.layers.substitution import exclusive
from hira.ops import heuristics


class _Record(NamedTuple):
    """What a merged layer remembers: the weight before, and what it wrote, to notice a later change."""

    original: Any
    written: Any
    version: int
    kind: tuple[torch.dtype, torch.device]
    fingerprint: int | None  # none of a quantised weight, whose library may change its codes
    factors: list[Tensor]  # copies of A and B; none where no adapter was merged


class MergeableLayer(BaseTunerLayer):
    """The merging half of a HiRA layer. The other half says which adapters there are and how W' is formed."""

    # the module's name in the model, for messages
    name: str = ""
    scaling: dict[str, float]

    def _init_merging(self) -> None:
        self.merged_adapters: list[str] = []
        # the scales that they were merged with
        self.merged_scaling: dict[str, float] = {}
        self._record: _Record | None = None
        self.register_load_state_dict_post_hook(_settle_after_loading)
        # whether other tuners' adapters are merged into the same weight, over what this layer wrote
        self.others_merged = False

    def get_base_layer(self) -> Any:
        """The layer that is adapted, inside other tuners' layers too; PEFT's own walk is slow for every forward."""
        base: Any = self._modules["base_layer"]
        return base.get_base_layer() if isinstance(base, BaseTunerLayer) else base

    @property
    def storage(self) -> Storage:
        """How the base weight is stored."""
        raise NotImplementedError

    def _present(self, names: Sequence[str]) -> list[str]:
        raise NotImplementedError

    def _factors(self, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _effective_weight(self, W0: Tensor, A: Tensor, B: Tensor) -> Tensor:
        raise NotImplementedError

    def _applied(self) -> list[str]:
        """The adapters with which a forward forms W' of W0; none where the base layer's present weight will do.

        Merged adapters act through the weight. Where only some of the active ones are merged, all of both act on W0.
        """
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return []
        active = self._present(self.active_adapters)
        if self._record is None:
            return active
        if all(name in self.merged_adapters for name in active):
            return []
        self._settle(by_value=False)  # which forgets the merge if the base weight was replaced
        return [*self.merged_adapters, *(name for name in active if name not in self.merged_adapters)]

    def keep_original(self) -> None:
        """Have other tuners merge into a copy of W0, so that adapters that are not merged go on acting on W0."""
        if self._record is None:
            original = self.storage.snapshot()
            self._write_merged([], original)
            self._record = self._recorded(original, [])

    def _read_original(self) -> Tensor:
        """W0, dense, whether adapters are merged or not."""
        return self.storage.read() if self._record is None else self._read_record()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _read_record(self) -> Tensor:
        with self.holding_W0():
            return self.storage.read()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put W', formed as the forward forms it, in the place of the base weight, and keep W0 to restore it.

        Args:
            safe_merge: check that W' is finite before anything is changed.
            adapter_names: the adapters to merge; the active ones by default. Adapters that are merged already stay
                merged: W' is formed anew from W0 with all of them.

        Raises:
            HiraError: with `safe_merge`, W' is not finite; nothing is changed.
        """
        self._settle()
        names = self._names_to_merge(adapter_names)
        if not names:
            return
        if safe_merge:
            self.check_merge(names)
        original = self._record.original if self._record else self.storage.snapshot()
        factors = self._copies([*self.merged_adapters, *names])
        self._write_merged(factors, original)
        self._record = self._recorded(original, factors)
        self.merged_adapters.extend(names)
        self.merged_scaling.update({name: self.scaling[name] for name in names})

    def unmerge(self) -> None:
        """Put W0 back, bit for bit. A base weight that was loaded while merged is kept instead, as the new W0."""
        if self._record is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._settle()
        if self._record is not None:
            self.storage.restore(self._record.original)
        self._forget_merge()

    @contextmanager
    def holding_W0(self) -> Iterator[None]:
        """Have the base layer hold W0 in the body, merged or not, as a checkpoint that has A and B has to."""
        self._settle(by_value=False)
        storage = self.storage
        with exclusive(storage.layer):
            record = self._record
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
                self._record = record._replace(written=written, version=version)

    def check_merge(self, adapter_names: list[str] | None = None) -> None:
        """Raise a HiraError if merging some adapters would give a weight that is not finite; changes no weight."""
        self._settle()
        names = self._present(self.active_adapters if adapter_names is None else adapter_names)
        new = [name for name in names if name not in self.merged_adapters]
        if new and not self._merges_finite([*self.merged_adapters, *new]):
            raise HiraError(
                f"NaNs detected in the merged weights. The adapter {','.join(new)} seems to be broken: W0 * (1 + BA) "
                f"of {self.name or 'this layer'} would not be finite. Nothing was changed."
            )

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the base layer, merged if asked for, without keeping a copy of W0; PEFT calls this to unload."""
        self._settle()
        names = self._names_to_merge(adapter_names) if merge else []
        if names:
            if safe_merge:
                self.check_merge(names)
            original = self._record.original if self._record else self.storage.snapshot()
            self._write_merged(self._copies([*self.merged_adapters, *names]), original)
        self._forget_merge()
        base: nn.Module = self.get_base_layer()
        return base

    def _names_to_merge(self, adapter_names: list[str] | None) -> list[str]:
        return self._present(check_adapters_to_merge(self, adapter_names))

    def _write_merged(self, factors: Sequence[Tensor], original: Any) -> None:
        """Write W' for A and B, or W0 for none, over the original weight, or leave the present one if that fails."""
        storage, present = self.storage, self.storage.snapshot()
        try:
            storage.restore(original)
            # what is written in inference mode could not be trained on or versioned after it
            with torch.inference_mode(False), torch.no_grad():
                W0 = storage.read()
                storage.write(self._effective_weight(W0, *factors) if factors else W0.clone())
        except BaseException:
            storage.restore(present)
            raise

    def _merges_finite(self, names: list[str]) -> bool:
        storage, present = self.storage, self.storage.snapshot()
        try:
            if self._record is not None:
                storage.restore(self._record.original)
            with torch.no_grad():
                weight = self._effective_weight(storage.read(), *self._factors(names))
            return bool(torch.isfinite(weight).all())
        finally:
            storage.restore(present)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _settle(self, *, by_value: bool = True) -> None:
        """Find out whether the base weight was replaced while merged: W0, as a state dict has it, is merged into again.

        Another weight is the new W0, and nothing is merged. What is written through ``.data`` is seen by value alone.
        """
        self.storage.check_here()
        if self._record is not None:
            with exclusive(self.storage.layer):
                self._settle_merged(by_value)

    def _settle_merged(self, by_value: bool) -> None:
        record, storage = self._record, self.storage
        if record is None:  # another thread unmerged meanwhile
            return
        written, version = storage.identity()
        if written is record.written and version == record.version:
            shared = self.others_merged or isinstance(self.base_layer, BaseTunerLayer)  # others add to what was written
            if not by_value or shared or record.fingerprint is None:
                return
            weight = storage.read()
            if _kind(weight) != record.kind or _fingerprint(weight) == record.fingerprint:
                return
        present, found = storage.snapshot(), storage.read()
        storage.restore(record.original)
        is_original = torch.equal(storage.read(), found)
        storage.restore(present)
        factors = self._copies(self.merged_adapters) if is_original else [f.to(found.device) for f in record.factors]
        self._write_merged(factors, record.original)
        written = storage.read()
        # what was written may have been cast back and forth since
        if is_original or any(torch.equal(written.to(dtype).to(found.dtype), found) for dtype in DENSE_DTYPES):
            self._record = self._recorded(record.original, factors)
        else:
            storage.restore(present)
            warnings.warn(
                f"The base weight of {self.name or 'a layer'} was replaced while {self.merged_adapters} were merged; "
                "it is kept, and the adapters count as unmerged.",
                stacklevel=4,
            )
            self._forget_merge()

    def _copies(self, names: list[str]) -> list[Tensor]:
        """A and B of some adapters, joined, as they are now; nothing for no adapter."""
        with torch.inference_mode(False), torch.no_grad():
            return [factor.clone() for factor in self._factors(names)] if names else []

    def _recorded(self, original: Any, factors: list[Tensor]) -> _Record:
        storage = self.storage
        weight = storage.read()
        fingerprint = _fingerprint(weight) if storage.takes_dense else None
        return _Record(original, *storage.identity(), _kind(weight), fingerprint, factors)

    def _forget_merge(self) -> None:
        self._record = None
        self.others_merged = False
        self.merged_adapters.clear()
        self.merged_scaling.clear()


def _settle_after_loading(layer: MergeableLayer, _: Any) -> None:
    if layer.merged:
        layer._settle()


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
