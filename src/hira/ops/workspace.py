"""Memory for W' and its gradient, a block at a time."""

from __future__ import annotations

import threading
from functools import partial

import torch
from torch import Tensor

from hira.ops import heuristics


def formation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which 1 + BA is formed and multiplied with W0: float64 for a float64 weight, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_concrete(tensor: Tensor) -> bool:
    """Whether a tensor has memory of its own here: it is of no subclass, and not a stand-in while code is traced."""
    return type(tensor.detach()) is Tensor and not torch.compiler.is_compiling()


class _Scratch(threading.local):
    """The memory of a thread for blocks on a CPU, at most a block for each dtype; kept, as fresh pages are slow."""

    def __init__(self) -> None:
        self.buffers: dict[torch.dtype, Tensor] = {}

    def take(self, entries: int, dtype: torch.dtype) -> Tensor:
        buffer = self.buffers.pop(dtype, None)
        if buffer is None or buffer.numel() < entries:
            with torch.inference_mode(False):  # an inference tensor could not be written to in training
                buffer = torch.empty(entries, dtype=dtype, device="cpu")
        return buffer

    def give(self, buffer: Tensor) -> None:
        self.buffers[buffer.dtype] = buffer


scratch = _Scratch()


class Workspace:
    """Memory for one block of W' or of its gradient at a time, for one pass over all blocks.

    It is taken where it is first asked for, so that kernels, which form W' in memory of its own, cost no other. On a
    CPU it is the thread's own, kept from pass to pass. A pass that begins within another, as in a mode of PyTorch
    that watches operations, gets memory of its own.

    Args:
        W0: (out, in), the weight that is split into blocks.
        dtype: that of the products with W'.
    """

    def __init__(self, W0: Tensor, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._formation = formation_dtype(W0.dtype)
        self._taken: dict[torch.dtype, Tensor] = {}
        limit = heuristics.block_entries(W0.device)
        self._entries = min(W0.numel(), max(limit, *W0.shape))
        self._kept = heuristics.on_cpu(W0.device) and self._entries <= limit and is_concrete(W0)
        self._take = scratch.take if self._kept else partial(_fresh, W0)

    def __del__(self) -> None:
        if self._kept:
            for memory in self._taken.values():
                scratch.give(memory)

    def _memory(self, dtype: torch.dtype) -> Tensor:
        if dtype not in self._taken:
            self._taken[dtype] = self._take(self._entries, dtype)
        return self._taken[dtype]

    def exact(self, like: Tensor) -> Tensor:
        """A tensor in the dtype of formation, with the shape and memory layout of ``like`` (rows, columns)."""
        return _laid_out(self._memory(self._formation), like)

    def rounded(self, like: Tensor) -> Tensor:
        """The same in the dtype of the products; where the dtypes agree it is the same memory."""
        return _laid_out(self._memory(self.dtype), like)


def _fresh(W0: Tensor, entries: int, dtype: torch.dtype) -> Tensor:
    return W0.new_empty(entries, dtype=dtype)


def _laid_out(memory: Tensor, like: Tensor) -> Tensor:
    # the weight of a transformers `Conv1D`, seen as (out, in), lies in memory as (in, out)
    if like.stride(0) < like.stride(1):
        return memory[: like.numel()].view(like.shape[1], like.shape[0]).t()
    return memory[: like.numel()].view(like.shape)
