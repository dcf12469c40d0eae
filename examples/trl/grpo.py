"""Group relative policy optimisation with TRL and HiRA: completions are rewarded for their share of letters.

    python examples/trl/grpo.py [--model NAME_OR_FOLDER] [--steps 30] [--output hira-grpo]

As with LoRA but for one line, `peft_config`. Without --model the model is small and has random weights.
"""

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

import stand_ins
from hira import HiraConfig


def letters(completions: list[str], **columns: object) -> list[float]:
    """The share of ASCII letters in each completion."""
    return [sum(c.isascii() and c.isalpha() for c in text) / max(len(text), 1) for text in completions]


def main(arguments: list[str] | None = None) -> GRPOTrainer:
    """Train, and save the adapter."""
    options = stand_ins.options(__doc__, arguments, "hira-grpo", steps=30)
    model, tokenizer = stand_ins.language_model(options.model)

    trainer = GRPOTrainer(
        model=model,
        reward_funcs=letters,
        args=GRPOConfig(
            output_dir=options.output,
            use_cpu=not torch.cuda.is_available(),
            max_steps=options.steps,
            learning_rate=3e-2,
            per_device_train_batch_size=16,
            num_generations=16,
            max_completion_length=4,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=Dataset.from_list([{"prompt": line} for line, _ in stand_ins.functions()]),
        processing_class=tokenizer,
        # with LoRA: LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
        peft_config=HiraConfig(r=8, hira_alpha=16, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
