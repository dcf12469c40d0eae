"""Audio classification with Transformers' Trainer and HiRA: four kinds of sound, by wav2vec 2.0.

    python examples/transformers/audio_classification.py [--steps 120] [--output hira-audio]

As with LoRA but for one line, that of the configuration. The model is small and has random weights; with
AutoModelForAudioClassification.from_pretrained and its feature extractor it is any other.
"""

import argparse

import numpy as np
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import Trainer, TrainingArguments, Wav2Vec2Config, Wav2Vec2ForSequenceClassification

from hira import HiraConfig

RATE, SAMPLES = 4000, 800  # a fifth of a second


def sounds(count: int) -> Dataset:
    """Sine waves, square waves, rising tones and noise, each of a random pitch."""
    random, time, rows = np.random.default_rng(0), np.arange(SAMPLES) / RATE, []
    for i in range(count):
        phase = 2 * np.pi * random.uniform(100, 400) * time
        kinds = (np.sin(phase), np.sign(np.sin(phase)), np.sin(phase * (1 + 5 * time)), random.normal(size=SAMPLES))
        sound = kinds[i % 4] + 0.1 * random.normal(size=SAMPLES)
        rows.append({"input_values": (sound / sound.std()).astype("float32"), "labels": i % 4})
    return Dataset.from_list(rows).with_format("torch")


def main(arguments: list[str] | None = None) -> Trainer:
    """Train, evaluate, and save the adapter with the head."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--output", default="hira-audio")
    options = parser.parse_args(arguments)
    split = sounds(800).train_test_split(test_size=200, seed=0)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    convolutions = {"conv_dim": (32, 32), "conv_kernel": (10, 8), "conv_stride": (5, 4)}
    positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    head = {"classifier_proj_size": 32, "num_labels": 4}
    model = Wav2Vec2ForSequenceClassification(
        Wav2Vec2Config(**sizes, **convolutions, **positions, **head, apply_spec_augment=False, initializer_range=0.1)
    )

    # with LoRA: LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", modules_to_save=["classifier"])
    config = HiraConfig(r=8, hira_alpha=16, target_modules="all-linear", modules_to_save=["classifier"])
    trainer = Trainer(
        model=get_peft_model(model, config),
        args=TrainingArguments(
            output_dir=options.output,
            max_steps=options.steps,
            learning_rate=3e-3,
            per_device_train_batch_size=16,
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
