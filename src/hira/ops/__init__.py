"""Pure tensor functions: the mathematics of HiRA, without modules, PEFT or transformers."""

from hira.ops.conv import conv
from hira.ops.each import linear_each
from hira.ops.embedding import embedding
from hira.ops.linear import linear
from hira.ops.modulate import modulated_weight

__all__ = ["conv", "embedding", "linear", "linear_each", "modulated_weight"]
