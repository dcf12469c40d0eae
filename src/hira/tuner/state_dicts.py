"""Names in the state dicts of adapters, and the checks before such a state dict is saved or loaded."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType
from torch import Tensor, nn
from transformers import PreTrainedModel

from hira.config.hira_config import config_of_module
from hira.distributed.detection import is_dtensor
from hira.errors import HiraError
from hira.files.io.adapter_folder import PREFIX, plain_name, stacked
from hira.files.model.architecture import Architecture
from hira.layers.alpha_scale import alpha_scales
from hira.layers.base import HiraLayer
from hira.layers.experts import ParamWrapper

# whether PEFT asks the tuner for the tensors of an adapter's file, and hands it those that it loads; not in PEFT 0.20
_TUNER_CONVERTS = hasattr(BaseTuner, "_remap_adapter_state_dict_for_load")
FACTORS = tuple(f".{factor}" for factor in HiraLayer.adapter_layer_names)


def unwrapped(name: str) -> str:
    """A module's name without the parts of wrappers that are absent from state dicts."""
    return name.replace("_fsdp_wrapped_module.", "").replace("_checkpoint_wrapped_module.", "")


def saving(get_state_dict: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """Make `get_peft_model_state_dict` leave wrappers such as torch.compile's out of the names of HiRA's tensors."""

    @functools.wraps(get_state_dict)
    def wrapper(
        model: Any,
        state_dict: dict[str, Tensor] | None = None,
        adapter_name: str = "default",
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        if not _is_hira(model, adapter_name):
            return get_state_dict(model, state_dict, adapter_name, *args, **kwargs)
        names = _module_names(model)
        if state_dict is not None:
            state_dict = {_replaced(plain_name(key), names): value for key, value in state_dict.items()}
        found = get_state_dict(model, state_dict, adapter_name, *args, **kwargs)
        if not _TUNER_CONVERTS:
            found = nameless(to_file(model, adapter_name, with_name(found, adapter_name)), adapter_name)
        plain = {name: key for key, name in names.items()}
        return {_replaced(key, plain): value for key, value in found.items()}

    return wrapper


def loading(set_state_dict: Callable[..., Any]) -> Callable[..., Any]:
    """Make `set_peft_model_state_dict` find HiRA's tensors under the names of another layout of the model."""

    @functools.wraps(set_state_dict)
    def wrapper(
        model: Any,
        peft_model_state_dict: Mapping[str, Tensor],
        adapter_name: str = "default",
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        state_dict = dict(peft_model_state_dict)
        if _is_hira(model, adapter_name):
            state_dict = in_names_of(model, state_dict)
            if not _TUNER_CONVERTS:
                config, named = model.peft_config[adapter_name], with_name(state_dict, adapter_name)
                state_dict = nameless(from_file(model, config, adapter_name, named), adapter_name)
        return set_state_dict(model, state_dict, adapter_name, *args, **kwargs)

    return wrapper


def to_file(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors as a checkpoint has them, with their names in the model, from those in the model."""
    return with_tied(model, adapter_name, scaled_by_alpha(model, adapter_name, state_dict, divide=False))


def from_file(model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of `to_file`, once the tensors fit the adapter, as `fit_to_checkpoint` makes sure."""
    fit_to_checkpoint(model, config, adapter_name, state_dict)
    return scaled_by_alpha(model, adapter_name, state_dict, divide=True)


def with_name(state_dict: Mapping[str, Tensor], adapter_name: str) -> dict[str, Tensor]:
    """Tensors of a file by their names in the model: with the adapter's name at the end of those of factors."""
    return {f"{key}.{adapter_name}" if key.endswith(FACTORS) else key: value for key, value in state_dict.items()}


def nameless(state_dict: Mapping[str, Tensor], adapter_name: str) -> dict[str, Tensor]:
    """Tensors in the model by their names in a file, without the adapter's."""
    end = f".{adapter_name}"
    names = {key: key.removesuffix(end) for key in state_dict}
    return {names[key] if names[key].endswith(FACTORS) else key: value for key, value in state_dict.items()}


def _is_hira(model: Any, adapter_name: str) -> bool:
    config = getattr(model, "peft_config", {}).get(adapter_name)
    return config is not None and config.peft_type == PeftType.HIRA


def _module_names(model: nn.Module) -> dict[str, str]:
    """The names of a model's modules in its state dict, by their names without the parts of wrappers."""
    plain: dict[str, str] = {}
    wrappers: set[str] = set()
    found = {}
    for name, module in model.named_modules():
        parent, _, last = name.rpartition(".")
        of_parent = plain.get(parent, "")
        adds_nothing = name == "" or parent in wrappers or plain_name(last) == ""
        plain[name] = of_parent if adds_nothing else f"{of_parent}.{last}".removeprefix(".")
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            wrappers.add(name)
        found[plain[name]] = unwrapped(name)
    return found


def _replaced(key: str, names: Mapping[str, str]) -> str:
    """A key whose innermost known module is renamed."""
    module, rest = key, ""
    while module and module not in names:
        module, _, last = module.rpartition(".")
        rest = f".{last}{rest}"
    return f"{names[module]}{rest}".removeprefix(".") if module else key


def in_names_of(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's tensors under the present names of a model's modules, with the parts of their wrappers."""
    names = _module_names(model)
    has_prefix = PREFIX.removesuffix(".") in names
    tensors: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        plain = plain_name(key)
        if not has_prefix:
            plain = plain.removeprefix(PREFIX)
        without = plain.replace(f"{PREFIX}module.", PREFIX, 1)  # DDP was around the base model
        if plain.rpartition(".")[0] not in names and without.rpartition(".")[0] in names:
            plain = without
        if plain in tensors:
            raise HiraError(f"The checkpoint has {plain} twice, under names that differ by those of wrappers alone.")
        tensors[plain] = value
    prefix = PREFIX if has_prefix else ""
    return {_replaced(key, names): value for key, value in _converted(model, tensors, names, prefix).items()}


def _converted(model: Any, tensors: dict[str, Tensor], names: Mapping[str, str], prefix: str) -> dict[str, Tensor]:
    """Tensors under the names that transformers has now, where the model has no modules of their own names.

    Experts that were modules are one parameter now, which a ParamWrapper adapts; their factors are joined.
    """
    unknown: dict[str, str] = {}  # keys without the last part, by the name of a weight
    for key in tensors:
        module = key.rpartition(".")[0]
        if module not in names and key.startswith(prefix):
            unknown[f"{module.removeprefix(prefix)}.weight"] = module
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    base = getattr(base, "_orig_mod", base)
    if not unknown or not isinstance(base, PreTrainedModel):
        return tensors
    wrappers = {
        f"{plain_name(name).replace('.base_layer', '')}.{layer.parameter_name}": plain_name(name)
        for name, layer in model.named_modules()
        if isinstance(layer, ParamWrapper)
    }
    converted = dict(tensors)
    for name, location in Architecture(base).locate(unknown).items():
        if location is None:
            continue
        modules = [[unknown[weight] for weight in weights] for weights in location.tensors]
        if not location.stacked:
            new = prefix + name.removesuffix(".weight")
            for key in [key for key in tensors if key.rpartition(".")[0] == modules[0][0]]:
                converted[f"{new}.{key.rpartition('.')[2]}"] = converted.pop(key)
        elif prefix + name in wrappers:
            keys = [[(f"{module}.hira_A", f"{module}.hira_B") for module in group] for group in modules]
            absent = [key for group in keys for pair in group for key in pair if key not in converted]
            if absent:
                raise HiraError(
                    f"The checkpoint lacks {', '.join(absent[:5])}, of experts that {name} holds. Nothing was loaded: "
                    "the file is not complete, copy or download it again."
                )
            pairs = [[(converted.pop(A), converted.pop(B)) for A, B in group] for group in keys]
            joined = stacked(name, pairs)
            for factor, value in zip(("hira_A", "hira_B"), joined, strict=True):
                converted[f"{wrappers[prefix + name]}.{factor}"] = value
    return converted


def check_whole(state_dict: dict[str, Tensor]) -> None:
    """Refuse to save tensors of which other processes hold a part."""
    for key, value in state_dict.items():
        if is_dtensor(value) or value.numel() == 0:
            raise HiraError(
                f"{key} is sharded over processes: here it is a {type(value).__name__} of shape {tuple(value.shape)}. "
                "Gather the state dict first, with accelerator.get_state_dict(model), Trainer.save_model or "
                "torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True, and pass it "
                "as state_dict to save_pretrained or get_peft_model_state_dict."
            )


def scaled_by_alpha(
    model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor], *, divide: bool
) -> dict[str, Tensor]:
    """A state dict with s B for B and s L2 for L2 of each layer, as checkpoints have them; divided by s, as they train.

    The scales s of `hira_alpha` are powers of two, so nothing is rounded.
    """
    scaled = dict(state_dict)
    for name, layer in model.named_modules():
        if not isinstance(layer, HiraLayer):
            continue
        for factor, scales in ((layer.factor_names[1], layer.alpha_scale), (layer.lora_names[1], layer.lora_scale)):
            key, scale = f"{unwrapped(name)}.{factor}.{adapter_name}", scales.get(adapter_name, 1)
            if scale != 1 and key in scaled:
                scaled[key] = scaled[key] / scale if divide else scaled[key] * scale
    return scaled


def with_tied(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with A and B of the layers that hold none because they are tied to another, as readers expect."""
    names = {layer: unwrapped(name) for name, layer in model.named_modules() if isinstance(layer, HiraLayer)}
    found = dict(state_dict)
    for layer, name in names.items():
        source = layer.tied_to.get(adapter_name)
        if source is None:
            continue
        keys = [f"{names[source]}.{each}.{adapter_name}" for each in source.names_of(adapter_name)]
        if all(key in state_dict for key in keys):
            values = layer.oriented(adapter_name, [state_dict[key] for key in keys])
            for factor, value in zip(layer.names_of(adapter_name), values, strict=True):
                found[f"{name}.{factor}.{adapter_name}"] = value.clone(memory_format=torch.contiguous_format)
    return found


def drop_tied(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> list[str]:
    """Take A and B of tied layers out of a checkpoint's tensors, and say where they are not those of the other."""
    problems = []
    for key, value in with_tied(model, adapter_name, state_dict).items():
        found = state_dict.get(key)
        if found is None or value is found:
            continue
        if found.shape != value.shape or not torch.equal(found, value):
            problems.append(f"{key} is not that of the layer with which ensure_weight_tying ties it")
        del state_dict[key]
    return problems


def fit_to_checkpoint(model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]) -> None:
    """Refuse a checkpoint that does not fit the adapter, before any value is loaded.

    PEFT up to 0.21 ignores `rank_pattern` for a model's first adapter, so a file may hold tensors of rank r where the
    pattern has another. There the adapter gets the file's rank.
    """
    _drop_absent_experts(model, config, adapter_name, state_dict)
    problems = drop_tied(model, adapter_name, state_dict)
    expected: set[str] = set()
    resized: list[HiraLayer] = []
    for name, layer in model.named_modules():
        if not isinstance(layer, HiraLayer) or adapter_name not in layer._factor_dicts[0]:
            continue
        keys = [f"{unwrapped(name)}.{factor}.{adapter_name}" for factor, _ in layer.named_factor_dicts(adapter_name)]
        expected.update(keys)
        missing = [key for key in keys if key not in state_dict]
        problems += [f"{key} is missing" for key in missing]
        if missing:
            continue
        found = tuple(tuple(state_dict[key].shape) for key in keys)
        r, lora_r = layer.r[adapter_name], layer.lora_r[adapter_name]
        shapes = layer.shapes_of(r, lora_r)
        if found != shapes and config.rank_pattern and found == layer.shapes_of(config.r, lora_r):
            resized.append(layer)
        elif found != shapes:
            problems += [f"{k} is of shape {f}, not {s}" for k, f, s in zip(keys, found, shapes, strict=True) if f != s]
    problems += [
        f"{key} belongs to no adapted module"
        for key in state_dict
        if key not in expected and key.removesuffix(f".{adapter_name}").endswith(FACTORS)
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise HiraError(
            f"The checkpoint does not fit adapter {adapter_name!r}: {'; '.join(problems[:5])}{more}. Nothing was "
            "loaded. Check that it was trained on this model, with this configuration."
        )
    for layer in resized:
        layer.resize_adapter(adapter_name, config.r)
        layer.alpha_scale[adapter_name], _ = alpha_scales(layer, config_of_module(config, layer.name), config.r)


def _drop_absent_experts(model: nn.Module, config: Any, adapter_name: str, state_dict: Mapping[str, Tensor]) -> None:
    """Delete an adapter from experts that its configuration names as modules, where the checkpoint has none of them.

    A checkpoint has none if it was made where such names matched linear layers alone.
    """
    derived = getattr(config, "parameters_of_modules", ())
    wrappers = {
        unwrapped(name): layer
        for name, layer in model.named_modules()
        if isinstance(layer, ParamWrapper) and layer._present([adapter_name])
    }
    absent = all(
        f"{name}.{factor}.{adapter_name}" not in state_dict for name in wrappers for factor in ("hira_A", "hira_B")
    )
    if derived and absent and set(config.target_parameters) == set(derived):
        for layer in wrappers.values():
            layer.delete_adapter(adapter_name)
        config.target_parameters = None
