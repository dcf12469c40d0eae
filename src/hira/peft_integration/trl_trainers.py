"""What the constructors of TRL's trainers do to adapters by the names of LoRA's parameters, done for HiRA's."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import nn

from hira.tuner.model import hira_layers


def copying_reference_adapter(add_adapter: Callable[..., Any]) -> Callable[..., Any]:
    """Make `PeftModel.add_adapter` copy A, B and trainable tokens into the reference adapter of TRL's trainers.

    The trainers add it with the configuration of the adapter that trains, and then copy each parameter with ".default."
    in its name. The names of HiRA's parameters end in ".default", as in PEFT.
    """

    @functools.wraps(add_adapter)
    def wrapper(self: Any, adapter_name: str, peft_config: Any, *args: Any, **kwargs: Any) -> Any:
        given = next((name for name, config in self.peft_config.items() if config is peft_config), None)
        added = add_adapter(self, adapter_name, peft_config, *args, **kwargs)
        if given is not None and _is_of_trl(sys._getframe(1)):
            for layer in hira_layers(self):
                layer.copy_adapter(given, adapter_name)
            for module in self.modules():
                if isinstance(module, TrainableTokensLayer) and given in module.trainable_tokens_delta:
                    module.trainable_tokens_delta[adapter_name].data.copy_(module.trainable_tokens_delta[given].data)
        return added

    return wrapper


def keeping_float32(named_parameters: Callable[..., Any]) -> Callable[..., Any]:
    """Make `PeftModel.named_parameters` leave out A and B where the constructor of a trainer of TRL asks.

    Where W0 has 4 or 8 bits it asks for what to cast to bfloat16, in which small steps of A and B are lost
    (docs/learning_rate.md). FSDP and DeepSpeed take one dtype for what trains: there nothing is left out.
    """

    @functools.wraps(named_parameters)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        found: Iterator[tuple[str, nn.Parameter]] = named_parameters(self, *args, **kwargs)
        caller = sys._getframe(1)
        arguments = caller.f_locals.get("args") if caller.f_code.co_name == "__init__" and _is_of_trl(caller) else None
        if arguments is None or _is_sharded(arguments):
            return found
        dicts = [getattr(layer, name) for layer in hira_layers(self) for name in layer.adapter_layer_names]
        factors = {id(parameter) for values in dicts for parameter in values.values()}
        return ((name, parameter) for name, parameter in found if id(parameter) not in factors)

    return wrapper


def _is_of_trl(caller: FrameType) -> bool:
    module = caller.f_globals.get("__name__")
    return isinstance(module, str) and module.startswith("trl.")


def _is_sharded(args: Any) -> bool:
    """Whether a trainer with these arguments runs FSDP or DeepSpeed."""
    from accelerate.utils import parse_flag_from_env

    return bool(args.fsdp or args.deepspeed_plugin) or parse_flag_from_env("ACCELERATE_USE_FSDP")
