"""Supervised fine-tuning with TRL and HiRA: a function's summary from its first line.

    python examples/trl/sft.py [--model NAME_OR_FOLDER] [--steps 40] [--output hira-sft]

As with LoRA but for one line, `peft_config`. Without --model the model is small and has random weights.
"""

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import stand_ins
from hira import HiraConfig


def main(arguments: list[str] | None = None) -> SFTTrainer:
    """Train, and save the adapter."""
    options = stand_ins.options(__doc__, arguments, "hira-sft")
    model, tokenizer = stand_ins.language_model(options.model)

    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=options.output,
            use_cpu=not torch.cuda.is_available(),
            max_steps=options.steps,
            learning_rate=1e-2,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=Dataset.from_list([{"prompt": line, "completion": text} for line, text in stand_ins.functions()]),
        processing_class=tokenizer,
        # with LoRA: LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
        peft_config=HiraConfig(r=8, hira_alpha=16, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
