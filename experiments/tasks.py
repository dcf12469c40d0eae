"""The models that the experiments adapt, and the tasks that they adapt them to: real data that every machine has.

A model is trained on its first task here, or comes trained from a package. A task then gives it other data of the same
kind. No row is in two of its splits.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from hira.errors import HiraError

sys.path.append(str(Path(__file__).parents[1] / "examples" / "docstrings"))

transformers.utils.logging.set_verbosity_error()  # else each new head is reported

BATCH, LENGTH, TOKENS = 16, 64, 16
HEAD, HEAD_RATE = "classifier", 0.1  # a new head, and its rate, the same for all methods
FRENCH = "jupyterlab_language_pack_fr_FR"

Data = tuple[Tensor, Tensor]  # inputs and targets, row by row


class Splits(NamedTuple):
    """The data of a task."""

    train: Data
    validation: Data
    test: Data


class Source(NamedTuple):
    """The data of the task that a model is trained on first."""

    train: Data
    test: Data


@dataclass(frozen=True)
class Model:
    """A model: how it is made, with random weights where it has a source to be trained on, and its adapted modules."""

    make: Callable[[], nn.Module]
    targets: str
    source: Callable[[], Source] | None = None


@dataclass(frozen=True)
class Task:
    """What a model is adapted to.

    Args:
        model: its name.
        data: the data.
        metric: what is measured beside the loss.
        steps: of BATCH rows.
        points: how often a run is measured, beside the start.
        every: 2 where every second row of the validation and test data is measured, to save time.
        searches: how many seeds a search for a rate has.
    """

    model: str
    data: Callable[[], Splits]
    metric: str = "accuracy"
    steps: int = 120
    points: int = 6
    every: int = 1
    searches: int = 1


# Data


def shuffled(data: Data) -> Data:
    """The rows in an arbitrary order that is always the same."""
    rows = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(0))
    return data[0][rows], data[1][rows]


def part(data: Data, first: int, last: int | None = None) -> Data:
    """Some rows."""
    return data[0][first:last], data[1][first:last]


def python_files() -> list[str]:
    """The source of the standard library's modules, in the order of their names."""
    folder = Path(sysconfig.get_path("stdlib"))
    return [path.read_text(encoding="utf-8", errors="ignore") for path in sorted(folder.glob("*.py"))]


def docstrings(source: str) -> Iterator[str]:
    """The docstrings of a module's classes and functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.Module) and (text := ast.get_docstring(node)):
            yield text


def windows(text: str) -> Data:
    """Bytes of a text, (n, LENGTH), and the bytes after each of them."""
    data = torch.tensor(list(text.encode()), dtype=torch.int64)
    rows = (len(data) - 1) // LENGTH
    return data[: rows * LENGTH].view(rows, LENGTH), data[1 : rows * LENGTH + 1].view(rows, LENGTH)


@cache
def code() -> Source:
    """The standard library's modules without comments; the test is the source of one of its packages, asyncio."""
    text = "\n".join(line for file in python_files() for line in file.splitlines() if "#" not in line)
    folder = Path(sysconfig.get_path("stdlib")) / "asyncio"
    others = "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py")))
    return Source(windows(text), part(shuffled(windows(others)), 0, 200))


@cache
def documentation() -> Splits:
    """The English of docstrings; those of modules later in the alphabet for validation and test."""
    files = python_files()
    half = len(files) // 2
    texts = ["\n\n".join(text for file in part for text in docstrings(file)) for part in (files[:half], files[half:])]
    later = windows(texts[1])
    return Splits(windows(texts[0]), part(shuffled(part(later, 400)), 0, 200), part(later, 0, 400))


@cache
def french() -> Splits:
    """The French of JupyterLab's messages, each sentence once, in an arbitrary order."""
    found = importlib.util.find_spec(FRENCH)
    if found is None or found.origin is None:
        raise HiraError(f"{FRENCH} is not installed: pip install jupyterlab-language-pack-fr-FR==4.5.post3")
    texts = set()
    for path in Path(found.origin).parent.glob("locale/*/LC_MESSAGES/*.json"):
        for english, translations in json.loads(path.read_text(encoding="utf-8")).items():
            if english:  # the entry of the empty text is about the file
                texts |= {text for text in translations if text and text != english.split("\x04")[-1]}
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    ordered = sorted(texts)
    rows = windows("\n".join(ordered[index] for index in order))
    return Splits(part(rows, 601), part(rows, 401, 600), part(rows, 0, 400))  # a row between two splits is in neither


def images(turns: int) -> Data:
    """Images of digits, turned to the left by a number of right angles."""
    bunch = load_digits()
    pixels = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    return pixels.rot90(turns, (2, 3)), torch.tensor(bunch.target)


@cache
def upright_digits() -> Source:
    """Images of digits as they were written."""
    data = images(0)
    third = len(data[0]) // 3
    return Source(part(data, third), part(data, 0, third))


@cache
def turned_digits() -> Splits:
    """The same lying on their side."""
    data = images(1)
    third = len(data[0]) // 3
    return Splits(part(data, third), part(data, 0, third // 3), part(data, third // 3, third))


@cache
def packages() -> Splits:
    """Which package is a docstring from? The task of examples/docstrings, on the first tokens of each text."""
    from data import load_docstrings
    from model import load_tokenizer

    data, tokenizer = load_docstrings(), load_tokenizer()

    def tensors(split: str, step: int) -> Data:
        texts, labels = data[split]["text"][::step], data[split]["label"][::step]
        options = {"truncation": True, "max_length": TOKENS, "padding": "max_length", "return_tensors": "pt"}
        return tokenizer(texts, **options)["input_ids"], torch.tensor(labels)

    return Splits(tensors("train", 1), tensors("validation", 2), tensors("test", 2))


def tumours(label: int) -> Data:
    """Means (n, 10) of ten measures of a tumour's cells, and the largest values (n, 10), all standardised."""
    bunch = load_breast_cancer()
    values = torch.tensor(bunch.data, dtype=torch.float32)
    values = ((values - values.mean(0)) / values.std(0))[torch.tensor(bunch.target) == label]
    return shuffled((values[:, :10], values[:, 20:]))


@cache
def benign_tumours() -> Source:
    """Largest values from means, in benign tumours."""
    data = tumours(1)
    return Source(part(data, 100), part(data, 0, 100))


@cache
def malignant_tumours() -> Splits:
    """The same in malignant tumours."""
    data = tumours(0)
    return Splits(part(data, 90), part(data, 50, 90), part(data, 0, 50))


# Models


class ConvNet(nn.Module):
    """Two convolutions and two linear layers over an image of 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1)
        self.third, self.last = nn.Linear(64 * 4, 128), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, 1, 8, 8) -> logits (batch, 10)."""
        x = torch.max_pool2d(torch.relu(self.first(x)), 2)
        x = torch.max_pool2d(torch.relu(self.second(x)), 2)
        return self.last(torch.relu(self.third(x.flatten(1))))


class Regressor(nn.Module):
    """Three linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(10, 64), nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, 10) -> (batch, 10)."""
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))


class Decoder(nn.Module):
    """A Llama of two layers over bytes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.llama = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=256,
                hidden_size=width,
                intermediate_size=3 * width,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=4,
                max_position_embeddings=LENGTH,
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, LENGTH) -> logits (batch, LENGTH, 256)."""
        logits: Tensor = self.llama(x, use_cache=False).logits
        return logits


class Classifier(nn.Module):
    """MiniLM with a new head over the classes of `packages`."""

    def __init__(self) -> None:
        super().__init__()
        from model import load_base

        self.bert = load_base(int(packages().train[1].max()) + 1)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, TOKENS), padded with zeros -> logits (batch, classes)."""
        logits: Tensor = self.bert(input_ids=x, attention_mask=(x != 0).long()).logits
        return logits


LLAMA = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
MODELS = {
    "decoder of width 64": Model(lambda: Decoder(64), LLAMA, code),
    "decoder of width 128": Model(lambda: Decoder(128), LLAMA, code),
    "convolutional net": Model(ConvNet, "first second third last", upright_digits),
    "regressor": Model(Regressor, "first second last", benign_tumours),
    "MiniLM": Model(Classifier, "query key value"),
}
TASKS = {
    "digits": Task("convolutional net", turned_digits, searches=3),
    "tumours": Task("regressor", malignant_tumours, "R²", searches=3),
    "English": Task("decoder of width 64", documentation, steps=80, every=2),
    "French": Task("decoder of width 64", french, steps=80, every=2),
    "docstrings": Task("MiniLM", packages, steps=40, points=1, every=2),
}


def metric(outputs: Tensor, targets: Tensor) -> float:
    """The share of right answers, or of the targets' variance that is explained."""
    if targets.is_floating_point():
        return 1 - float((outputs - targets).square().sum() / (targets - targets.mean(0)).square().sum())
    return float((outputs.flatten(0, -2).argmax(-1) == targets.flatten()).float().mean())


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean cross entropy of logits, or the mean squared error of numbers."""
    if targets.is_floating_point():
        return nn.functional.mse_loss(outputs, targets)
    return nn.functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())


@torch.no_grad()
def measured(model: nn.Module, data: Data) -> tuple[float, float]:
    """The loss, infinity where training has left no number, and the metric."""
    model.eval()
    outputs = model(data[0])
    value = float(loss(outputs, data[1]))
    return value if math.isfinite(value) else math.inf, metric(outputs, data[1])
