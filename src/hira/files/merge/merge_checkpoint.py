"""Merging adapters into a model on a disk, a block of a weight at a time."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from hira.errors import HiraError
from hira.files.io.adapter_folder import Adapter
from hira.files.io.hub import name_of
from hira.files.io.model_card import CARD, card, dtype_name, quoted
from hira.files.io.model_folder import ModelFolder
from hira.files.io.output_folder import Output
from hira.files.io.recognise import ADAPTER_PICKLE, ADAPTER_TENSORS, INDEX
from hira.files.merge.merged_model import PathLike, adapter_folders, adapter_weights, merged_model
from hira.files.merge.plan import Options, Plan, Rounding
from hira.files.merge.tensors import Workers
from hira.files.model.parameters import CONFIG, Parameters
from hira.files.model.provenance import MERGED, merge_record

BASE_CARD = "README.base.md"
DTYPES = ("float64", "float32", "bfloat16", "float16")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class MergeReport:
    """What a merge did, or would do.

    Args:
        out: the folder of the merged model.
        dry_run: whether nothing was written.
        merged: the names of the tensors with W'.
        replaced: those that an adapter saved whole.
        added: those that the base model's files lack.
        tensors: the number of all tensors.
        shards: the sizes of the files of weights, by name.
        resumed: those that an interrupted merge had finished.
        skipped: the base model's files that are not copied, with the reasons.
        notes: what a user should know about the merged model.
        nbytes: the size of the merged model.
        free_bytes: what was free on its disk before.
        seconds: how long it took.
    """

    out: Path
    dry_run: bool
    merged: tuple[str, ...]
    replaced: tuple[str, ...]
    added: tuple[str, ...]
    tensors: int
    shards: dict[str, int]
    resumed: tuple[str, ...]
    skipped: dict[str, str]
    notes: tuple[str, ...]
    nbytes: int
    free_bytes: int
    seconds: float


@torch.no_grad()
def merge_checkpoint(
    base: PathLike,
    adapters: PathLike | Sequence[PathLike],
    out: PathLike,
    *,
    weights: Sequence[float] | None = None,
    dtype: str | torch.dtype | None = None,
    rounding: Rounding | None = None,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    any_base: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Merge adapters into a model on a disk, and write the merged model to a folder.

    Equation: ``W' = W0 * (1 + sum_i w_i B_i A_i)``, for all weights that the adapters are on.

    Tensors are read, formed and written a block at a time, W' by the function by which the layers form it: the files
    have what `merge_and_unload` gives, bit for bit. All else is copied: other tensors as bytes, the layout of shards,
    configuration, tokenizer, and code. The folder is there whole or not at all, and a merge that was interrupted goes
    on with the files that it had finished when it is called again. A thread of the process that uses PyTorch for the
    first time during a merge may be given one of PyTorch's threads only.

    Args:
        base: the folder of the base model, in safetensors; or its name on the hub, `owner/name` or
            `owner/name@revision`, which is downloaded to the hub's cache.
        adapters: the folder of a HiRA adapter, or its name on the hub; or several.
        out: the folder to write.
        weights: w_i, a number for each adapter; 1 by default.
        dtype: that of all floating-point tensors, such as "bfloat16"; by default each keeps its own.
        rounding: how W' is rounded to a half precision: "nearest", or "dither", which keeps updates below the weights'
            spacing on average. By default as the layers do: with a dither where W0 is in a half precision too.
        max_shard_size: the most bytes in a file of weights, as a number or such as "5GB"; by default the base model's
            files are kept.
        overwrite: replace what `out` holds, all of it, once the new folder is complete.
        dry_run: write nothing; all checks are made but that of the space.
        any_base: merge although an adapter was trained on another model, or is in the weights already; the report notes
            it.
        allow_pickle: read an adapter's `adapter_model.bin`, where it has no safetensors, with ``weights_only=True``.
        progress: called with the bytes that are done and those of all the weights.

    Returns:
        The report.

    Raises:
        HiraError: a file is missing, damaged or not what it claims; an adapter is of another model, merged already, or
            not finite; the base model is quantised where an adapter is on it, or lays its files out in a way that is
            not known; the target is not empty or the disk is full. The target is as it was then.

    Source: HiRA (ICLR 2025), equation 5.
    """
    start = time.monotonic()
    folders = adapter_folders(adapters)
    factors = adapter_weights(folders, weights)
    options = _options(dtype, rounding, max_shard_size)
    # before anything is downloaded
    Output(out, overwrite, [folder for folder in (base, *folders) if os.path.isdir(folder)]).check_target()
    model, found, parameters, plan, notes = merged_model(
        base, folders, factors, options, any_base=any_base, allow_pickle=allow_pickle
    )
    output = Output(
        out,
        overwrite,
        [model.path, *(adapter.path for adapter in found), *(header.path for header in model.shards.values())],
        job=_job(parameters, found, factors, options),
        about={MERGED: merge_record(model, found)},
    )
    output.check_target()
    others = sum(model.file(name).stat().st_size for name in model.other_files)
    output.required_bytes = plan.nbytes + others
    free = output.free_bytes()
    resumed: list[str] = []
    if not dry_run:
        with output:
            resumed = _write_shards(output, plan, progress)
            _write_others(output, model, plan, _card(model, found, factors, options, plan))
    return MergeReport(
        output.target,
        dry_run,
        tuple(plan.merged),
        tuple(plan.replaced),
        tuple(plan.added),
        sum(len(shard.tensors) for shard in plan.shards),
        {shard.name: shard.nbytes for shard in plan.shards},
        tuple(resumed),
        model.skipped,
        notes,
        plan.nbytes + others,
        free,
        time.monotonic() - start,
    )


def _write_shards(output: Output, plan: Plan, progress: Progress | None) -> list[str]:
    """Write the files of weights; those that were finished before are returned."""
    resumed, done = [], 0
    with Workers() as workers:
        for shard in plan.shards:
            if output.resumed(shard.name):
                resumed.append(shard.name)
            else:
                size, before = shard.size, shard.size - shard.nbytes
                with output.create(shard.name) as file:
                    for data in workers.results(shard.parts()):
                        file.write(data)
                        if progress is not None:
                            progress(done + max(file.size - before, 0), plan.nbytes)
                    if file.size != size:
                        raise HiraError(
                            f"{shard.name} should have {size} bytes, but {file.size} were made: the base model "
                            "changed meanwhile, or this is an error of hira."
                        )
            done += shard.nbytes
            if progress is not None:
                progress(done, plan.nbytes)
    return resumed


def _write_others(output: Output, model: ModelFolder, plan: Plan, text: bytes) -> None:
    """Write the other files of the model."""
    if plan.index is not None:
        output.write(INDEX, _json(plan.index))
    for name in model.other_files:
        if name == CONFIG and plan.config is not None:
            output.write(name, _json(plan.config))
        elif name == CARD:
            output.copy(model.file(name), BASE_CARD)
        elif name != BASE_CARD or CARD not in model.other_files:
            output.copy(model.file(name), name)
    output.write(CARD, text)


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _card(
    model: ModelFolder, adapters: Sequence[Adapter], weights: Sequence[float], options: Options, plan: Plan
) -> bytes:
    """The merged model's card."""
    base, names = name_of(model.path), [name_of(adapter.path) for adapter in adapters]
    command = ["hira", "merge", base, *names, "-o", "OUT"]
    if any(weight != 1 for weight in weights):
        command += [part for weight in weights for part in ("--weight", str(weight))]
    if options.dtype is not None:
        command += ["--dtype", dtype_name(options.dtype)]
    if options.rounding is not None:
        command += ["--rounding", options.rounding]
    if options.max_shard_size is not None:
        command += ["--max-shard-size", str(options.max_shard_size)]
    facts = {"base model": quoted(base)}
    for name, adapter, weight in zip(names, adapters, weights, strict=True):
        config = adapter.config
        facts[f"adapter {quoted(name)}"] = (
            f"HiRA of rank {quoted(str(config.get('r')))} on {len(adapter.modules)} modules"
            + (f", times {weight}" if weight != 1 else "")
            + f", trained on {quoted(str(config.get('base_model_name_or_path') or ''))}"
        )
    facts["tensors"] = f"{len(plan.merged)} merged, {len(plan.replaced)} replaced, {len(plan.added)} added"
    text = ["HiRA adapters are merged into the weights of this model: `W' = W0 * (1 + BA)`, entry by entry."]
    return card(f"{quoted(base)} with {', '.join(map(quoted, names))}", text, facts, command, base, ("hira", "merged"))


def _job(base: Parameters, adapters: Sequence[Adapter], weights: Sequence[float], options: Options) -> str:
    """A hash of everything that the files of weights depend on; of files with tensors, of their sizes and times."""
    facts: list[Any] = [
        *map(version, ("hira", "transformers", "torch")),
        [*weights],
        *map(str, options),
        base.folder.index,
    ]
    facts += [*_rounding_of_products(), base.config, *(adapter.config for adapter in adapters)]
    files = [header.path for header in base.folder.shards.values()]
    files += [adapter.path / name for adapter in adapters for name in (ADAPTER_TENSORS, ADAPTER_PICKLE)]
    for path in files:
        if path.exists():
            status = path.stat()
            facts.append([str(path), status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _rounding_of_products() -> list[Any]:
    """The processor, threads and settings, by which PyTorch and its libraries split and round a product."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)  # from torch 2.9 on, as are the processor's capabilities
    return [
        torch.get_num_threads(),
        platform.machine(),
        torch.backends.cpu.get_cpu_capability(),
        dict(getattr(torch.cpu, "get_capabilities", dict)()),
        torch.backends.mkldnn.enabled,
        torch.get_float32_matmul_precision() if matmul is None else matmul.fp32_precision,
        {name: value for name, value in os.environ.items() if name.startswith(("MKL_", "ONEDNN_", "DNNL_"))},
    ]


def _options(dtype: str | torch.dtype | None, rounding: Rounding | None, max_shard_size: int | str | None) -> Options:
    name = dtype_name(dtype) if isinstance(dtype, torch.dtype) else dtype
    if name is not None and name not in DTYPES:
        raise HiraError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}.")
    if rounding not in (None, "nearest", "dither"):
        raise HiraError(f"rounding must be 'nearest' or 'dither', not {rounding!r}.")
    limit = None if max_shard_size is None else size_in_bytes(max_shard_size)
    if max_shard_size is not None and limit is None:
        raise HiraError(
            f"max_shard_size must be a number of bytes above 0, or a text such as '5GB', not {max_shard_size!r}."
        )
    return Options(None if name is None else getattr(torch, name), rounding, limit)


def size_in_bytes(size: int | str) -> int | None:
    """Return the bytes of a size such as "5GB" or "500 MiB"; None if it is none, or 0."""
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    unit = _UNITS.get(match[2].upper()) if match else None
    return (int(float(match[1]) * unit) or None) if match and unit else None
