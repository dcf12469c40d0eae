"""What the scripts share: options, and what a real run takes from the hub, a model, its tokenizer and texts."""

import argparse
import ast
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

MODULES = ("argparse", "bisect", "calendar", "fractions", "random", "shutil", "statistics", "textwrap")


def options(description: str, arguments: list[str] | None, output: str, steps: int = 40) -> argparse.Namespace:
    """The options of a script: a model, how many steps to train, and where to."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--output", default=output)
    return parser.parse_args(arguments)


def language_model(name: str | None) -> tuple[Any, Any]:
    """A language model and its tokenizer, from the hub or a folder; without a name those that are made here."""
    if name:
        return AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    return LlamaForCausalLM(config()), tokenizer()


def config() -> LlamaConfig:
    """The configuration of a Llama over bytes, two layers of width 64."""
    torch.manual_seed(0)
    return LlamaConfig(
        vocab_size=258,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        pad_token_id=257,
        eos_token_id=256,
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that has a token for each byte."""
    symbols = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokens = Tokenizer(models.BPE(symbols, []))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token="<eos>")


def functions() -> list[tuple[str, str]]:
    """Functions of the standard library: the line that begins each, and the first line of its docstring."""
    found = []
    for module in MODULES:
        source = Path(sysconfig.get_path("stdlib"), f"{module}.py").read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
                found.append((f"def {node.name}({ast.unparse(node.args)}):\n", text.partition("\n")[0]))
    return found


if __name__ == "__main__":  # python examples/trl/stand_ins.py FOLDER saves both, in place of a model from the hub
    for part in language_model(None):
        part.save_pretrained(sys.argv[1])
