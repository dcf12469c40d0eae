"""What a real run takes from the hub, made here: a small Llama with random weights, its tokenizer, and texts."""

import ast
import sysconfig
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

MODULES = ("argparse", "bisect", "calendar", "fractions", "random", "shutil", "statistics", "textwrap")


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
