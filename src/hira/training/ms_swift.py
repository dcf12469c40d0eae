"""HiRA in ms-swift: ``--tuner_type hira``, with LoRA's other arguments, once this module has been imported."""

from __future__ import annotations

from typing import Any

from peft import PeftModel, get_peft_model
from swift.pipelines.train.tuner import get_modules_to_save, get_target_modules
from swift.tuner_plugin import PeftTuner, tuners_map

from hira.config.hira_config import HiraConfig

# PEFT's task for each of ms-swift's that has one
_TASKS = {
    "causal_lm": "CAUSAL_LM",
    "generative_reranker": "CAUSAL_LM",
    "decision": "CAUSAL_LM",
    "seq_cls": "SEQ_CLS",
    "reranker": "SEQ_CLS",
}


class HiraTuner(PeftTuner):
    """Gives ms-swift the tuner ``hira``, configured by its arguments for LoRA; ``--lora_alpha`` becomes `hira_alpha`.

    Saving and loading are those of ms-swift's tuners from PEFT.
    """

    @staticmethod
    def prepare_model(args: Any, model: Any) -> PeftModel:
        """Return the model with a new adapter.

        Args:
            args: ms-swift's arguments. ``lora_alpha=0`` stands for the paper's HiRA, which has no alpha.
            model: the base model, as ms-swift has loaded it.

        Raises:
            HiraError: an argument for LoRA has no counterpart, or a value is bad.
        """
        lacking = {
            "use_dora": args.use_dora,
            "lora_bias": args.lora_bias != "none",
            "lora_dtype": args.lora_dtype,
        }
        config = HiraConfig(
            task_type=_TASKS.get(args.task_type),
            r=args.lora_rank,
            hira_alpha=args.lora_alpha or None,
            hira_dropout=args.lora_dropout,
            target_modules=get_target_modules(args, model),
            target_parameters=args.target_parameters,
            modules_to_save=get_modules_to_save(args, model, args.task_type) or None,
            init_weights=args.init_weights,
            use_rslora=args.use_rslora,
            # HiraConfig refuses these, with what to do instead
            **{name: value for name, value in lacking.items() if value},
        )
        return get_peft_model(model, config)


tuners_map["hira"] = HiraTuner
