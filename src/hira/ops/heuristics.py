"""Which way a product takes, decided from sizes and devices, here and nowhere else.

The measurements behind the numbers are in docs/architecture.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Entries of one block of W'. On a CPU 16 MiB of float32: products over less than that run slower. Elsewhere launches
# cost more than memory traffic, so blocks are larger.
CPU_BLOCK_ENTRIES = 1 << 22
DEVICE_BLOCK_ENTRIES = 1 << 25
# Entries that several elementwise operations go over at a time on a CPU: what is between them stays in its cache.
CPU_CHUNK_ENTRIES = 1 << 18

# Numbers of tokens for which W' x^T is faster on a CPU than x W'^T, though y is then transposed.
TRANSPOSED_TOKENS = range(8, 33)

# The most tokens that the Triton kernel for decoding takes.
DECODED_TOKENS = 16

# Whether Triton kernels serve on CUDA: "0" for never, "1" for always, "auto" where `kernel_choice` finds them right and
# faster than PyTorch on the device at hand.
TRITON: str = os.environ.get("HIRA_TRITON", "auto")
_HAS_TRITON = find_spec("triton") is not None

HALF = (torch.bfloat16, torch.float16)
DITHER = True

_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)  # torch 2.7
_is_transformed = torch._C._are_functorch_transforms_active
_is_batch = torch._C._functorch.is_legacy_batchedtensor  # of is_grads_batched
_mode, _PROXY = torch._C._get_dispatch_mode, torch._C._TorchDispatchModeKey.PROXY
_tracing_state = torch._C._get_tracing_state


def on_cpu(device: torch.device) -> bool:
    """Whether a device is a CPU; every way that is a CPU's asks here, so that a test can have the others on one."""
    return device.type == "cpu"


def plain() -> bool:
    """Whether operators have to consist of plain PyTorch operations, because something looks into them here.

    That is so in the transforms of `torch.func`, forward-mode differentiation, `torch.export`, `torch.jit.trace` and
    `make_fx`. `torch.compile` has opaque operators instead.
    """
    if torch.compiler.is_compiling():
        return _is_exporting() or _is_transformed()
    return (
        _is_transformed() or _tracing_state() is not None or forward_ad._current_level >= 0 or _mode(_PROXY) is not None
    )


def plain_backward(dy: Tensor) -> bool:
    """The same of the backward pass for dy, which has to be plain also where it is differentiated, or dy is a batch."""
    if torch.compiler.is_compiling():
        return plain()
    return torch.is_grad_enabled() or _is_batch(dy) or plain()


def block_entries(device: torch.device) -> int:
    """The number of entries that a block may have."""
    return CPU_BLOCK_ENTRIES if on_cpu(device) else DEVICE_BLOCK_ENTRIES


def is_small(W0: Tensor) -> bool:
    """Whether W' is formed whole in memory of its own: on a CPU, where the allocator has that much at hand."""
    limit = block_entries(W0.device)
    return W0.numel() <= (min(CPU_CHUNK_ENTRIES, limit) if on_cpu(W0.device) else limit)


def chunks(matrix: Tensor) -> Iterator[slice]:
    """Split the rows of a matrix for a series of elementwise operations."""
    rows, columns = matrix.shape
    step = max(1, CPU_CHUNK_ENTRIES // max(columns, 1)) if on_cpu(matrix.device) else max(rows, 1)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


@contextmanager
def one_thread() -> Iterator[None]:
    """Have operations on a CPU run in this thread alone; threads that begin meanwhile may be given one thread too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def transposed(x: Tensor) -> bool:
    """Whether y (T, out) for x (T, in) is computed as the transpose of ``W' x^T``."""
    return on_cpu(x.device) and x.dtype == torch.float32 and x.shape[0] in TRANSPOSED_TOKENS


def dithers(stored: torch.dtype, product: torch.dtype) -> bool:
    """Whether W' is rounded with a dither: where W0 has few bits, so that its own do not spread the rounding."""
    return DITHER and product in HALF and stored in HALF


def int8(x: Tensor, out_features: int) -> bool:
    """Whether G (out, in) for x (..., in) can be computed in 8 bits, as far as the integer product goes.

    On CUDA it takes more than 16 rows and sizes that 8 divides; on a CPU torch 2.13 gets single rows and columns wrong.
    """
    in_features = x.shape[-1]
    if x.device.type == "cuda":
        tokens = x.numel() // max(in_features, 1)
        return out_features > 16 and in_features % 8 == 0 and tokens % 8 == 0
    return x.device.type == "cpu" and min(out_features, in_features) > 1


def groups(x: Tensor, experts: int) -> bool:
    """Whether the products of all experts for x (T, in) are one grouped product, for which all weights are formed.

    On an accelerator, where a look at each expert's number of rows would make the host wait; with fewer rows than
    experts, most of which have none then, it costs less to wait.
    """
    return stacks(x) and len(x) >= experts and not plain()


def stacks(tensor: Tensor) -> bool:
    """Whether W' of all experts is formed at once, for a grouped product and for a merge: on an accelerator."""
    return not on_cpu(tensor.device)


def keeps_weight(x: Tensor) -> bool:
    """Whether a layer that generates keeps W' for the next forward: on a CPU."""
    return on_cpu(x.device)


def is_capturing(device: torch.device) -> bool:
    """Whether what runs on a device is captured in a CUDA graph, which will repeat it without running this code."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def triton(tensor: Tensor) -> bool:
    """Whether Triton kernels may form W' and reduce its gradient: on CUDA, but for HIRA_TRITON=0 in the environment."""
    return tensor.is_cuda and TRITON != "0" and _HAS_TRITON and tensor.dtype != torch.float64


def decodes(x: Tensor) -> bool:
    """Whether the product for x (T, in) is one kernel that reads W0 once and forms no W', in inference."""
    return 0 < x.shape[0] <= DECODED_TOKENS and triton(x)


def describe(device: torch.device) -> dict[str, str]:
    """The paths that operators take on a device, in words."""
    kernels = {
        "0": "off, by HIRA_TRITON=0 in the environment",
        "1": "on, by HIRA_TRITON=1 in the environment, unchecked",
    }.get(TRITON, "where they are right and faster than PyTorch, which is found out at their first use")
    kernels = kernels if device.type == "cuda" else "none: they serve CUDA alone"
    few = "formed each time" if not on_cpu(device) else "kept by hira.inference_cache in generate()"
    return {
        "linear": f"one product with W', formed in blocks of {block_entries(device):,} entries",
        "decoding": f"W' is {few}; tokens with an adapter each share one product",
        "embedding": "the rows that are looked up",
        "convolution": "one convolution with W', formed whole",
        "half precision": f"W' is rounded {'with a dither' if DITHER else 'to nearest'}, once",
        "Triton kernels": kernels,
        "torch.compile": "opaque operators for linear products and kernels of convolutions, the rest is traced",
        "torch.func, torch.export, second derivatives": "plain operations, with W' formed whole",
    }
