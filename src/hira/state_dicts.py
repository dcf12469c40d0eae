"""What a state dict has to be like to be saved as an adapter's, or loaded as one."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hira.errors import HiraError
from hira.layer import HiraLayer
from hira.sharding import is_dtensor


def unwrapped(name: str) -> str:
    """A module's name without those of FSDP's wrappers, as state dicts have it."""
    return name.replace("_fsdp_wrapped_module.", "")


def check_whole(state_dict: dict[str, Tensor]) -> None:
    """Refuse to save what other processes have parts of."""
    for key, value in state_dict.items():
        if is_dtensor(value) or value.numel() == 0:
            raise HiraError(
                f"{key} is spread over processes: here it is a {type(value).__name__} of shape {tuple(value.shape)}. "
                "Gather the state dict first, with accelerator.get_state_dict(model), Trainer.save_model or "
                "torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True, and pass it "
                "as state_dict to save_pretrained or get_peft_model_state_dict."
            )


def fit_to_checkpoint(model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]) -> None:
    """Refuse a checkpoint that does not fit the adapter, before a value of it is loaded.

    PEFT up to 0.21 ignores `rank_pattern` for a model's first adapter, so a file may hold tensors of rank r where the
    pattern has another: there the file's rank wins.
    """
    problems: list[str] = []
    expected: set[str] = set()
    resized: list[HiraLayer] = []
    for name, layer in model.named_modules():
        if not isinstance(layer, HiraLayer) or not layer._present([adapter_name]):
            continue
        keys = [f"{unwrapped(name)}.{factor}.{adapter_name}" for factor in layer.factor_names]
        expected.update(keys)
        missing = [key for key in keys if key not in state_dict]
        problems += [f"{key} is missing" for key in missing]
        if missing:
            continue
        found = tuple(tuple(state_dict[key].shape) for key in keys)
        shapes = layer._factor_shapes(layer.r[adapter_name])
        if found != shapes and config.rank_pattern and found == layer._factor_shapes(config.r):
            resized.append(layer)
        elif found != shapes:
            problems += [f"{k} is of shape {f}, not {s}" for k, f, s in zip(keys, found, shapes, strict=True) if f != s]
    factors = tuple(f".{factor}" for factor in HiraLayer.adapter_layer_names)
    problems += [
        f"{key} belongs to no adapted module"
        for key in state_dict
        if key not in expected and (key.removesuffix(f".{adapter_name}").endswith(factors))
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise HiraError(
            f"The checkpoint does not fit adapter {adapter_name!r}: {'; '.join(problems[:5])}{more}. Nothing was "
            "loaded. Check that it was trained on this model, with this configuration."
        )
    for layer in resized:
        layer.resize_adapter(adapter_name, config.r)
