"""Triton kernels for W', the gradients of A and B, and products with few tokens. Importing this imports triton.

They compute in float32, for weights of at most 32 bits. On CPU tensors they run where the environment variable
TRITON_INTERPRET was 1 before triton was first imported.
"""

from triton import __version__ as triton_version

from hira.ops.triton.decode import decode
from hira.ops.triton.factor_gradients import factor_gradients
from hira.ops.triton.form import form

__all__ = ["decode", "factor_gradients", "form", "triton_version"]
