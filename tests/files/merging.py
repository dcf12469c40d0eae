"""A model and its adapters in folders, merged in memory by PEFT and on the disk by hira, and the two compared."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hira.files.merge.merge_checkpoint import MergeReport, merge_checkpoint

SHARD = 3000  # bytes; a tiny model is some ten files


class Folders(NamedTuple):
    """The folder of a base model, those of the adapters on it, and that of what PEFT merges from them.

    `adapted` computes with the adapters.
    """

    base: Path
    adapters: list[Path]
    memory: Path
    adapted: peft.PeftModel

    def merge(self, **options: Any) -> tuple[MergeReport, Path]:
        """Merge on the disk."""
        out = self.base.with_name("out")
        return merge_checkpoint(self.base, self.adapters, out, **options), out

    def rewrite(self, change: Callable[[dict[str, Tensor]], None]) -> None:
        """Change the base model's tensors in its only file."""
        path = self.base / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})

    def configure(self, **values: Any) -> None:
        """Change values of the base model's configuration, or remove those that are None."""
        config = {key: value for key, value in {**config_of(self.base), **values}.items() if value is not None}
        (self.base / "config.json").write_text(json.dumps(config))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """The tensors of a model's folder by the safetensors library; each file's are those that the index has there."""
    found, places = {}, {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        assert not found.keys() & tensors.keys()
        found |= tensors
        places |= dict.fromkeys(tensors, path.name)
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        assert not index.exists()
    else:
        content = json.loads(index.read_text())
        assert content["weight_map"] == places
        assert content["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    return found


class Contents(NamedTuple):
    """The names of a file's tensors in the order of their bytes, and its metadata."""

    tensors: list[str]
    metadata: dict[str, str] | None


def layout_of(folder: Path) -> dict[str, Contents]:
    """What each file of weights holds."""
    layout = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            layout[path.name] = Contents(file.offset_keys(), file.metadata())
    return layout


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def assert_same_tensors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Equal names, dtypes, shapes and bits."""
    assert found.keys() == wanted.keys()
    assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in wanted.items()}
    assert [name for name, tensor in found.items() if not torch.equal(tensor, wanted[name])] == []


def adapted(base: nn.Module, *configs: peft.HiraConfig) -> peft.PeftModel:
    """A model with random adapters a0, a1, ... and with random parameters where adapters bring them whole."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, configs[0], adapter_name="a0")
        for i, config in enumerate(configs[1:], 1):
            model.add_adapter(f"a{i}", config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "hira_" in name or "modules_to_save" in name:
                nn.init.normal_(parameter, std=0.3)
    return model.eval()


def save(model: nn.Module, folder: Path, shard: int | None = None) -> Path:
    """Save a model of transformers as it does it, another as its state dict."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, transformers.PreTrainedModel):
        model.save_pretrained(folder, **({} if shard is None else {"max_shard_size": shard}))
    else:
        save_file({name: t.contiguous() for name, t in model.state_dict().items()}, folder / "model.safetensors")
    return folder


def made(
    tmp_path: Path,
    base: nn.Module,
    configs: Sequence[peft.HiraConfig],
    *,
    shard: int | None = None,
    load: Callable[[Path], nn.Module] | None = None,
) -> Folders:
    """Save a base model, its adapters, and what PEFT merges in memory; `load` makes of the base what is adapted."""
    folder = save(base.eval(), tmp_path / "base", shard)
    model = adapted(base if load is None else load(folder), *configs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "adapters")
        merged, names = tmp_path / "memory", [f"a{i}" for i in range(len(configs))]
        adapters = [tmp_path / "adapters" / name for name in names]
        # merging takes the model apart, which is compared with what it gives
        save(copy.deepcopy(model).merge_and_unload(adapter_names=names), merged, shard)
    return Folders(folder, adapters, merged, model)


def hira_config(*targets: str, r: int = 2, **options: Any) -> peft.HiraConfig:
    return peft.HiraConfig(r=r, target_modules=list(targets), **options)


def assert_loads_as_merged(folders: Folders, out: Path) -> None:
    """A merged folder, loaded by the class that was adapted, has the parameters of what PEFT merges in memory."""
    names = list(folders.adapted.peft_config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = folders.adapted.merge_and_unload(adapter_names=names)
        loaded = type(merged).from_pretrained(out)
    assert_same_tensors(loaded.state_dict(), merged.state_dict())
