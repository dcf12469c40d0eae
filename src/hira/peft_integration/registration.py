"""Replaces PEFT's own HiRA by this package's, and undoes it; only this file changes PEFT's registries and modules."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager, nullcontext
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, Union

import peft
import peft.functional
import peft.helpers
import peft.mapping
import peft.mixed_model
import peft.optimizers.lorafa
import peft.optimizers.loraplus
import peft.peft_model
import peft.tuners
import peft.tuners.hira
import peft.tuners.mixed
import peft.tuners.mixed.model
import peft.tuners.tuners_utils
import peft.tuners.xlora.model
import peft.utils.hotswap
import peft.utils.save_and_load
from huggingface_hub import ModelCard
from peft.utils import PeftType
from torch import nn
from transformers import GenerationMixin
from transformers.integrations.peft import PeftAdapterMixin

from hira.base_weights.offloaded import device_map_hidden
from hira.config import hira_config as config_module
from hira.config.hira_config import HiraConfig
from hira.files.io.recognise import PEFT_TYPES
from hira.layers import bitsandbytes, dispatch
from hira.layers.alpha_scale import takes_files_as_they_are
from hira.layers.base import HiraLayer
from hira.layers.embedding import Embedding
from hira.layers.inference_cache import inference_cache
from hira.peft_integration.hotswap import finding_layers, padding, swapping, swapping_in_transformers
from hira.peft_integration.optimizers import lorafa, loraplus, riemannian_pairs
from hira.peft_integration.trl_trainers import copying_reference_adapter, keeping_float32
from hira.tuner import model as model_module
from hira.tuner.mixed_model import HiraMixedModel
from hira.tuner.model import HiraModel, check_new_name, hira_layers
from hira.tuner.state_dicts import loading, saving
from hira.tuner.transaction import unchanged_on_error
from hira.version import __version__

# the name of PEFT's own HiRA while this package is registered, for imports and for pickles
STOCK_NAME = "peft.tuners.hira_stock"
# the modules of PEFT's own HiRA, and what replaces them
_MODULES = {
    "config": config_module,
    "layer": sys.modules["hira"],
    "model": model_module,
    "bnb": bitsandbytes,
    "dispatch": dispatch,
}
_MISSING = object()
_undo: list[Callable[[], None]] = []


def register() -> None:
    """Make PEFT use this package's HiRA: its type HIRA, its names, its mixed models, its loading. Safe to repeat."""
    if _undo:
        return
    try:
        for target, name, value in _replacements():
            _replace(target, name, value)
    except BaseException:
        unregister()
        raise


def unregister() -> None:
    """Restore PEFT's own HiRA. Models that have this package's layers keep them. Safe to repeat."""
    while _undo:
        _undo.pop()()


def is_registered() -> bool:
    """Whether PEFT uses this package's HiRA now."""
    return bool(_undo)


def _replacements() -> Iterator[tuple[Any, str | PeftType, Any]]:
    for saved_type in PEFT_TYPES:
        yield peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING, saved_type, HiraConfig
    yield peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING, PeftType.HIRA, HiraModel
    yield peft.mapping.PEFT_TYPE_TO_MIXED_MODEL_MAPPING, PeftType.HIRA, HiraModel
    yield peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING, PeftType.HIRA, HiraModel.prefix

    stock_config, stock_model = peft.tuners.hira.HiraConfig, peft.tuners.hira.HiraModel
    yield stock_model, "inject_adapter", _refusing(stock_model.inject_adapter)
    yield from _marks_of_stock()
    for module in (peft, peft.tuners):
        yield module, "HiraConfig", HiraConfig
        yield module, "HiraModel", HiraModel

    package = _alias("peft.tuners.hira", sys.modules["hira"])
    package.__path__ = []
    yield sys.modules, "peft.tuners.hira", package
    yield peft.tuners, "hira", package
    for short, source in _MODULES.items():
        name = f"peft.tuners.hira.{short}"
        module = _alias(name, source)
        setattr(package, short, module)
        yield sys.modules, name, module

    mixed = peft.tuners.mixed.model
    compatible = (*mixed.COMPATIBLE_TUNER_TYPES, PeftType.HIRA)
    yield mixed, "COMPATIBLE_TUNER_TYPES", compatible
    yield peft.tuners.mixed, "COMPATIBLE_TUNER_TYPES", compatible
    yield mixed, "PREFIXES", [*mixed.PREFIXES, HiraModel.prefix]
    yield mixed, "Configs", Union[(*mixed.Configs.__args__, HiraConfig, stock_config)]
    yield mixed, "Layers", (*mixed.Layers, HiraLayer)
    for module in (mixed, peft.tuners.mixed, peft.tuners, peft.mixed_model):
        yield module, "MixedModel", HiraMixedModel

    tuners = peft.tuners.tuners_utils
    yield tuners, "onload_layer", _skipping_hira_layers(tuners.onload_layer)

    storing = peft.utils.save_and_load
    for module in (peft, peft.utils, storing, peft.peft_model, peft.functional, peft.tuners.xlora.model):
        for name, wrap in (("get_peft_model_state_dict", saving), ("set_peft_model_state_dict", loading)):
            if name in vars(module):
                yield module, name, wrap(vars(module)[name])

    # rescale_adapter_scale changes the scaling of these layers
    yield peft.helpers, "LoraLayer", (peft.helpers.LoraLayer, HiraLayer)
    optimizers = peft.optimizers
    # create_loraplus_optimizer has a rate of its own for these layers
    yield optimizers.loraplus, "Embedding", (optimizers.loraplus.Embedding, Embedding)
    for module in (optimizers, optimizers.loraplus):
        yield module, "create_loraplus_optimizer", loraplus(module.create_loraplus_optimizer)
    for module in (optimizers, optimizers.lorafa):
        yield module, "create_lorafa_optimizer", lorafa(module.create_lorafa_optimizer)
    riemannian = getattr(optimizers, "riemannian", None)  # not in PEFT 0.20
    if riemannian is not None:
        yield riemannian, "_collect_lora_pairs", riemannian_pairs(riemannian._collect_lora_pairs)

    hotswap = peft.utils.hotswap
    yield hotswap.CONFIG_KEYS_TO_CHECK, PeftType.HIRA, []  # checked as it is swapped
    yield hotswap, "hotswap_adapter_from_state_dict", swapping(hotswap.hotswap_adapter_from_state_dict)
    yield hotswap, "_convert_scalings_to_tensor", finding_layers(hotswap._convert_scalings_to_tensor)
    yield hotswap, "_pad_lora_weights", padding(hotswap._pad_lora_weights)

    yield peft.PeftModel, "add_adapter", copying_reference_adapter(peft.PeftModel.add_adapter)
    yield peft.PeftModel, "named_parameters", keeping_float32(peft.PeftModel.named_parameters)
    yield (
        peft.PeftModel,
        "create_or_update_model_card",
        _with_version_in_card(peft.PeftModel.create_or_update_model_card),
    )
    yield GenerationMixin, "generate", inference_cache.during(GenerationMixin.generate)
    load_adapter = _taking_files_as_they_are(PeftAdapterMixin.load_adapter)
    yield PeftAdapterMixin, "load_adapter", swapping_in_transformers(load_adapter)

    for model in (peft.PeftModel, peft.PeftMixedModel):
        yield model, "load_adapter", _all_or_nothing(model.__dict__["load_adapter"])
        yield model, "from_pretrained", _all_or_nothing_class(model.__dict__["from_pretrained"])


def _marks_of_stock() -> Iterator[tuple[Any, str, Any]]:
    """New names for PEFT's own classes; their layers print under them, and warn when they are run or saved."""
    warn = functools.cache(_warn_of_stock)
    for name, module in list(sys.modules.items()):
        if name != "peft.tuners.hira" and not name.startswith("peft.tuners.hira."):
            continue
        new_name = STOCK_NAME + name.removeprefix("peft.tuners.hira")
        yield sys.modules, new_name, module
        for stock in vars(module).values():
            if not isinstance(stock, type) or stock.__module__ != name:
                continue
            yield stock, "__module__", new_name
            if "__repr__" in vars(stock) and issubclass(stock, nn.Module):
                yield stock, "__repr__", _prefixed(stock.__repr__)
                yield stock, "forward", _warning(stock.forward, warn)
                yield stock, "_save_to_state_dict", _warning(stock._save_to_state_dict, warn)


def _prefixed(represent: Callable[[Any], str]) -> Callable[[Any], str]:
    return lambda self: f"peft.tuners.{represent(self)}"


def _warning(function: Callable[..., Any], warn: Callable[[], None]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        warn()
        return function(*args, **kwargs)

    return wrapper


def _warn_of_stock() -> None:
    warnings.warn(
        "A model has layers of PEFT's own HiRA, made before hira was imported: hira has no part in what it computes. "
        "Import hira before get_peft_model and from_pretrained; here, save the adapter, unload() the model and load it "
        "again. To go on with PEFT's layers, call hira.unregister().",
        stacklevel=3,
    )


def _with_version_in_card(create_or_update_model_card: Callable[..., None]) -> Callable[..., None]:
    """Make a model card name this package and its version where the model has its layers."""

    @functools.wraps(create_or_update_model_card)
    def wrapper(self: Any, output_dir: str) -> None:
        create_or_update_model_card(self, output_dir)
        if not hira_layers(self):
            return
        file = Path(output_dir, "README.md")
        card = ModelCard.load(file)
        card.data["tags"] = sorted({*(card.data.get("tags") or ()), "hira"})
        lines, line = card.text.splitlines(), f"- hira {__version__}"
        if line not in lines:
            lines.insert(lines.index(f"- PEFT {peft.__version__}") + 1, line)
        card.text = "\n".join(lines)
        card.save(file)

    return wrapper


def _replace(target: Any, name: Any, value: Any) -> None:
    """Set an attribute, or the entry of a mapping, and remember how to undo it."""
    if isinstance(target, MutableMapping):
        old = target.get(name, _MISSING)
        target[name] = value
        restore, remove = target.__setitem__, target.__delitem__
    else:
        old = vars(target).get(name, _MISSING)
        setattr(target, name, value)
        restore, remove = functools.partial(setattr, target), functools.partial(delattr, target)
    _undo.append(functools.partial(remove, name) if old is _MISSING else functools.partial(restore, name, old))


def _taking_files_as_they_are(load_adapter: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' `load_adapter`, which puts a file's tensors, B with its scale, into the layers itself."""

    @functools.wraps(load_adapter)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        token = takes_files_as_they_are.set(True)
        try:
            return load_adapter(self, *args, **kwargs)
        finally:
            takes_files_as_they_are.reset(token)

    return wrapper


def _alias(name: str, source: ModuleType) -> ModuleType:
    """A module of another name whose attributes are those of ``source``."""
    module = ModuleType(name, source.__doc__)
    module.__spec__ = ModuleSpec(name, None)
    module.__getattr__ = functools.partial(getattr, source)  # type: ignore[method-assign]
    module.__dir__ = functools.partial(dir, source)  # type: ignore[method-assign]
    return module


def _refusing(inject_adapter: Callable[..., Any]) -> Callable[..., Any]:
    """Make PEFT's own HiraModel refuse to add an adapter to its layers while this package is registered."""

    @functools.wraps(inject_adapter)
    def wrapper(self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        check_new_name(model, adapter_name, self.peft_config)
        return inject_adapter(self, model, adapter_name, *args, **kwargs)

    return wrapper


def _skipping_hira_layers(onload_layer: Callable[[nn.Module], AbstractContextManager[None]]) -> Callable[..., Any]:
    """Make PEFT's `onload_layer` skip HiRA layers, which load offloaded weights themselves."""

    @functools.wraps(onload_layer)
    def wrapper(layer: nn.Module) -> AbstractContextManager[None]:
        return nullcontext() if isinstance(layer, HiraLayer) else onload_layer(layer)

    return wrapper


def _is_placed_and_gets_hira(model: nn.Module, model_id: Any, options: dict[str, Any]) -> bool:
    """Whether a model that accelerate placed on several devices is about to get a HiRA adapter."""
    if not any("hf_device_map" in module.__dict__ for module in model.modules()):
        return False
    config = options.get("config")
    if config is not None:
        return bool(config.peft_type == PeftType.HIRA)
    where = ("subfolder", "revision", "cache_dir", "use_auth_token", "token")
    given = {name: options[name] for name in where if options.get(name) is not None}
    found = peft.PeftConfig._get_peft_type(model_id, **given)
    return found in PEFT_TYPES


def _all_or_nothing(load_adapter: Callable[..., Any]) -> Callable[..., Any]:
    """Make `PeftModel.load_adapter` remove a HiRA adapter that it could not load."""

    @functools.wraps(load_adapter)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        with (
            unchanged_on_error(self, only_if=hira_layers),
            device_map_hidden(self) if hira_layers(self) else nullcontext(),
        ):
            return load_adapter(self, *args, **kwargs)

    return wrapper


def _all_or_nothing_class(from_pretrained: Any) -> Any:
    """Make `PeftModel.from_pretrained` remove a HiRA adapter that it could not load from the base model."""
    function = from_pretrained.__func__

    @functools.wraps(function)
    def wrapper(cls: Any, model: nn.Module, model_id: Any, *args: Any, **kwargs: Any) -> Any:
        hidden = device_map_hidden(model) if _is_placed_and_gets_hira(model, model_id, kwargs) else nullcontext()
        with unchanged_on_error(model, only_if=hira_layers), hidden:
            return function(cls, model, model_id, *args, **kwargs)

    return classmethod(wrapper)
