"""Prepares the recipes' data: a public data set's own files in, rows for `hira finetune` out.

    python recipes/prepare.py commonsense commonsense_170k.json --output data/commonsense
    python recipes/prepare.py convai2 train_self_original.txt --output data/convai2
    python recipes/prepare.py metamath MetaMathQA-395K.json --output data/metamath
    python recipes/prepare.py peft-metamathqa MetaMathQA-395K.json --output data/peft-metamathqa
    python recipes/prepare.py cat cat-image-dataset --prompts default_training_params.json --output data/cat

The rows have a prompt and a completion, in train.jsonl and, but for PEFT's, validation.jsonl; those of the cat an image
and a prompt, in metadata.jsonl. Where each format comes from is in recipes/README.md, with the links to the files.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

# LLM-Adapters' instruction for its commonsense data, as HiRA's authors have it (dataset/format_inputs.py)
INSTRUCTION = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.  \n\n"
    "### Instruction:\n{}\n\n### Response:\n"
)
CONTEXT = "CONTEXT: {} TARGET:"  # HiRA's authors, for ConvAI2 and MetaMath
PEFT_QUESTION = "Question: {} Think step by step.\nAnswer:"  # PEFT's query_template
PEFT_CHARACTERS = 1300  # PEFT leaves longer rows out
VALIDATION_ROWS, VALIDATION_SEED = 120, 58  # HiRA's paper, section 5.1; the seed is the authors'
PEFT_HELD_BACK = 6  # images that PEFT validates and tests on

Row = dict[str, str]


def commonsense(path: Path) -> Iterator[Row]:
    """Rows of commonsense_170k.json: the answer follows its instruction."""
    for row in records(path, "instruction", "output"):
        yield {"prompt": INSTRUCTION.format(row["instruction"]), "completion": row["output"].strip()}


def convai2(path: Path) -> Iterator[Row]:
    """Rows of ParlAI's train_self_original.txt: each reply follows the speaker's persona and all turns before it."""
    persona: list[str] = []
    turns: list[str] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        found = re.fullmatch(r"(\d+) (?:your persona: (.+)|([^\t]+)\t([^\t]+)(?:\t.*)?)", line.rstrip())
        if found is None:
            raise SystemExit(f"{path}:{number}: neither a line of a persona nor a turn with its reply: {line[:60]!r}")
        place, about, said, reply = found.groups()
        if place == "1":
            persona, turns = [], []
        if about:
            persona.append(about)
            continue
        turns.append(f"Q: {said}")
        yield {"prompt": CONTEXT.format(" ".join(["P:", *persona, *turns])), "completion": f" {reply.strip()}"}
        turns.append(f"R: {reply}")


def metamath(path: Path) -> Iterator[Row]:
    """Rows of MetaMathQA-395K.json, as HiRA's authors write them."""
    for row in records(path, "query", "response"):
        yield {"prompt": CONTEXT.format(row["query"]), "completion": f" {row['response'].strip()}"}


def peft_metamathqa(path: Path) -> Iterator[Row]:
    """Rows of MetaMathQA-395K.json, as PEFT's comparison writes and chooses them, in their order."""
    for row in records(path, "query", "response"):
        if len(f"{row['query']} {row['response']}") <= PEFT_CHARACTERS:
            yield {"prompt": PEFT_QUESTION.format(row["query"]), "completion": row["response"]}


def records(path: Path, *names: str) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON or JSON Lines, which must have these texts."""
    text = path.read_text(encoding="utf-8")
    rows = json.loads(text) if text.lstrip().startswith("[") else map(json.loads, text.splitlines())
    for number, row in enumerate(rows, 1):
        if missing := [name for name in names if not isinstance(row.get(name), str)]:
            raise SystemExit(f"{path}, row {number}: no text {' or '.join(missing)}; there is {', '.join(row)}")
        yield row


def cat(folder: Path, prompts: Path, output: Path) -> None:
    """Images of PEFT's cat-image-dataset that it trains on, each with its prompt, for recipes/flux2_klein.py."""
    import numpy as np
    from datasets import load_dataset

    images = load_dataset(str(folder), split="train")
    texts = json.loads(prompts.read_text(encoding="utf-8"))["instance_prompts"]
    if len(texts) != len(images):
        raise SystemExit(f"{prompts} has {len(texts)} prompts, and {folder} {len(images)} images")
    order = np.arange(len(images))
    np.random.RandomState(0).shuffle(order)
    output.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in order[:-PEFT_HELD_BACK].tolist():
        images[index]["image"].convert("RGB").save(output / f"{index:02}.png")
        rows.append({"file_name": f"{index:02}.png", "prompt": texts[index]})
    write(output / "metadata.jsonl", rows)


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write a file of JSON Lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Prepare one data set."""
    makers = {
        "commonsense": commonsense,
        "convai2": convai2,
        "metamath": metamath,
        "peft-metamathqa": peft_metamathqa,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=[*makers, "cat"])
    parser.add_argument("source", type=Path, help="the file that was downloaded; for the cat the folder")
    parser.add_argument("--prompts", type=Path, help="PEFT's file of the cat's prompts")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write to")
    options = parser.parse_args(arguments)
    if (options.recipe == "cat") != (options.prompts is not None):
        parser.error("--prompts belongs to cat")
    if not options.source.exists():
        parser.error(f"there is no {options.source}")
    if options.recipe == "cat":
        cat(options.source, options.prompts, options.output)
        return
    rows = list(makers[options.recipe](options.source))
    if options.recipe != "peft-metamathqa":
        if len(rows) <= VALIDATION_ROWS:
            raise SystemExit(f"{options.source} has {len(rows)} rows; {VALIDATION_ROWS} are held back to validate on")
        random.Random(VALIDATION_SEED).shuffle(rows)
        write(options.output / "validation.jsonl", rows[-VALIDATION_ROWS:])
        rows = rows[:-VALIDATION_ROWS]
    write(options.output / "train.jsonl", rows)


if __name__ == "__main__":
    main()
