"""HiRA on `nn.MultiheadAttention`: its packed projection of query, key and value, and its output projection."""

from __future__ import annotations

import re
from contextlib import ExitStack
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from hira.base_weights import offloaded
from hira.base_weights.dense import Storage
from hira.config.hira_config import config_of_module, rank_of
from hira.distributed.detection import check_not_sharded
from hira.errors import HiraError
from hira.layers import merging
from hira.layers.base import HiraLayer
from hira.layers.linear import Linear
from hira.layers.substitution import exclusive, substituted
from hira.ops.effective_weight import product_dtype
from hira.ops.recompute import Formed, formed, recomputed


class MultiheadAttention(HiraLayer):
    """HiRA on `nn.MultiheadAttention`: A (r, E), B (3 E, r) on its `in_proj_weight`, and a `Linear` on its `out_proj`.

    PyTorch's own forward runs, with W' for both weights. Attributes that a model reads are those of the base layer,
    `in_proj_weight` and ``out_proj.weight`` W' while adapters are active. `exclude_modules` may name `out_proj`.

    Args:
        base_layer: the layer to adapt.
        adapter_name: the first adapter's name.
        config: its HiraConfig.
        r: the rank for the projection of query, key and value; ``config.r`` by default.
        name: the module's name in the model, by which `rank_pattern` and `exclude_modules` find its `out_proj`.

    Raises:
        HiraError: the rank is not a positive integer, or the config asks for dropout; the base layer is left as it was.

    Source: HiRA (ICLR 2025), equation 5; the layout of parameters is that of PEFT's LoRA.
    """

    # one W' for all rows of a batch
    weight_is_read = True

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: Any,
        r: int | None = None,
        name: str = "",
        **kwargs: Any,
    ) -> None:
        super().__init__(base_layer, **kwargs)
        self.name = name
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config.r if r is None else r, config=config)

    @staticmethod
    def _features(base: Any) -> tuple[int, int]:
        out_features, in_features = base.in_proj_weight.shape
        return in_features, out_features

    def _storage_of(self, base: nn.Module) -> Storage:
        return Storage(base, "in_proj_weight")

    # Adapters

    def update_layer(self, adapter_name: str, r: int, config: Any, **kwargs: Any) -> None:
        """Add an adapter to both projections; arguments and errors as for `Linear`, and a HiraError for dropout."""
        if config.hira_dropout > 0:
            raise HiraError(
                f"hira_dropout is {config.hira_dropout}, but nn.MultiheadAttention multiplies by one W' for base layer "
                "and update, so that there is no input of the update to drop; set hira_dropout=0, or leave attention "
                "to an adapter of its own."
            )
        super().update_layer(adapter_name, r, config=config, **kwargs)
        key, base = f"{self.name}.out_proj", self.get_base_layer()
        if _excludes(config, key):
            return
        rank, config = rank_of(config, key, r), config_of_module(config, key)
        if not isinstance(base.out_proj, HiraLayer):
            base.out_proj = Linear(base.out_proj, adapter_name, config, rank)
            base.out_proj.name, base.out_proj.weight_is_read = key, True
        elif not base.out_proj._present([adapter_name]):
            base.out_proj.update_layer(adapter_name, rank, config=config)

    # What a model reads

    @property
    def in_proj_weight(self) -> Tensor:
        """The weight of the projections of query, key and value (3 E, E): W' while adapters are active."""
        names = self._applied()
        if not names:
            return self.storage.read()
        return self._effective_weight(merging.read_original(self), *self._factors(names))

    @property
    def _qkv_same_embed_dim(self) -> bool:
        return True

    @property
    def weight(self) -> Tensor:
        """Attention has no weight of that name."""
        raise AttributeError("weight")

    # Forward

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """Return attention's output, and its weights, under the active adapters.

        Args:
            *args, **kwargs: those of `nn.MultiheadAttention.forward`.
            adapter_names: one adapter name for each sample, of which all must be what is active.

        Returns:
            What `nn.MultiheadAttention.forward` returns.

        Raises:
            HiraError: `adapter_names` asks for other adapters than the active ones, or the weights are offloaded or
                spread over processes where they cannot be followed.
        """
        if adapter_names is not None and not self.disable_adapters:
            self._check_names(adapter_names)
        query = args[0] if args else kwargs["query"]
        base: Any = self.base_layer
        check_not_offloaded(base)
        check_not_sharded(base, "in_proj_weight")
        with exclusive(base), ExitStack() as stack:
            output, weights = base._modules["out_proj"], []
            if (in_proj := _form(self, query)) is not None:
                weights.append(in_proj)
                stack.enter_context(substituted(base, in_proj_weight=in_proj.weight))
            if isinstance(output, HiraLayer) and (out_proj := _form(output, query)) is not None:
                weights.append(out_proj)
                stack.enter_context(substituted(base, out_proj=output.get_base_layer()))
                stack.enter_context(substituted(output.get_base_layer(), weight=out_proj.weight))
            stack.enter_context(recomputed(*weights))
            return base(*args, **kwargs)

    def _check_names(self, adapter_names: list[str]) -> None:
        active = self._present(self.active_adapters)
        if self.merged or {tuple(self._present([name])) for name in adapter_names} != {tuple(active)}:
            raise HiraError(
                f"adapter_names asks for {sorted(set(adapter_names))}, but attention has one weight for all rows; in "
                f"{self.name or 'this layer'} {active} are active and {self.merged_adapters} merged. Set the adapter "
                "and pass no names."
            )

    # Unloading

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the base layer, its `out_proj` plain again, both merged if asked for; PEFT calls this to unload."""
        output = self.get_base_layer().out_proj
        adapted = isinstance(output, HiraLayer)
        if adapted and merge and safe_merge:
            merging.check_merge(output, adapter_names)
        base = super().unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        if adapted:
            base.out_proj = output.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        return base


def check_not_offloaded(base: nn.Module) -> None:
    """Refuse attention with offloaded weights: accelerate fetches none of `out_proj`, which is never called."""
    if any(offloaded.offloading_hook(module) is not None for module in base.modules()):
        raise HiraError(
            f"accelerate offloads the weights of {type(base).__name__}, but could not bring in those of its out_proj, "
            "as attention multiplies by them without calling it. Leave attention on its device in the device map."
        )


def _excludes(config: Any, key: str) -> bool:
    """Whether a configuration leaves a module out."""
    if isinstance(config.exclude_modules, str):
        return re.fullmatch(config.exclude_modules, key) is not None
    return any(f".{key}".endswith(f".{name}") for name in config.exclude_modules or ())


def _form(layer: HiraLayer, query: Tensor) -> Formed | None:
    """W' in the dtype of the product with it; None where the base layer's own weight will do."""
    names = layer._applied()
    if not names:
        return None
    W0 = merging.read_original(layer)
    return formed(W0, *layer._factors(names), product_dtype(query, W0.dtype))


def dispatch_attention(target: nn.Module, adapter_name: str, hira_config: Any, **kwargs: Any) -> nn.Module | None:
    """Return a HiRA layer for an `nn.MultiheadAttention`, None for another module.

    Args:
        target: the module.
        adapter_name: the adapter's name.
        hira_config: its HiraConfig.
        **kwargs: `r`, the rank, if not the config's, and `current_key`, the module's name in the model.

    Raises:
        HiraError: the module's weights are three, not dense, or adapted by another tuner; or the config asks for
            dropout. The module is left as it was.
    """
    base: Any = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if not isinstance(base, nn.MultiheadAttention):
        return None
    check_not_offloaded(base)
    output = base.out_proj
    if target is not base or not isinstance(output, HiraLayer | nn.Linear):
        raise HiraError(
            f"Target module {type(base).__name__} is adapted by another tuner, or its out_proj is, which is a "
            f"{type(output).__name__}. HiRA adapts a plain nn.MultiheadAttention; leave this module to one of the two."
        )
    if base.in_proj_weight is None:
        raise HiraError(
            f"Target module {type(base).__name__} has three weights for query, key and value, because kdim or vdim is "
            "not embed_dim. HiRA adapts in_proj_weight, which packs them; target its out_proj alone."
        )
    for layer, name in ((base, "in_proj_weight"), (output, "weight")):
        layer = layer.get_base_layer() if isinstance(layer, HiraLayer) else layer
        if not Storage.serves(layer, name):
            raise HiraError(
                f"Target module {type(base).__name__} is not supported: its {name} is a "
                f"{type(getattr(layer, name).data).__name__} of {getattr(layer, name).dtype}. HiRA reads dense float "
                "weights of attention; adapt the model before it is quantised."
            )
    return MultiheadAttention(base, adapter_name, hira_config, kwargs.get("r"), kwargs.get("current_key") or "")
