"""W' formed again in backward instead of saved, for products with it that are not this package's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hira.ops import heuristics
from hira.ops.effective_weight import form, modulated_weight

_AUTOGRAD: Any = torch._C._autograd  # PyTorch has no public way to ask for the hooks in use


class Formed(NamedTuple):
    """W' and what it was formed from."""

    weight: Tensor  # (out, in)
    sources: tuple[Tensor, Tensor, Tensor, int]  # W0 (out, in), A (r + lora_r, in), B (out, r + lora_r), lora_r


class _Recipe(NamedTuple):
    """How to form a view of W' again, and the versions of W0, A and B that it takes."""

    sources: tuple[Tensor, Tensor, Tensor, int]
    versions: list[int]
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: Any

    def follow(self) -> Tensor:
        if _versions(self.sources) != self.versions:
            raise RuntimeError(
                "W' cannot be formed for backward: its W0, A or B has been modified by an inplace operation since the "
                "forward."
            )
        return form(*self.sources, self.dtype).as_strided(self.size, self.stride, self.offset)


def formed(W0: Tensor, A: Tensor, B: Tensor, lora_r: int = 0, dtype: torch.dtype | None = None) -> Formed:
    """Form W' as `modulated_weight` does, for `recomputed`; arguments are those of that function."""
    return Formed(modulated_weight(W0, A, B, lora_r, dtype), (W0, A, B, lora_r))


@contextmanager
def recomputed(*weights: Formed) -> Iterator[None]:
    """Keep W0, A and B where autograd would keep one of some W', or a view of it; backward forms that W' again.

    Each product whose backward needs a W' forms it whole once more: 2 r m n operations for an m by n weight.

    PyTorch asks the innermost saved-tensor hooks alone. What is not of a W' is therefore handed on to the hooks
    outside, such as those of a checkpoint or of `save_on_cpu`, which treat it as they would have. Where that cannot be,
    W' is kept as usual: before PyTorch 2.8, under `torch.compile`, and where `heuristics.plain` says so.

    Args:
        *weights: the W', from `formed`. None of them may be changed in place.
    """
    if (
        not (weights and torch.is_grad_enabled())
        or torch.compiler.is_compiling()
        or heuristics.plain()
        or not _can_nest()
    ):
        yield
        return
    by_storage = {_storage(weight.weight): weight.sources for weight in weights}
    hooks_outside: Any = _AUTOGRAD._top_saved_tensors_default_hooks(False)
    pack_outside, unpack_outside = hooks_outside or (None, None)

    def pack(tensor: Tensor) -> Any:
        sources = by_storage.get(_storage(tensor))
        if sources is None:
            return tensor if pack_outside is None else pack_outside(tensor)
        return _Recipe(
            sources,
            _versions(sources),
            tensor.dtype,
            tensor.size(),
            tensor.stride(),
            tensor.storage_offset(),
        )

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, _Recipe):
            return packed.follow()
        tensor: Tensor = packed if unpack_outside is None else unpack_outside(packed)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _can_nest() -> bool:
    """Whether hooks are allowed here, and this PyTorch tells which are in use."""
    known = hasattr(_AUTOGRAD, "_top_saved_tensors_default_hooks")
    return known and bool(_AUTOGRAD._saved_tensors_hooks_is_enabled())


def _versions(sources: tuple[Tensor, Tensor, Tensor, int]) -> list[int]:
    W0, A, B, _ = sources
    return [W0._version, A._version, B._version]


def _storage(tensor: Tensor) -> int:
    """The identity of a tensor's storage, on every device."""
    identity: int = tensor.untyped_storage()._cdata
    return identity
