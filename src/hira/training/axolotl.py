"""HiRA in axolotl: ``plugins: [hira.training.axolotl.HiraPlugin]``, ``adapter: hira``, and its settings for LoRA."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from axolotl.loaders.adapter import find_all_linear_names
from peft import PeftModel, get_peft_model

from hira.config.hira_config import HiraConfig
from hira.training.callback import HiraCallback

# axolotl's settings for LoRA, and HiraConfig's field for each. Those that HiRA lacks are LoraConfig's own names, which
# HiraConfig refuses, with what to do instead.
FIELDS = {
    "lora_r": "r",
    "lora_alpha": "hira_alpha",
    "lora_dropout": "hira_dropout",
    "lora_target_modules": "target_modules",
    "lora_target_parameters": "target_parameters",
    "lora_exclude_modules": "exclude_modules",
    "lora_modules_to_save": "modules_to_save",
    "lora_fan_in_fan_out": "fan_in_fan_out",
    "lora_rank_pattern": "rank_pattern",
    "lora_alpha_pattern": "alpha_pattern",
    "peft_layers_to_transform": "layers_to_transform",
    "peft_layers_pattern": "layers_pattern",
    "peft_init_lora_weights": "init_weights",
    "peft_layer_replication": "layer_replication",
    "peft_trainable_token_indices": "trainable_token_indices",
    "peft_ensure_weight_tying": "ensure_weight_tying",
    "peft_use_dora": "use_dora",
    "peft_use_rslora": "use_rslora",
}
_TASKS = {"SequenceClassification": "SEQ_CLS", "TokenClassification": "TOKEN_CLS"}


class HiraPlugin(BasePlugin):
    """Gives axolotl the adapter ``hira``, configured by its settings for LoRA; ``lora_alpha`` becomes `hira_alpha`."""

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """The adapter's name; it is not to be loaded as a LoRA, and not to be merged and started again as by ReLoRA."""
        return [AdapterCapabilities(name="hira")]

    def load_adapter(
        self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[Any, HiraConfig] | None:
        """Return the model with its adapter, new or that of ``lora_model_dir``, and the configuration.

        Args:
            model: the base model.
            cfg: axolotl's configuration.
            inference: whether the adapter is not to be trained.
            config_only: whether the configuration is all that is wanted; then there is None for the model.

        Returns:
            None if ``cfg.adapter`` is another one.

        Raises:
            HiraError: a setting of LoRA's has no counterpart, or a value is bad.
        """
        if cfg.adapter != "hira":
            return None
        config = _config(model, cfg)
        if config_only:
            return None, config
        dtype = getattr(cfg, "peft_autocast_adapter_dtype", None)
        options = {} if dtype is None else {"autocast_adapter_dtype": dtype}
        if cfg.lora_model_dir:
            adapted = PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference, **options)
        else:
            adapted = get_peft_model(model, config, **options)
        return adapted, config

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[HiraCallback]:
        """Have the learning rate checked when the training begins, for a configuration without ``lora_alpha``."""
        return [HiraCallback(trainer, every=None)] if cfg.adapter == "hira" else []


def _config(model: Any, cfg: Any) -> HiraConfig:
    given = {field: getattr(cfg, name, None) for name, field in FIELDS.items()}
    fields = {field: value for field, value in given.items() if value not in (None, [], {})}
    if cfg.lora_target_linear:
        modules = fields.get("target_modules", [])
        named = [modules] if isinstance(modules, str) else modules
        fields["target_modules"] = sorted({*named, *find_all_linear_names(model)})
    for name in ("use_dora", "use_rslora", "ensure_weight_tying"):  # off is as good as not given
        if not fields.get(name):
            fields.pop(name, None)
    if cfg.peft and cfg.peft.loftq_config:
        fields["loftq_config"] = cfg.peft.loftq_config
    task = next((task for name, task in _TASKS.items() if name in type(model).__name__), "CAUSAL_LM")
    return HiraConfig(task_type=task, **fields)
