"""`hira convert`: an adapter's folder in another form."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor

from hira.errors import HiraError
from hira.files.convert import conversion
from hira.files.convert.conversion import LoraReport
from hira.files.io.adapter_folder import PREFIX, Adapter, read_adapter, read_config, read_tensors
from hira.files.io.hub import PathLike, located, name_of
from hira.files.io.model_card import CARD, card, quoted
from hira.files.io.output_folder import Output
from hira.files.io.recognise import ADAPTER_CONFIG, ADAPTER_TENSORS
from hira.files.model.base_weights import BaseWeights


@dataclass(frozen=True)
class Conversion:
    """What `convert_adapter` wrote.

    Args:
        path: the new adapter's folder.
        peft_type: "HIRA" or "LORA".
        rank: its rank.
        modules: the number of modules that it adapts.
        lora: the losses of a LoRA, None for HiRA.
        notes: why it is not certain that the base model is the right one.
    """

    path: Path
    peft_type: str
    rank: int
    modules: int
    lora: LoraReport | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON has it."""
        return asdict(self) | {"path": str(self.path)}


@torch.no_grad()
def convert_adapter(
    adapter: PathLike,
    out: PathLike,
    *,
    source: Literal["original"] | None = None,
    to: Literal["lora"] | None = None,
    rank: int | None = None,
    base: PathLike | None = None,
    fold: bool = False,
    overwrite: bool = False,
    any_base: bool = False,
    allow_pickle: bool = False,
) -> Conversion:
    """Write an adapter in another form: as PEFT's HiRA, or as a LoRA that approximates it.

    Equation: for a LoRA of rank k, ``L = argmin ||W0 * BA - L||`` over the matrices of that rank, for each module.

    Args:
        adapter: the folder of the adapter, or its name on the hub, `owner/name` or `owner/name@revision`.
        out: the folder to write: `adapter_config.json`, `adapter_model.safetensors`, a model card that says what it was
            made from, and a manifest for `verify_folder`. It is there whole or not at all.
        source: "original" if the adapter is of the paper's repository; otherwise it is one of PEFT's format.
        to: "lora" for a LoRA, in float32. What is beyond its rank is lost.
        rank: the LoRA's rank.
        base: the folder of the model that the adapter was trained on, not quantised, or its name on the hub. A LoRA
            needs it, nothing else.
        fold: write it so that PEFT's own HiRA loads it: modules of several ranks get the largest, and options that
            PEFT does not know are removed.
        overwrite: replace what `out` holds.
        any_base: take the base model although the adapter was trained on another.
        allow_pickle: read `adapter_model.bin` where there is no safetensors file, with ``weights_only=True``.

    Returns:
        What was written; for a LoRA with the error of each layer.

    Raises:
        HiraError: the options contradict each other, a file is missing or damaged, a number is not finite, the adapter
            cannot be of the other form (`hira merge` serves all), the base model is another one or quantised, or `out`
            cannot be written. `out` is as it was then.

    Source: HiRA (ICLR 2025) for the update; Eckart and Young (1936) for its approximation.
    """
    if (problem := contradiction(source, to, rank, base, fold)) is not None:
        raise HiraError(problem)
    read = [folder for folder in (adapter, base) if folder is not None and os.path.isdir(folder)]
    Output(out, overwrite, read).check_target()  # before anything is downloaded
    adapter, base = located(adapter, "adapter"), None if base is None else located(base, "model")
    output = Output(out, overwrite, [adapter] if base is None else [adapter, base])
    output.check_target()
    found = _read(adapter, source, allow_pickle)
    config: Mapping[str, Any] = found.config
    tensors: Mapping[str, Tensor] = found.tensors
    lora, notes = None, list[str]()
    if base is not None and rank is not None:
        weights = BaseWeights(base, found, any_base)
        notes = weights.notes
        config, converted, lora = conversion.to_lora(found, weights, rank)
        tensors = {**converted, **_attention_outputs(found, weights, rank)}
    elif fold:
        config, tensors = conversion.fold(found)
    result = Conversion(output.target, config["peft_type"], config["r"], len(found.modules), lora, tuple(notes))
    with output:
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
        output.write(ADAPTER_CONFIG, f"{text}\n".encode())
        contents = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
        }
        output.write(ADAPTER_TENSORS, save(contents, {"format": "pt"}))
        output.write(CARD, _card(found.path, result, source, fold, config.get("base_model_name_or_path")))
    return result


def contradiction(
    source: str | None, to: str | None, rank: int | None, base: PathLike | None, fold: bool
) -> str | None:
    """Return a message about options of `convert_adapter` that contradict each other; None if they do not."""
    if source not in (None, "original"):
        return f"An adapter can be converted from 'original', not from {source!r} (--from, source=)."
    if to not in (None, "lora"):
        return f"An adapter can be converted to 'lora', not to {to!r} (--to, to=)."
    if source is None and to is None and not fold:
        return "There is nothing to convert: pass --from original, --to lora or --fold (source=, to=, fold=)."
    if to is not None and fold:
        return "PEFT knows every LoRA: pass --to lora or --fold (to=, fold=), not both."
    if to is not None and (rank is None or base is None):
        return "A LoRA needs a rank and the base model's weights: pass --rank and --base with --to (rank=, base=)."
    if to is None and (rank is not None or base is not None):
        return "A rank and a base model are for a LoRA only: pass --to lora with them (to='lora'), or leave them out."
    return None


def _read(path: PathLike, source: str | None, allow_pickle: bool) -> Adapter:
    """The adapter in PEFT's format; all its numbers are finite."""
    if source is None:
        adapter = read_adapter(path, allow_pickle)
    else:
        root, config = read_config(path)
        adapter = conversion.from_original(root, config, read_tensors(root, allow_pickle))
    adapter.check_finite()
    return adapter


def _attention_outputs(adapter: Adapter, weights: BaseWeights, rank: int) -> dict[str, Tensor]:
    """LoRA tensors of zeros for output projections without HiRA; PEFT's LoRA always adapts both weights."""
    zeros: dict[str, Tensor] = {}
    for module, factors in adapter.modules.items():
        output = f"{module}.base_layer.out_proj"
        if weights.name(module).endswith(".in_proj_weight") and output not in adapter.modules:
            width = factors.shapes[0][1]
            zeros[f"{PREFIX}{output}.lora_A.weight"] = torch.zeros(rank, width)
            zeros[f"{PREFIX}{output}.lora_B.weight"] = torch.zeros(width, rank)
    return zeros


def _card(path: Path, result: Conversion, source: str | None, fold: bool, base: Any) -> bytes:
    """The model card."""
    method, lora = "LoRA" if result.lora else "HiRA", result.lora
    origin = "the HiRA paper's repository" if source else "PEFT's HiRA"
    facts = {"converted from": f"{quoted(name_of(path))}, an adapter of {origin}"}
    command = ["hira", "convert", name_of(path), "-o", "OUT", *(("--from", source) if source else ())]
    text = []
    if lora is not None:
        worst = max(lora.layers, key=lambda layer: layer.relative_error)
        facts["relative error over all layers"] = f"{lora.relative_error:.6g}"
        facts["largest of a layer"] = f"{worst.relative_error:.6g}, {quoted(worst.name)}"
        command += ["--to", "lora", "--rank", str(lora.rank), "--base", "BASE"]
        text = [lora.statement]
    if fold:
        command += ["--fold"]
    base = base if isinstance(base, str) else None
    return card(f"{method} of rank {result.rank}", text, facts, command, base, (method.lower(),), "peft")
