"""Direct preference optimisation with TRL and HiRA: summaries are preferred to the same in capitals.

    python examples/trl/dpo.py [--model NAME_OR_FOLDER] [--steps 40] [--output hira-dpo]

As with LoRA but for one line, `peft_config`. The reference is the model without the adapter: it takes no memory.
Without --model the model is small and has random weights.
"""

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

import stand_ins
from hira import HiraConfig


def main(arguments: list[str] | None = None) -> DPOTrainer:
    """Train, and save the adapter."""
    options = stand_ins.options(__doc__, arguments, "hira-dpo")
    model, tokenizer = stand_ins.language_model(options.model)
    preferences = [{"prompt": line, "chosen": text, "rejected": text.upper()} for line, text in stand_ins.functions()]

    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=options.output,
            use_cpu=not torch.cuda.is_available(),
            max_steps=options.steps,
            learning_rate=3e-3,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=Dataset.from_list(preferences),
        processing_class=tokenizer,
        # with LoRA: LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
        peft_config=HiraConfig(r=8, hira_alpha=16, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
