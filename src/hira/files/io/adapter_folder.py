"""An adapter's folder: its configuration, and its tensors as pairs of factors."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hira.errors import HiraError
from hira.files.io.hub import ON_HUB, located
from hira.files.io.recognise import (
    ADAPTER_CONFIG,
    ADAPTER_PICKLE,
    ADAPTER_TENSORS,
    HILORA,
    PEFT_TYPES,
    not_an_adapter,
)
from hira.files.io.safe_paths import inside, opened_folder
from hira.files.io.safetensors_file import Header, all_finite, read_header, read_tensor
from hira.files.io.strict_json import read_object

PREFIX = "base_model.model."
FLOATS = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
_PIECE = 1 << 22  # entries that are looked at at a time
_LORA = ("hira_lora_A", "hira_lora_B")
_PAIRS: dict[str, str] = {"hira_A": "hira_B", "hira_embedding_A": "hira_embedding_B", _LORA[0]: _LORA[1]}

# modules that torch.compile, FSDP and activation checkpointing put around others, under these names
_WRAPPED = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}

Kind = Literal["matrix", "embedding", "convolution"]


def plain_name(name: str) -> str:
    """A module's or tensor's name without the parts that stand for wrappers around it, DDP around all included."""
    plain = ".".join(part for part in name.split(".") if part not in _WRAPPED)
    return plain.removeprefix("module.") if plain.startswith(f"module.{PREFIX}") else plain


def stacked(where: str, parts: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> tuple[Tensor, Tensor]:
    """Join the factors of matrices that lie in one parameter, as those of experts do.

    BA of matrices whose rows follow one another is ``[B1 0; 0 B2] [A1; A2]``.

    Args:
        where: the parameter, for messages.
        parts: for each of the E matrices that it stacks, the pairs A (r, in) and B (out, r) of those whose rows follow
            one another in it.

    Returns:
        A (E R, in) and B (out, R E) for R, the sum of the ranks, in the layout of PEFT's LoRA on parameters.

    Raises:
        HiraError: the ranks differ from matrix to matrix, or the other sizes do not fit.
    """
    shapes = {tuple((tuple(A.shape), tuple(B.shape)) for A, B in pairs) for pairs in parts}
    inputs = {A[1:] for pairs in shapes for A, _ in pairs}
    if len(shapes) != 1 or len(inputs) != 1 or any(len(A) != 2 or A[0] != B[1] for pairs in shapes for A, B in pairs):
        raise HiraError(
            f"{where} holds matrices that the adapter has factors of one by one, of shapes {sorted(shapes)}; they can "
            "be joined where all are linear layers' and their ranks are the same from one expert to the next."
        )
    A = torch.stack([torch.cat([A for A, _ in pairs]) for pairs in parts])
    B = torch.stack([torch.block_diag(*(B for _, B in pairs)) for pairs in parts])  # type: ignore[no-untyped-call]
    return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file by name, each read from the file at every access."""

    def __init__(self, header: Header) -> None:
        self.header = header

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.header.entries:
            raise KeyError(name)
        return read_tensor(self.header, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.header.entries)

    def __len__(self) -> int:
        return len(self.header.entries)


@dataclass(frozen=True)
class Factors:
    """A and B of one module, read from the file at every access.

    Args:
        tensors: the adapter's tensors.
        keys: the names of A and B among them.
        shapes: their shapes: A (r, in) and B (out, r), with the kernel behind for a convolution; A (r, num_embeddings)
            and B (dim, r) for an embedding.
        kind: "embedding" and "convolution" are known by name and shape; a "matrix" may be that of a linear layer, of
            attention, or of stacked experts, which only the base model tells.
        parts: the factors that these are joined from, as `stacked` takes them; none for those that are in the file.
        lora: L1 and L2, factors of the same kind that are added to the weight; None without LoRA.
    """

    tensors: Mapping[str, Tensor]
    keys: tuple[str, str]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    kind: Kind
    parts: tuple[tuple[Factors, ...], ...] = ()
    lora: Factors | None = None

    def pair(self) -> tuple[Tensor, Tensor]:
        """Read A and B."""
        if self.parts:
            return stacked(self.keys[0], [[part.pair() for part in row] for row in self.parts])
        return self.tensors[self.keys[0]], self.tensors[self.keys[1]]

    @property
    def all_keys(self) -> list[tuple[str, str]]:
        """The names of all pairs A and B in the file that these factors are, or are joined from."""
        return [part.keys for row in self.parts for part in row] or [self.keys]

    @property
    def rank(self) -> int:
        """The rank of BA; for stacked experts the sum of theirs."""
        return self.shapes[0][0]

    @property
    def lora_rank(self) -> int:
        """The rank of L2 L1 likewise; 0 without LoRA."""
        return 0 if self.lora is None else self.lora.rank


@dataclass(frozen=True)
class Adapter:
    """A HiRA adapter in a folder.

    Args:
        path: its folder's real path.
        config: its `adapter_config.json`.
        tensors: its tensors by their names in the file.
        modules: its factors by the module's name in the base model; where wrappers nest, with ``.base_layer`` behind it
            for each wrapper around the one that is meant.
        others: the names in the file of all other tensors, such as those of `modules_to_save`, by their names in the
            base model.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    modules: dict[str, Factors]
    others: dict[str, str]

    def check_finite(self) -> None:
        """Raise a HiraError that names the first tensor with a NaN or an infinity, reading all."""
        for name in self.tensors:
            if not all(map(all_finite, _pieces(self.tensors, name))):
                raise HiraError(
                    f"tensor {name!r} of the adapter {self.path} has a NaN or an infinity; its training diverged, or "
                    "the file is damaged. Use an earlier checkpoint."
                )


def read_adapter(path: str | os.PathLike[str], allow_pickle: bool = False) -> Adapter:
    """Read an adapter's folder.

    Args:
        path: the folder, with `adapter_config.json` and `adapter_model.safetensors`; or its name on the hub,
            `owner/name` or `owner/name@revision`, where there is no such folder.
        allow_pickle: read `adapter_model.bin` where there is no safetensors file, with ``weights_only=True``.

    Returns:
        The adapter; names, dtypes and shapes are checked, values are not read.

    Raises:
        HiraError: a file is missing or damaged, it is no HiRA adapter, a tensor is not of HiRA's, A or B lacks the
            other, or their ranks differ. The message names file and tensor.
    """
    root, config = read_config(path)
    if config.get("peft_type") not in PEFT_TYPES:
        raise HiraError(f"{root / ADAPTER_CONFIG} has {not_hira(config)}")
    return adapter_of(root, config, read_tensors(root, allow_pickle))


def not_hira(config: Mapping[str, Any]) -> str:
    """Say what an adapter is that is not HiRA's, and what to do with it."""
    found = f"peft_type {config.get('peft_type')!r}, where 'HIRA' was expected"
    if config.get("peft_type") == "LORA" and "r_ab" in config and "r" not in config:
        return f"{found}. It is of the HiRA paper's repository: `hira convert --from original` makes it PEFT's."
    if config.get("peft_type") == "LORA":
        return (
            f"{found}: it is a LoRA of rank {config.get('r')!r}. Load it with PeftModel.from_pretrained, and merge it "
            "with merge_and_unload()."
        )
    return f"{found}. Adapters of other methods are for PEFT alone."


def read_config(path: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    """Return the real path of an adapter's folder and its configuration, of whatever method; a HiraError for none."""
    root = opened_folder(located(path, "adapter"), "the adapter", ON_HUB)
    if not os.path.lexists(root / ADAPTER_CONFIG):
        raise HiraError(not_an_adapter(root))
    return root, read_object(inside(root, ADAPTER_CONFIG))


def read_tensors(root: Path, allow_pickle: bool = False) -> Mapping[str, Tensor]:
    """Return the tensors of an adapter's folder, of whatever method; those of a safetensors file are not read yet.

    Raises:
        HiraError: there is no file of tensors, only a pickle that is not allowed, or one that is damaged.
    """
    if os.path.lexists(root / ADAPTER_TENSORS):
        return TensorFile(read_header(inside(root, ADAPTER_TENSORS, weights=True)))
    if not os.path.lexists(root / ADAPTER_PICKLE):
        raise HiraError(f"{root} has no {ADAPTER_TENSORS}; pass the folder to which the adapter was saved.")
    if not allow_pickle:
        raise HiraError(
            f"{root} has its tensors in {ADAPTER_PICKLE} only, a pickle, which can run code when it is read. If you "
            "trust it, pass --allow-pickle (allow_pickle=True)."
        )
    path = inside(root, ADAPTER_PICKLE)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle may fail with any
        raise HiraError(f"{path} cannot be read as a file of tensors: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout == torch.strided
        for name, tensor in found.items()
    ):
        raise HiraError(f"{path} must hold dense tensors by name, and nothing else.")
    return {name: tensor.detach() for name, tensor in found.items()}


def adapter_of(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Adapter:
    """Return the adapter that a configuration and tensors are; dtypes and shapes are checked, values are not read.

    Args:
        path: its folder.
        config: its configuration.
        tensors: its tensors by the names that PEFT gives them in a file.

    Raises:
        HiraError: a tensor is not of HiRA's, A or B lacks the other, or their ranks differ.
    """
    keys: dict[str, str] = {}
    for key in tensors:
        other = keys.setdefault(plain_name(key), key)
        if other != key:
            raise HiraError(
                f"tensors {other!r} and {key!r} of the adapter {path} differ by the names of wrappers alone."
            )
    found = dtypes_and_shapes(tensors)
    described = {name: found[key] for name, key in keys.items()}
    modules: dict[str, Factors] = {}
    lora: dict[str, Factors] = {}
    others: dict[str, str] = {}
    for key, (dtype, _) in described.items():
        what = f"tensor {keys[key]!r} of the adapter {path}"
        if not key.startswith(PREFIX):
            raise HiraError(f"{what} must have a name that starts with {PREFIX!r}; PEFT did not write it.")
        module, _, last = key[len(PREFIX) :].rpartition(".")
        if "hira_" not in key and "lora_" not in key:
            others[key[len(PREFIX) :]] = keys[key]
            continue
        if not module or "hira_" in module or last not in {*_PAIRS, *_PAIRS.values()}:
            raise HiraError(f"{what} is not one of HiRA's, which end in {', '.join(_PAIRS)} or their B.")
        if dtype not in FLOATS:
            raise HiraError(f"{what} is of {dtype}; a factor must be of float32, bfloat16, float16 or float64.")
        first = last[:-1] + "A"
        pair = f"{PREFIX}{module}.{first}", f"{PREFIX}{module}.{_PAIRS[first]}"
        absent = [name for name in pair if name not in described]
        if absent:
            raise HiraError(f"{what} lacks the other factor, {absent[0]!r}; the file is not complete.")
        in_file = keys[pair[0]], keys[pair[1]]
        found_of = lora if first == _LORA[0] else modules
        if module in found_of and found_of[module].keys != in_file:
            raise HiraError(f"{what}: its module has the factors of an embedding and others too.")
        A, B = (described[name][1] for name in pair)
        found_of[module] = Factors(tensors, in_file, (A, B), _kind(what, A, B, "embedding" in last))
    if not modules:
        raise HiraError(f"the adapter {path} has no factors of HiRA; there is nothing to apply.")
    for module, added in lora.items():
        modules[module] = _with_lora(path, module, modules.get(module), added)
    _check_type(path, config, lora)
    return Adapter(path, config, tensors, modules, others)


def _with_lora(path: Path, module: str, factors: Factors | None, lora: Factors) -> Factors:
    """The factors of a module with those of its LoRA, once it is sure that they belong together."""
    what = f"tensor {lora.keys[0]!r} of the adapter {path}"
    if factors is None:
        raise HiraError(
            f"{what} is of a LoRA beside HiRA, but its module has no factors of HiRA; the file is not complete."
        )
    ends = [(A[1:], B[:1]) for A, B in (factors.shapes, lora.shapes)]
    if ends[0] != ends[1]:
        raise HiraError(f"{what} is of a LoRA with factors {lora.shapes} beside those of HiRA, {factors.shapes}.")
    return replace(factors, lora=replace(lora, kind=factors.kind))


def _check_type(path: Path, config: Mapping[str, Any], lora: Mapping[str, Factors]) -> None:
    """Refuse a configuration that is of HiRA alone where the tensors have a LoRA, and the reverse."""
    if bool(lora) != (config.get("peft_type") == HILORA):
        raise HiraError(
            f"{path / ADAPTER_CONFIG} has peft_type {config.get('peft_type')!r}, but the tensors have "
            f"{'a LoRA' if lora else 'no LoRA'} beside HiRA; the files are of two adapters."
        )


def dtypes_and_shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return the dtype and shape of each tensor, of which those in a file are not read."""
    if isinstance(tensors, TensorFile):
        return {name: (entry.dtype, entry.shape) for name, entry in tensors.header.entries.items()}
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def _pieces(tensors: Mapping[str, Tensor], name: str) -> Iterator[Tensor]:
    """A tensor's entries, not all at once where they are in a file; float8 as float32, in which they can be summed."""
    if isinstance(tensors, TensorFile):
        count = math.prod(tensors.header.entry(name).shape)
        starts = range(0, count, _PIECE)
        pieces = (read_tensor(tensors.header, name, slice(start, start + _PIECE), (count,)) for start in starts)
    else:
        pieces = (tensor for tensor in (tensors[name],))
    return (piece.float() if piece.itemsize == 1 else piece for piece in pieces)


def _kind(what: str, A: tuple[int, ...], B: tuple[int, ...], is_embedding: bool) -> Kind:
    """What A and B are, after a check that their shapes go together."""
    ok = len(A) == len(B) >= 2 and A[0] == B[1] and 0 not in A + B and all(size == 1 for size in B[2:])
    if not ok or (is_embedding and len(A) != 2):
        raise HiraError(
            f"{what}: A is {A} and B is {B}, but (r, in) and (out, r) with one rank r > 0 were expected, or for a "
            "convolution (r, in, *kernel) and (out, r, 1, ...)."
        )
    if is_embedding:
        return "embedding"
    return "matrix" if len(A) == 2 else "convolution"
