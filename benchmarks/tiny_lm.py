"""A tiny language model over bytes, pretrained here on the standard library's source, and a text to adapt it to.

Pretraining takes a minute or two on two cores; the weights are then kept in a folder and found again. The text to adapt
to is Python's language reference, which the standard library holds as `pydoc_data.topics`: prose where the model has
seen code.

    python -m benchmarks.tiny_lm FOLDER    # writes FOLDER/model and FOLDER/reference.jsonl, for `hira finetune`
"""

from __future__ import annotations

import argparse
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

PACKAGES = ["asyncio", "collections", "concurrent", "ctypes", "email", "html", "http", "importlib", "json", "logging"]
PACKAGES += ["multiprocessing", "unittest", "urllib", "wsgiref", "xml"]
CONTEXT, BATCH = 128, 8
PRETRAINING_STEPS, PRETRAINING_RATE = 1200, 2e-3
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def bare() -> LlamaForCausalLM:
    """The model with random weights."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
    )
    return LlamaForCausalLM(config)


def source_code() -> Tensor:
    """The bytes of the packages' modules, in the order of their names."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [file for package in PACKAGES for file in sorted((library / package).rglob("*.py"))]
    return _bytes(b"".join(file.read_bytes() for file in files if "test" not in file.name))


def reference_text() -> tuple[Tensor, Tensor]:
    """The language reference, in bytes: nine tenths to train on, the last to validate on."""
    from pydoc_data.topics import topics

    text = _bytes("\n".join(topics[name] for name in sorted(topics)).encode())
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]


def _bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).long()


def batches(text: Tensor, count: int, seed: int) -> Iterator[Tensor]:
    """Batches (BATCH, CONTEXT) from random places of a text."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        starts = torch.randint(len(text) - CONTEXT, (BATCH,), generator=generator)
        yield torch.stack([text[start : start + CONTEXT] for start in starts])


def pretrained(folder: Path) -> LlamaForCausalLM:
    """The pretrained model, from the folder if it is there, else trained and put there."""
    torch.manual_seed(0)
    model = bare()
    file = folder / "tiny_lm.safetensors"
    if file.exists():
        load_model(model, file)
    else:
        train(model, batches(source_code(), PRETRAINING_STEPS, seed=0), PRETRAINING_STEPS, PRETRAINING_RATE)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(model, str(file))
    return model


def train(model: nn.Module, data: Iterator[Tensor], steps: int, rate: float) -> list[float]:
    """Train what requires a gradient with AdamW, a warm-up of a twentieth and linear decay; the losses of the steps."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    warm_up = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / (steps - warm_up + 1))
    )
    losses = []
    model.train()
    for ids in data:
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def loss_on(model: nn.Module, text: Tensor, count: int = 24) -> float:
    """The mean loss over some batches, the same at each call."""
    model.eval()
    return sum(model(input_ids=ids, labels=ids).loss.item() for ids in batches(text, count, seed=12345)) / count


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, of the byte's number; byte 0, which no text has, ends a text and pads."""
    characters = bytes_to_unicode()
    tokens = Tokenizer(models.BPE({character: byte for byte, character in characters.items()}, []))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokens.decoder = decoders.ByteLevel()
    end = characters[0]
    return PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token=end, pad_token=end, model_max_length=CONTEXT)


def write(folder: Path) -> None:
    """Write the pretrained model with its tokenizer, and a row for each paragraph of the language reference."""
    from pydoc_data.topics import topics

    model = pretrained(folder)
    model.save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    paragraphs = [part.strip() for name in sorted(topics) for part in topics[name].split("\n\n") if part.strip()]
    rows = "".join(json.dumps({"text": part}) + "\n" for part in paragraphs)
    (folder / "reference.jsonl").write_text(rows, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    write(parser.parse_args().folder)
