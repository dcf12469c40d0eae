"""HiRA in PEFT's mixed models, beside adapters of other kinds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from peft.tuners.mixed import MixedModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from hira.base_weights import offloaded
from hira.config.hira_config import check_config
from hira.errors import HiraError
from hira.layers import merging
from hira.layers.base import HiraLayer
from hira.tuner.model import HiraModel, check_new_name, hira_layers, reporting_unmatched
from hira.tuner.transaction import unchanged_on_error


class HiraMixedModel(MixedModel):
    """PEFT's mixed model, with HiRA adapters beside the kinds that PEFT mixes.

    A mixed model computes W0 with all its HiRA adapters, plus the additive updates. So HiRA merges first, into W0
    itself, and the other adapters add to that.
    """

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        with unchanged_on_error(model):
            super().__init__(model, *args, **kwargs)

    def _create_and_replace(self, config: Any, *args: Any, **kwargs: Any) -> None:
        if _is_hira(config):
            HiraModel._create_and_replace(self, config, *args, **kwargs)
        else:
            super()._create_and_replace(config, *args, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        if _is_hira(config):
            check_config(config)
            check_new_name(model, adapter_name, self.peft_config)
            for name in ("target_parameters", "trainable_token_indices", "ensure_weight_tying", "layer_replication"):
                if getattr(config, name, None):
                    raise HiraError(f"{name} is not for mixed models; leave it out, or use PeftModel.")
        with unchanged_on_error(model), reporting_unmatched(model, config) if _is_hira(config) else nullcontext():
            super().inject_adapter(model, adapter_name, *args, **kwargs)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        HiraModel._check_known(self, adapter_names or [])
        _check_not_offloaded(self.model)
        others = _other_tuner_layers(self.model)
        with unchanged_on_error(self.model), _weights_back_on_error(self.model):
            remerged = [(layer, list(layer.merged_adapters)) for layer in others if layer.merged]
            for layer, _ in remerged:  # they add to what HiRA writes
                layer.unmerge()
            for layer in hira_layers(self.model):
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            to_merge = [*remerged, *((layer, adapter_names) for layer in others if _merges(layer, adapter_names))]
            bases = {id(layer.get_base_layer()) for layer, _ in to_merge}
            for layer in hira_layers(self.model):
                layer.others_merged = id(layer.get_base_layer()) in bases
                if layer.others_merged:
                    merging.keep_original(layer)
            for layer, names in to_merge:
                layer.merge(safe_merge=safe_merge, adapter_names=names)

    def unmerge_adapter(self) -> None:
        for layer in [*_other_tuner_layers(self.model), *hira_layers(self.model)]:
            layer.unmerge()

    def disable_adapter_layers(self) -> None:
        """As PEFT's; what is merged is unmerged first, in the order that gives the base weights back."""
        if any(layer.merged for layer in [*_other_tuner_layers(self.model), *hira_layers(self.model)]):
            self.unmerge_adapter()
        super().disable_adapter_layers()

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        HiraModel._check_known(self, adapter_names or [])
        if merge:
            _check_not_offloaded(self.model)
        with unchanged_on_error(self.model), _weights_back_on_error(self.model):
            for parent in list(self.model.modules()):
                for name, child in parent.named_children():
                    if isinstance(child, HiraLayer):
                        child.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
                        setattr(parent, name, child.base_layer)
            model: nn.Module = super()._unload_and_optionally_merge(
                merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
            )
        return model


@contextmanager
def _weights_back_on_error(model: nn.Module) -> Iterator[None]:
    """Restore the data of parameters, which a safe merge of PEFT's layers replaces, if the body raises."""
    before = [(parameter, parameter.data) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for parameter, data in before:
            parameter.data = data
        raise


def _merges(layer: Any, adapter_names: list[str] | None) -> bool:
    """Whether a layer has an adapter among some, or an active one where none are named."""
    names = layer.active_adapters if adapter_names is None else adapter_names
    return any(name in layer._get_available_adapters() for name in names)


def _other_tuner_layers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, BaseTunerLayer) and not isinstance(m, HiraLayer)]


def _check_not_offloaded(model: nn.Module) -> None:
    for layer in _other_tuner_layers(model):
        if offloaded.offloading_hook(layer.get_base_layer()) is not None:
            raise HiraError(
                f"A {type(layer).__name__} of {type(layer).__module__} cannot be merged into a weight that accelerate "
                "offloads: the merged weight would be lost. Load the model without offloading and merge there."
            )


def _is_hira(config: Any) -> bool:
    return bool(config.peft_type == "HIRA")
