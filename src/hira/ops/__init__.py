"""Pure tensor functions: the mathematics of HiRA, without modules, PEFT or transformers."""

from hira.ops.conv import conv
from hira.ops.effective_weight import modulated_weight
from hira.ops.embedding import embedding
from hira.ops.linear import linear
from hira.ops.mixed_batch import linear_each

__all__ = ["conv", "embedding", "linear", "linear_each", "modulated_weight"]
