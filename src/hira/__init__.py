"""HiRA (Hadamard High-Rank Adaptation) for PEFT, at LoRA's price. Importing this package registers it with PEFT."""

from hira.attention import MultiheadAttention
from hira.bnb import Linear4bit, Linear8bitLt, dispatch_bnb_4bit, dispatch_bnb_8bit
from hira.checkpoint.convert import convert_adapter
from hira.checkpoint.inspection import inspect_adapter
from hira.checkpoint.manifest import verify as verify_folder
from hira.checkpoint.merge import merge_checkpoint
from hira.config import HiraConfig
from hira.dispatch import dispatch_default
from hira.errors import HiraError
from hira.experts import ParamWrapper
from hira.inference_cache import inference_cache
from hira.layer import Conv1d, Conv2d, Conv3d, ConvNd, Embedding, HiraLayer, Linear
from hira.model import HiraModel
from hira.registration import is_registered, register, unregister
from hira.version import __version__ as __version__

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvNd",
    "Embedding",
    "HiraConfig",
    "HiraError",
    "HiraLayer",
    "HiraModel",
    "Linear",
    "Linear4bit",
    "Linear8bitLt",
    "MultiheadAttention",
    "ParamWrapper",
    "convert_adapter",
    "dispatch_bnb_4bit",
    "dispatch_bnb_8bit",
    "dispatch_default",
    "inference_cache",
    "inspect_adapter",
    "is_registered",
    "merge_checkpoint",
    "register",
    "unregister",
    "verify_folder",
]

register()
