"""Image classification with Transformers' Trainer and HiRA: scikit-learn's digits, by a vision transformer.

    python examples/transformers/image_classification.py [--steps 120] [--output hira-image]

As with LoRA but for one line, that of the configuration. The model is small and has random weights; with
AutoModelForImageClassification.from_pretrained and its image processor it is any other.
"""

import argparse

import torch
from datasets import Dataset
from peft import get_peft_model
from sklearn.datasets import load_digits
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from hira import HiraConfig


def main(arguments: list[str] | None = None) -> Trainer:
    """Train, evaluate, and save the adapter with the head."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--output", default="hira-image")
    options = parser.parse_args(arguments)
    digits = load_digits()
    rows = Dataset.from_dict({"pixel_values": digits.images[:, None] / 16, "labels": digits.target}).with_format(
        "torch"
    )
    split = rows.train_test_split(test_size=200, seed=0)
    torch.manual_seed(0)
    model = ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=2,
            num_channels=1,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            initializer_range=0.1,
            num_labels=10,
        )
    )

    # with LoRA: LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", modules_to_save=["classifier"])
    config = HiraConfig(r=8, hira_alpha=16, target_modules="all-linear", modules_to_save=["classifier"])
    trainer = Trainer(
        model=get_peft_model(model, config),
        args=TrainingArguments(
            output_dir=options.output,
            max_steps=options.steps,
            learning_rate=5e-3,
            per_device_train_batch_size=32,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=split["train"],
        eval_dataset=split["test"],
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
    )
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
