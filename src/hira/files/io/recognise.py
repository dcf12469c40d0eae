"""What a folder is that was expected to be another: messages that send people to the right folder, or command."""

from __future__ import annotations

import os
import re
from pathlib import Path

from hira.errors import HiraError
from hira.files.io.strict_json import read_object

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_TENSORS = "adapter_model.safetensors"
ADAPTER_PICKLE = "adapter_model.bin"
PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"})
# Other copies of the weights: beside a changed model they would be those of the old one.
WEIGHTS = frozenset({".safetensors", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".onnx_data", ".npz", ".tflite"})


def not_an_adapter(root: Path) -> str:
    """Say what a folder without `adapter_config.json` is, and what to pass in its place."""
    names = os.listdir(root)
    adapters = _holding(root, ADAPTER_CONFIG, f"checkpoint-*/*/{ADAPTER_CONFIG}")
    if adapters:
        return (
            f"{root} has no {ADAPTER_CONFIG} of its own, but these folders in it hold adapters: {_listed(adapters)}. "
            f"Pass one of them, such as {root / adapters[-1]}."
        )
    if ADAPTER_TENSORS in names or ADAPTER_PICKLE in names:
        return f"{ADAPTER_CONFIG} is missing in {root}, which has an adapter's tensors; copy it there."
    if _is_model(names):
        return (
            f"{root} is a model's folder, where an adapter's was expected ({ADAPTER_CONFIG} is missing). `hira merge` "
            "takes the model before the adapters, `hira inspect` and `hira convert` as --base; `hira verify` checks a "
            "model that `hira merge` wrote."
        )
    return f"{ADAPTER_CONFIG} is missing in {root}; pass the folder to which save_pretrained saved the adapter."


def not_a_model(root: Path) -> str:
    """Say what a folder without a model's safetensors is, and what to pass in its place."""
    names = sorted(os.listdir(root))
    pickled = [name for name in names if Path(name).suffix in PICKLES and name != ADAPTER_PICKLE]
    weights = [name for name in pickled if name.startswith(("pytorch_model", "model", "consolidated"))]
    if ADAPTER_CONFIG in names and not weights:
        try:
            base = read_object(root / ADAPTER_CONFIG).get("base_model_name_or_path")
        except HiraError:  # it is an adapter's all the same
            base = None
        trained = f", trained on {base!r}" if isinstance(base, str) and base else ""
        return (
            f"{root} is an adapter's folder{trained}, where a model's was expected. The base model comes first: "
            f"hira merge BASE {root} -o OUT."
        )
    if pickled:
        return (
            f"{root} has its weights as pickles only, such as {(weights or pickled)[0]}, which run code when they are "
            "read. If you trust them, load the model with transformers and save it again with save_pretrained, which "
            "writes safetensors."
        )
    models, adapters = _holding(root, SINGLE, f"*/{INDEX}"), _holding(root, ADAPTER_CONFIG)
    for found, what in ((models, "models"), (adapters, "adapters, which come after the base model")):
        if found:
            return f"{root} has neither {SINGLE} nor {INDEX}, but these folders in it hold {what}: {_listed(found)}."
    others = [name for name in names if Path(name).suffix in WEIGHTS]
    held = f" but {others[0]}" if others else ", and no other weights" if "config.json" in names else ""
    return f"{root} has neither {SINGLE} nor {INDEX}{held}; pass the folder of a model in safetensors."


def _is_model(names: list[str]) -> bool:
    return bool({SINGLE, INDEX, "config.json"} & {*names}) or any(name.startswith("pytorch_model") for name in names)


def _holding(root: Path, name: str, *patterns: str) -> list[str]:
    """The folders within a folder that hold a file, those with numbers such as `checkpoint-500` in their order."""
    found = {path.parent for pattern in (f"*/{name}", *patterns) for path in root.glob(pattern)}
    return sorted((path.relative_to(root).as_posix() for path in found), key=_natural)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name)]


def _listed(names: list[str], most: int = 6) -> str:
    shown = names if len(names) <= most else [*names[: most // 2], "...", *names[-(most // 2) :]]
    return ", ".join(shown)
