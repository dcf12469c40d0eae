"""HiRA (Hadamard High-Rank Adaptation) for PEFT, at LoRA's price.

Importing this package makes PEFT use it: at once where PEFT is imported already, else as soon as it is. The names below
are imported at their first use, so that what needs no PEFT, such as the commands for files, does not wait for it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hira import peft_hook
from hira.errors import HiraError
from hira.version import __version__ as __version__

if TYPE_CHECKING:
    from hira.config.hira_config import HiraConfig
    from hira.files.convert.convert_adapter import convert_adapter
    from hira.files.inspect.inspect_adapter import inspect_adapter
    from hira.files.io.manifest import verify as verify_folder
    from hira.files.merge.merge_checkpoint import merge_checkpoint
    from hira.layers.attention import MultiheadAttention
    from hira.layers.base import HiraLayer
    from hira.layers.bitsandbytes import Linear4bit, Linear8bitLt, dispatch_bnb_4bit, dispatch_bnb_8bit
    from hira.layers.conv import Conv1d, Conv2d, Conv3d, ConvNd
    from hira.layers.dispatch import dispatch_default
    from hira.layers.embedding import Embedding
    from hira.layers.experts import ParamWrapper
    from hira.layers.inference_cache import inference_cache
    from hira.layers.linear import Linear
    from hira.peft_integration.registration import is_registered, register, unregister
    from hira.training.callback import HiraCallback
    from hira.training.learning_rate import check_learning_rate
    from hira.tuner.model import HiraModel

_HOMES = {
    "Conv1d": "hira.layers.conv",
    "Conv2d": "hira.layers.conv",
    "Conv3d": "hira.layers.conv",
    "ConvNd": "hira.layers.conv",
    "Embedding": "hira.layers.embedding",
    "HiraCallback": "hira.training.callback",
    "HiraConfig": "hira.config",
    "HiraLayer": "hira.layers.base",
    "HiraModel": "hira.tuner.model",
    "Linear": "hira.layers.linear",
    "Linear4bit": "hira.layers.bitsandbytes",
    "Linear8bitLt": "hira.layers.bitsandbytes",
    "MultiheadAttention": "hira.layers.attention",
    "ParamWrapper": "hira.layers.experts",
    "check_learning_rate": "hira.training.learning_rate",
    "convert_adapter": "hira.files.convert.convert_adapter",
    "dispatch_bnb_4bit": "hira.layers.bitsandbytes",
    "dispatch_bnb_8bit": "hira.layers.bitsandbytes",
    "dispatch_default": "hira.layers.dispatch",
    "inference_cache": "hira.layers.inference_cache",
    "inspect_adapter": "hira.files.inspect.inspect_adapter",
    "is_registered": "hira.peft_integration.registration",
    "merge_checkpoint": "hira.files.merge.merge_checkpoint",
    "register": "hira.peft_integration.registration",
    "unregister": "hira.peft_integration.registration",
    "verify_folder": "hira.files.io.manifest",
}
__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvNd",
    "Embedding",
    "HiraCallback",
    "HiraConfig",
    "HiraError",
    "HiraLayer",
    "HiraModel",
    "Linear",
    "Linear4bit",
    "Linear8bitLt",
    "MultiheadAttention",
    "ParamWrapper",
    "check_learning_rate",
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


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hira' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), "verify" if name == "verify_folder" else name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


peft_hook.install()
