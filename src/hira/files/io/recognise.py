"""The names of files, types and fields in models' and adapters' folders, and messages about other folders."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# the types of adapters in their files: HiRA, and HiRA with LoRA, which PEFT's own HiRA does not know, and refuses
HILORA = "HILORA"
PEFT_TYPES = ("HIRA", HILORA)
# fields of an adapter's configuration that PEFT's HiraConfig does not have, with their defaults
NOT_OF_PEFT: dict[str, Any] = {
    "weight_gradient": "exact",
    "target_parameters": None,
    "hira_alpha": None,
    "lora_r": 0,
    "keep_weight": False,
    "alpha_pattern": None,
    "use_rslora": False,
    "trainable_token_indices": None,
    "ensure_weight_tying": False,
    "layer_replication": None,
}
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_TENSORS = "adapter_model.safetensors"
ADAPTER_PICKLE = "adapter_model.bin"
PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"})
# Other copies of the weights: beside a changed model they would be those of the old one.
WEIGHTS = frozenset({".safetensors", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".onnx_data", ".npz", ".tflite"})


def not_an_adapter(root: Path) -> str:
    """Say what a folder without `adapter_config.json` is, and what to pass in its place."""
    names = {*os.listdir(root)}
    if adapters := _folders_with(root, ADAPTER_CONFIG):
        return (
            f"{root} has no {ADAPTER_CONFIG} of its own, but these folders in it hold adapters: {', '.join(adapters)}. "
            f"Pass one of them, such as {root / adapters[-1]}."
        )
    if names & {SINGLE, INDEX, "config.json", "pytorch_model.bin"}:
        return (
            f"{root} is a model's folder, where an adapter's was expected ({ADAPTER_CONFIG} is missing). `hira merge` "
            "takes the model before the adapters, `hira inspect` and `hira convert` take it as --base."
        )
    return f"{ADAPTER_CONFIG} is missing in {root}; pass the folder to which save_pretrained saved the adapter."


def not_a_model(root: Path) -> str:
    """Say what a folder without a model's safetensors is, and what to pass in its place."""
    pickled = [name for name in sorted(os.listdir(root)) if name.startswith(("pytorch_model", "consolidated"))]
    if pickled:
        return (
            f"{root} has its weights as pickles only, such as {pickled[0]}, which run code when they are read. If you "
            "trust them, load the model with transformers and save it again with save_pretrained, which writes "
            "safetensors."
        )
    if (root / ADAPTER_CONFIG).exists():
        return (
            f"{root} is an adapter's folder, where a model's was expected. The base model comes first: "
            f"hira merge BASE {root} -o OUT."
        )
    models = [*_folders_with(root, SINGLE), *_folders_with(root, INDEX)]
    within = f"; these folders in it hold models: {', '.join(models)}" if models else ""
    return f"{root} has neither {SINGLE} nor {INDEX}{within}. Pass the folder of a model in safetensors."


def _folders_with(root: Path, name: str) -> list[str]:
    """The folders within a folder that hold a file, `checkpoint-60` before `checkpoint-500`."""
    found = {path.parent for pattern in (f"*/{name}", f"checkpoint-*/*/{name}") for path in root.glob(pattern)}
    return sorted((path.relative_to(root).as_posix() for path in found), key=lambda path: (len(path), path))
