"""HiraModel, the PEFT tuner."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.constants import EMBEDDING_LAYER_NAMES, TRANSFORMERS_MODELS_TO_HIRA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from hira.base_weights import offloaded
from hira.config.hira_config import check_config, config_of_module, rank_of
from hira.errors import HiraError
from hira.files.io.adapter_folder import plain_name
from hira.layers import merging
from hira.layers.attention import check_not_offloaded
from hira.layers.base import HiraLayer
from hira.layers.dispatch import dispatch
from hira.layers.experts import check_targets
from hira.layers.mixed_batch import BASE
from hira.tuner import mixed_batches
from hira.tuner.adapter_names import check_name, check_saved_modules
from hira.tuner.expert_targets import target_experts
from hira.tuner.shared_weights import is_tied, replicate, tie, tie_adapter
from hira.tuner.state_dicts import check_whole, from_file, to_file, unwrapped
from hira.tuner.trainable_tokens import check_token_layers
from hira.tuner.transaction import unchanged_on_error
from hira.tuner.weighted_adapters import SignMethod, Svd, add_weighted_adapter

STOCK_PACKAGE = "peft.tuners.hira"


class HiraModel(BaseTuner):
    """Adapts a model with HiRA, ``W' = W0 * (1 + BA)`` for the weight of every targeted module.

    Usually made by `peft.get_peft_model(model, HiraConfig(...))` or `PeftModel.from_pretrained`.

    Args:
        model: the model to adapt, in place.
        peft_config: the HiraConfig of the first adapter.
        adapter_name: its name.
        low_cpu_mem_usage: make the adapter on the meta device, for weights that are loaded next.

    Raises:
        HiraError: the configuration is bad, a targeted module cannot be served, or the model carries layers of PEFT's
            own HiRA; the model is left as it was.

    Source: HiRA (ICLR 2025); the interface is PEFT's `BaseTuner`.
    """

    prefix = "hira_"
    tuner_layer_cls = HiraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_HIRA_TARGET_MODULES_MAPPING

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        with unchanged_on_error(model):  # PEFT adds the configuration to an adapted model's before anything is checked
            super().__init__(model, *args, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter to every targeted module; arguments and errors as the class's."""
        config = self.peft_config[adapter_name]
        check_config(config)
        check_new_name(model, adapter_name, self.peft_config)
        with unchanged_on_error(model), _fields_back_on_error(config, *_model_configs(model)):
            target_experts(model, config)
            check_targets(model, _target_parameters(config))
            offloaded.check_copies(model, config.modules_to_save or ())
            if getattr(config, "trainable_token_indices", None) is not None:  # not in PEFT's config
                check_token_layers(model, config, self._tied_modules(), partial(self._targets, config))
            with reporting_unmatched(model, config, kwargs.get("state_dict")):
                super().inject_adapter(model, adapter_name, *args, **kwargs)
            offloaded.check_blocks(model, HiraLayer, f"Adapter {adapter_name!r} cannot be added")
        offloaded.add_to_device_map(model, HiraLayer, self.prefix)

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        replicate(model, peft_config, {name: c for name, c in self.peft_config.items() if c is not peft_config})

    def _check_tied_modules(self, model: nn.Module, peft_config: Any) -> None:
        """Tie what `ensure_weight_tying` ties; PEFT would look for modules named embed_tokens and lm_head alone."""
        if getattr(peft_config, "ensure_weight_tying", False):  # not in PEFT's config
            tie(peft_config, self.model, self._tied_modules(), partial(self._targets, peft_config))
        else:
            super()._check_tied_modules(model, peft_config)

    def _targets(self, config: Any, name: str) -> bool:
        """Whether a configuration names a module; what PEFT chooses where it names none are no embeddings."""
        return config.target_modules is not None and bool(self._check_target_module_exists(config, name))

    def _tied_modules(self) -> list[str]:
        """The names of the modules that share the input embedding's weight."""
        return [name.removesuffix(".base_layer") for name in self._get_module_names_tied_with_embedding()]

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        """Choose target modules as PEFT does; where parameters are targeted, the architecture needs no default."""
        model_type = getattr(model_config, "get", lambda name: None)("model_type")
        if peft_config.target_modules is None and self.target_module_mapping.get(model_type) is None:
            if _target_parameters(peft_config):
                return peft_config
            kind = f"models of type {model_type!r}" if model_type else "a model whose config has no model_type"
            raise HiraError(
                f"Please specify `target_modules` in `peft_config`: there are no default modules for {kind}. Name the "
                "modules to adapt, or pass 'all-linear'."
            )
        return super()._prepare_adapter_config(peft_config, {"model_type": model_type})

    @staticmethod
    def _check_target_module_exists(hira_config: Any, key: str) -> Any:
        """Match as PEFT does, on names without the parts that wrappers such as torch.compile's add."""
        return BaseTuner._check_target_module_exists(hira_config, plain_name(key))

    def _check_new_adapter_config(self, config: Any) -> None:
        """Refuse other target parameters than another adapter's, since a checkpoint's keys show how wrappers nest."""
        super()._check_new_adapter_config(config)
        names = _target_parameters(config)
        for other_name, other in self.peft_config.items():
            others = _target_parameters(other)
            if names and others and set(names) != set(others):
                raise HiraError(
                    f"target_parameters is {sorted(names)}, but {sorted(others)} for adapter {other_name!r}; adapters "
                    "of one model have to target the same parameters, or none."
                )

    def _create_and_replace(
        self,
        hira_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        if current_key is None:
            raise ValueError("Current Key shouldn't be `None`")
        current_key = plain_name(current_key)
        r, hira_config = rank_of(hira_config, current_key), config_of_module(hira_config, current_key)
        found = _hira_layer_in(target)
        if found is not None and found.parameter_name == parameter_name:
            # attention adapts its output layer too
            if adapter_name not in found._get_available_adapters():
                found.update_layer(adapter_name, r, config=hira_config)
            if is_tied(hira_config, current_key):
                tie_adapter(found, adapter_name, self.model)
            return
        options = {"r": r, "current_key": current_key, "parameter_name": parameter_name}
        try:
            if isinstance(parent, nn.MultiheadAttention):
                check_not_offloaded(parent)
            layer: Any = dispatch(target, adapter_name, hira_config, **options)
            if is_tied(hira_config, current_key):
                tie_adapter(layer, adapter_name, self.model)
        except HiraError as error:
            raise HiraError(f"{current_key}: {error}") from error
        layer.name = current_key
        layer.weight_is_read = layer.weight_is_read or _reads_weights(parent)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, HiraLayer | AuxiliaryTrainingWrapper) or isinstance(new_module, HiraLayer):
            # adapters are on their device already; PEFT would look for a weight, which may be missing, to place them,
            # or assign that of a module which is being unloaded, which may be computed
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate some adapters.

        Args:
            adapter_name: one name or several.
            inference_mode: leave their parameters without gradients.

        Raises:
            HiraError: there is no adapter of that name; nothing is changed.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        self._check_known(names)
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def train(self, mode: bool = True) -> Any:
        """Switch to training or evaluation; raise a HiraError if the adapters are where they cannot be trained."""
        if mode and any(parameter.is_meta for parameter in self.model.parameters() if parameter.requires_grad):
            offloaded.check_blocks(self.model, HiraLayer, "Adapters cannot be trained")
        return super().train(mode)

    # Merging

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the base weights, keeping those to unmerge.

        Args:
            adapter_names: the adapters; the active ones by default.
            safe_merge: check that every merged weight is finite before any is changed.

        Raises:
            HiraError: an adapter is unknown, a merged weight would not be finite (with `safe_merge`), or a weight
                cannot be replaced; the model is left as it was.
        """
        self._check_merge(adapter_names, safe_merge)
        with unchanged_on_error(self.model):
            super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_merge(adapter_names, safe_merge)
        model: nn.Module = super()._unload_and_optionally_merge(
            merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )
        if merge:
            offloaded.untie(model)
        return model

    def _check_merge_allowed(self) -> None:
        """Warn of nothing: a merge gives a layer with a tied weight a weight of its own (`base_weights.dense`)."""

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        self._check_known(adapter_names or [])
        offloaded.check_blocks(self.model, HiraLayer, "Adapters cannot be merged")
        for layer in hira_layers(self.model):
            try:
                layer.storage.check_here()
                layer.storage.snapshot()
            except HiraError as error:
                raise HiraError(f"{layer.name}: {error}") from error
            if safe_merge:
                merging.check_merge(layer, adapter_names)

    def _check_known(self, names: list[str]) -> None:
        known = set(self.peft_config).union(*(layer._get_available_adapters() for layer in hira_layers(self.model)))
        unknown = [name for name in names if name not in known]
        if unknown:
            raise HiraError(f"There is no adapter {', '.join(map(repr, unknown))}; there are {sorted(known)}.")

    # Mixed batches

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Pass `adapter_names`, which PEFT does not pass to the model's own forward, to every HiRA layer."""
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None:
            yield
            return
        if self.training:
            raise HiraError("adapter_names is for inference, but the model is in training mode; call eval() first.")
        self._check_known([name for name in adapter_names if name != BASE])
        mixed_batches.check_rows_can_differ(hira_layers(self.model), adapter_names)
        with mixed_batches.passing(self, adapter_names):
            yield

    # Adapters made of others

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = False,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: SignMethod = "total",
    ) -> None:
        """Add an adapter that is made of others: ``BA = sum_i w_i B_i A_i``, so W' moves by their weighted updates.

        Args:
            adapters: their names.
            weights: a number w for each, which may be negative.
            adapter_name: the new adapter's name. It is not active and does not train.
            combination_type: "cat" or "linear" for the exact sum, of the summed rank; "svd" for the matrix of
                `svd_rank` that is nearest to it; "ties", "dare_linear", "dare_ties" or "magnitude_prune", with or
                without "_svd" at the end, for what these methods make of the matrices B_i A_i, of `svd_rank` too.
            svd_rank: that rank; by default the largest of the adapters' ranks.
            svd_clamp: a quantile, in [0, 1]: entries of the singular vectors, those of B times the singular values,
                that are larger in size than it are cut to it.
            svd_full_matrices: whether all singular vectors are computed. Those beyond the rank are not used, so True
                takes more time for the same result.
            svd_driver: the method of cuSOLVER, for adapters on a CUDA device; see `torch.linalg.svd`.
            density: the share of entries, in (0, 1], that the last four keep.
            majority_sign_method: how TIES and DARE-TIES choose the sign of an entry.

        Raises:
            HiraError: an adapter is not there, has `modules_to_save`, or is targeted otherwise than the others, the new
                name is taken, or an argument is out of range; the model is left as it was.

        Source: arguments and names from PEFT's LoRA, whose matrix functions are used.
        """
        svd = Svd(svd_rank, svd_clamp, svd_full_matrices, svd_driver)
        add_weighted_adapter(
            self, adapters, weights, adapter_name, combination_type, svd, density, majority_sign_method
        )

    # Checkpoints

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        """The model's state dict; targeted embeddings that are offloaded are loaded, since PEFT saves them too."""
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        targets = [config.target_modules or () for config in self.peft_config.values()]  # names, or a pattern
        if any(name in names for name in EMBEDDING_LAYER_NAMES for names in targets):
            with ExitStack() as stack:
                for layer in hira_layers(self.model):
                    stack.enter_context(merging.holding_W0(layer))
                for name, module in self.named_modules(prefix=prefix.removesuffix(".")):
                    if any(part in EMBEDDING_LAYER_NAMES for part in name.split(".")):
                        offloaded.load_into(state, module, f"{name}.")
        return state

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, *args, **kwargs
        )
        others = kwargs.get("unwanted_adapter_names", ())
        for name, layer in model.named_modules():
            if isinstance(layer, HiraLayer) and layer._present([adapter_name]):
                for attribute, factors in layer.named_factor_dicts(adapter_name):
                    path = f"{unwrapped(name)}.{attribute}"
                    key = f"{path}.{adapter_name}"
                    if key in state_dict:  # PEFT does not find it under FSDP's wrappers
                        found[key] = state_dict[key]
                    elif any(f".{other}." in key for other in others):  # PEFT mistakes a module's name for an adapter's
                        found[key] = layer._factor(factors, adapter_name).detach()
                    for other in others:
                        found.pop(f"{path}.{other}", None)
        check_whole(found)
        return to_file(model, adapter_name, found)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        # PEFT does not look through wrappers that take themselves out of state dicts
        layers = [(unwrapped(name), layer) for name, layer in model.named_modules() if isinstance(layer, HiraLayer)]
        names = [(name, factor) for name, layer in layers for factor in (*layer.factor_names, *layer.lora_names)]
        for key in [f"{name}.{factor}" for name, factor in names]:
            if key in remapped:
                remapped[f"{key}.{adapter_name}"] = remapped.pop(key)
        remapped = from_file(model, config, adapter_name, remapped)
        offloaded.load_state_dict(remapped, model)
        return remapped


@contextmanager
def _fields_back_on_error(*configs: Any) -> Iterator[None]:
    before = [(config, vars(config).copy()) for config in configs]
    try:
        yield
    except BaseException:
        for config, fields in before:
            vars(config).clear()
            vars(config).update(fields)
        raise


def _model_configs(model: nn.Module) -> list[Any]:
    """The configurations of a model and its parts, which say how many layers there are; those of dicts not."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    return [config for config in configs if hasattr(config, "__dict__")]


def _target_parameters(config: Any) -> Collection[str]:
    return getattr(config, "target_parameters", None) or ()  # not in PEFT's config


def hira_layers(model: nn.Module) -> list[HiraLayer]:
    """The HiRA layers of a model."""
    return [module for module in model.modules() if isinstance(module, HiraLayer)]


@contextmanager
def reporting_unmatched(model: nn.Module, config: Any, state_dict: Any = None) -> Iterator[None]:
    """Warn of names in a list of `target_modules` that match no module, once the body has added the adapter."""
    given = not isinstance(config.target_modules, str | None) and state_dict is None
    names = [plain_name(name) for name, _ in model.named_modules()] if given else []
    paths = [f".{name}".replace(".base_layer", "") for name in names]
    yield
    if given and not isinstance(config.target_modules, str | None):  # PEFT may have replaced the names
        unmatched = [name for name in config.target_modules if not any(path.endswith(f".{name}") for path in paths)]
        if unmatched:
            warnings.warn(
                f"The model has no module for {', '.join(map(repr, sorted(unmatched)))} in target_modules; only "
                f"{sorted(set(config.target_modules) - set(unmatched))} are adapted. Look the names up in "
                "model.named_modules(); experts that are held as parameters are target_parameters.",
                stacklevel=2,
            )


def check_new_name(model: nn.Module, adapter_name: str, configs: dict[str, Any]) -> None:
    """Refuse a name that is invalid or taken, and a model with layers of PEFT's own HiRA."""
    check_name(adapter_name)
    check_saved_modules(model, configs, getattr(configs[adapter_name], "modules_to_save", None) or ())
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and type(module).__module__.startswith(STOCK_PACKAGE):
            raise HiraError(
                f"{name} is a layer of PEFT's own HiRA, made before hira was imported. Import hira first and make the "
                "adapter again (save it, unload() the model, import hira and load it), or call hira.unregister() to "
                "go on with PEFT's."
            )
        if isinstance(module, HiraLayer) and adapter_name in module._get_available_adapters():
            raise HiraError(f"There is an adapter {adapter_name!r} already, on {name}; choose another name.")


def _hira_layer_in(target: nn.Module) -> HiraLayer | None:
    """A module that is a HiRA layer, or the HiRA layer in another tuner's layer, as in a mixed model; else None."""
    layer: Any = target
    while isinstance(layer, BaseTunerLayer) and not isinstance(layer, HiraLayer):
        layer = layer.base_layer
    return layer if isinstance(layer, HiraLayer) else None


def _reads_weights(parent: nn.Module) -> bool:
    """Whether a module multiplies by its children's weights itself, as torch's attention and encoder and Mamba do."""
    return isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer) or hasattr(parent, "A_log")
