"""Direct preference optimisation with TRL and HiRA: summaries are preferred to the same in capitals.

    python examples/trl/dpo.py [--model NAME_OR_FOLDER] [--steps 40] [--output hira-dpo]

As with LoRA but for one line, `peft_config`. The reference is the model without the adapter: it takes no memory.
Without --model the model is small and has random weights.
"""

import argparse

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer

import stand_ins
from hira import HiraConfig


def main(arguments: list[str] | None = None) -> DPOTrainer:
    """Train, and save the adapter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--output", default="hira-dpo")
    options = parser.parse_args(arguments)
    if options.model:
        model = AutoModelForCausalLM.from_pretrained(options.model)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    else:
        model, tokenizer = LlamaForCausalLM(stand_ins.config()), stand_ins.tokenizer()
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
