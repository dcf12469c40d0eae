"""A reward model with TRL and HiRA: summaries are worth more than the same in capitals.

    python examples/trl/reward.py [--model NAME_OR_FOLDER] [--steps 40] [--output hira-reward]

As with LoRA but for one line, `peft_config`. The head is new, so it is trained and saved in full. Without --model the
model is small and has random weights.
"""

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaForSequenceClassification
from trl import RewardConfig, RewardTrainer

import stand_ins
from hira import HiraConfig


def main(arguments: list[str] | None = None) -> RewardTrainer:
    """Train, and save the adapter with the head."""
    options = stand_ins.options(__doc__, arguments, "hira-reward")
    if options.model:
        model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=1)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    else:
        config = stand_ins.config()
        config.num_labels = 1
        model, tokenizer = LlamaForSequenceClassification(config), stand_ins.tokenizer()

    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(
            output_dir=options.output,
            use_cpu=not torch.cuda.is_available(),
            max_steps=options.steps,
            learning_rate=3e-3,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=Dataset.from_list(
            [{"chosen": line + text, "rejected": line + text.upper()} for line, text in stand_ins.functions()]
        ),
        processing_class=tokenizer,
        # with LoRA: LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules="all-linear")
        peft_config=HiraConfig(task_type="SEQ_CLS", r=8, hira_alpha=16, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
