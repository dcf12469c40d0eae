"""Hot-swapping by PEFT's functions and by transformers' `load_adapter`, which know LoRA alone."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import peft.utils.hotswap
from peft import PeftConfig
from peft.utils import PeftType
from peft.utils.save_and_load import load_peft_weights
from torch import nn

from hira.errors import HiraError
from hira.layers.base import HiraLayer
from hira.tuner.hot_swapping import pad_adapters, swap
from hira.tuner.model import hira_layers


def swapping(swap_lora: Callable[..., None]) -> Callable[..., None]:
    """Make `hotswap_adapter_from_state_dict` swap HiRA adapters."""

    @functools.wraps(swap_lora)
    def wrapper(model: Any, state_dict: Any, adapter_name: str, config: Any, *args: Any, **kwargs: Any) -> None:
        if config.peft_type == PeftType.HIRA:
            swap(model, adapter_name, config, state_dict)
        else:
            swap_lora(model, state_dict, adapter_name, config, *args, **kwargs)

    return wrapper


def finding_layers(convert_scalings: Callable[[nn.Module], bool]) -> Callable[[nn.Module], bool]:
    """Make `prepare_model_for_compiled_hotswap` find HiRA's layers, whose scales stay what they are."""

    @functools.wraps(convert_scalings)
    def wrapper(model: nn.Module) -> bool:
        return convert_scalings(model) or bool(hira_layers(model))

    return wrapper


def padding(pad_lora: Callable[..., bool]) -> Callable[..., bool]:
    """Make `prepare_model_for_compiled_hotswap` pad HiRA adapters too."""

    @functools.wraps(pad_lora)
    def wrapper(model: nn.Module, target_rank: int) -> bool:
        found = pad_adapters(model, target_rank)
        return pad_lora(model, target_rank=target_rank) or found

    return wrapper


def swapping_in_transformers(load_adapter: Callable[..., Any]) -> Callable[..., Any]:
    """Make a transformers model's `load_adapter` swap HiRA adapters, and pad the first after `enable_peft_hotswap`."""
    signature = inspect.signature(load_adapter)

    @functools.wraps(load_adapter)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        options = {**given.arguments, **given.arguments.get("kwargs", {})}
        name = options["adapter_name"] or "default"
        configs = getattr(self, "peft_config", {}) if self._hf_peft_config_loaded else {}
        hotswap = options["hotswap"]
        if hotswap == "auto":
            hotswap = getattr(self, "_hotswap_enabled", False) and name in configs
        if hotswap and name in configs and configs[name].peft_type == PeftType.HIRA:
            return _swap_loaded(self, name, options)
        result = load_adapter(self, *args, **kwargs)
        prepare = getattr(self, "_prepare_peft_hotswap_kwargs", None)
        if prepare is not None and hira_layers(self):
            peft.utils.hotswap.prepare_model_for_compiled_hotswap(self, **prepare)
            self._prepare_peft_hotswap_kwargs = None
        return result

    return wrapper


def _swap_loaded(model: Any, adapter_name: str, options: dict[str, Any]) -> Any:
    """Load an adapter as transformers does, and swap it for one of the model's."""
    where = {**options, **(options.get("adapter_kwargs") or {})}
    names = ("revision", "cache_dir", "subfolder", "token", "local_files_only")
    where = {key: where[key] for key in names if where.get(key)}
    config, state_dict, source = options["peft_config"], options["adapter_state_dict"], options["peft_model_id"]
    if source is None and (config is None or state_dict is None):
        raise HiraError("Pass peft_model_id, or peft_config and adapter_state_dict, for the adapter to swap in.")
    if config is None:
        config = PeftConfig.from_pretrained(source, **where)
    if state_dict is None:
        state_dict = load_peft_weights(source, device="cpu", **where)
    swap(model, adapter_name, config, state_dict)
    if not options["is_trainable"]:
        model.eval()
        for layer in model.modules():
            if isinstance(layer, HiraLayer):
                layer.requires_grad_(False)
    report = sys.modules.get("transformers.utils.loading_report")  # not in transformers 4
    return None if report is None else _nothing_missing(report.LoadStateDictInfo)


def _nothing_missing(info: Any) -> Any:
    empty: dict[str, Callable[[], Any]] = {"error_msgs": list, "conversion_errors": dict}
    return info(**{field.name: empty.get(field.name, set)() for field in dataclasses.fields(info)})
