"""Which standard-library package is a docstring from? Real text that every Python carries with it.

The files are parsed, never imported, so gathering is safe, quick and the same at every run of one Python version.
Another version has other docstrings, so accuracies compare within one version only.
"""

import ast
import hashlib
import re
import sys
import sysconfig
import warnings
from collections import defaultdict, deque
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset, DatasetDict

PACKAGES = 20  # the packages with the most docstrings are the classes
DOCSTRINGS_PER_PACKAGE = 200
SHORTEST = 25  # characters; below it lie "Return self." and the like
SHARES = {"train": 0.60, "validation": 0.15, "test": 0.25}
TEST_FOLDERS = {"test", "tests", "idle_test"}


def load_docstrings() -> DatasetDict:
    """Gather the data set: splits train, validation and test, each with the columns text and label."""
    texts = gather()
    packages = sorted(sorted(texts), key=lambda package: -len(texts[package]))[:PACKAGES]
    splits: dict[str, dict[str, list]] = {name: {"text": [], "label": []} for name in SHARES}
    for label, package in enumerate(sorted(packages)):
        # The order of the hashes is arbitrary but fixed, so the cap and the split need no seed.
        chosen = sorted(texts[package], key=digest)[:DOCSTRINGS_PER_PACKAGE]
        first, share = 0, 0.0
        for name in SHARES:
            share += SHARES[name]
            last = round(share * len(chosen))
            splits[name]["text"] += chosen[first:last]
            splits[name]["label"] += [label] * (last - first)
            first = last
    return DatasetDict({name: Dataset.from_dict(columns) for name, columns in splits.items()})


def gather() -> dict[str, list[str]]:
    """Every distinct docstring of every package of the standard library, the package's name masked."""
    root = Path(sysconfig.get_path("stdlib"))
    texts: dict[str, list[str]] = defaultdict(list)
    seen: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        folders = path.relative_to(root).with_suffix("").parts
        package = folders[0]
        if package not in sys.stdlib_module_names or package.startswith("_") or TEST_FOLDERS & set(folders):
            continue
        for docstring in docstrings(path):
            text = mask_name(docstring, package)
            # Texts that start alike would be one example in two splits once cut to 64 tokens: keep the first.
            start = " ".join(re.findall("[a-z]+", text.lower())[:30])
            if len(text) >= SHORTEST and start not in seen:
                seen.add(start)
                texts[package].append(text)
    return texts


def docstrings(path: Path) -> Iterator[str]:
    """The docstrings of a source file: its own, and those of its classes and functions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old files hold invalid escapes
        waiting: deque[ast.AST] = deque([ast.parse(path.read_bytes())])
    while waiting:
        node = waiting.popleft()
        for block in ("body", "handlers", "cases", "orelse", "finalbody"):  # no expression holds a docstring
            waiting.extend(getattr(node, block, ()))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield " ".join(text.split())


def mask_name(text: str, package: str) -> str:
    """Replace every dotted word that spells the package's name by [MASK].

    Spellings that count: any case, "tar file" or "tar-file" for tarfile, "HTTPServer" and "http.client" for http, and
    the name without its "lib" ("URL" for urllib, "IDLE" for idlelib). A name of two letters ("os") counts as a
    whole word only.
    """
    names = {package, package.removeprefix("lib").removesuffix("lib")}
    spellings = "|".join(
        "[ _-]?".join(name) if len(name) > 2 else rf"\b{name}\b" for name in sorted(names, key=len, reverse=True)
    )
    return re.sub(rf"[\w.]*(?:{spellings})[\w.]*", "[MASK]", text, flags=re.IGNORECASE)


def digest(text: str) -> str:
    """A hash that, unlike Python's own, is the same in every process."""
    return hashlib.sha256(text.encode()).hexdigest()
