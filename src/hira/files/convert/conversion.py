"""Conversions of adapters: from the paper's repository, to LoRA, and for PEFT's own HiRA."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hira.errors import HiraError
from hira.files.inspect.inspect_adapter import MAX_DIM, check_adapter
from hira.files.io.adapter_folder import PREFIX, Adapter, Factors, adapter_of, not_hira
from hira.files.io.safetensors_file import all_finite
from hira.files.model.layer_matrices import LayerMatrices, layer_matrices

# what LoRA's and HiRA's configurations have in common, and mean the same by
_SHARED = (
    *("base_model_name_or_path", "revision", "task_type", "auto_mapping", "inference_mode", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"),
    *("trainable_token_indices", "ensure_weight_tying"),
)

# fields that PEFT's HiRA lacks, and on which the outputs of a file's A and B do not depend
_WITHOUT_EFFECT = frozenset(
    ("weight_gradient", "target_parameters", "hira_alpha", "alpha_pattern", "use_rslora", "ensure_weight_tying")
)

# a relative error of LoRA's float32 tensors at full rank is some 1e-7
_ROUNDING = 1e-5


@dataclass(frozen=True)
class LayerError:
    """How far the LoRA of a layer is from its HiRA, ``||W0 * BA - L|| / ||W0 * BA||``; 0 where the update is zero."""

    name: str
    relative_error: float


@dataclass(frozen=True)
class LoraReport:
    """The losses of a conversion to LoRA.

    Args:
        rank: LoRA's rank.
        layers: the error of each layer.
        relative_error: ``sqrt(sum ||W0 * BA - L||^2 / sum ||W0 * BA||^2)`` over the layers.
        statement: the same in a sentence.
    """

    rank: int
    layers: tuple[LayerError, ...]
    relative_error: float
    statement: str

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON has it."""
        return asdict(self)


def from_original(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Adapter:
    """Return an adapter of the paper's repository in PEFT's format.

    Its A and B are HiRA's under LoRA's names; its alpha, scale and dropout were never applied. It adapts modules by the
    ends of their names, where PEFT wants whole parts of them; others are named in full.

    Args:
        path: its folder.
        config: its adapter_config.json, of type LORA with `r_ab`.
        tensors: its tensors, ``base_model.model.<module>.lora_A`` and ``lora_B``: (r, in) and (out, r).

    Raises:
        HiraError: it is an adapter of another method or of PEFT's LoRA, trains biases, has tensors of unknown names or
            of another rank than `r_ab`.

    Source: the format of the repository of HiRA (ICLR 2025).
    """
    other = [key for key in tensors if {"lora_R", "rand_R"} & set(key.split("."))]
    if other or config.get("rand_R"):
        what = repr(other[0]) if other else "rand_R in its configuration"
        raise HiraError(f"The adapter has {what}: it was trained with another method than HiRA.")
    rank = config.get("r_ab")
    if config.get("peft_type") == "HIRA":
        raise HiraError("The adapter has peft_type 'HIRA': it is one of PEFT's already; leave out --from original.")
    if config.get("peft_type") != "LORA" or "r" in config:
        raise HiraError(f"The adapter is not of the HiRA paper's repository: it has {not_hira(config)}")
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise HiraError(f"The configuration has r_ab {rank!r}; the paper's repository writes a whole number.")
    if config.get("bias", "none") != "none":
        raise HiraError(f"The adapter trained biases (bias={config['bias']!r}), which HiRA in PEFT does not have.")
    saved = list(config.get("modules_to_save") or ())
    renamed: dict[str, Tensor] = {}
    for key, value in tensors.items():
        module, _, ending = key.rpartition(".")
        if ending in ("lora_A", "lora_B"):
            key = f"{module}.hira_{ending[-1]}"
        elif "lora_" in key or not set(saved) & set(module.split(".")):
            raise HiraError(
                f"The adapter has {key!r}; expected '<module>.lora_A', '<module>.lora_B' and the modules_to_save "
                f"{saved}. It is no checkpoint of the paper's repository: leave out --from original."
            )
        renamed[key] = value
    adapter = adapter_of(path, config, renamed)
    for module, factors in adapter.modules.items():
        A, B = factors.shapes
        if len(A) != 2 or A[0] != rank:
            raise HiraError(
                f"Module {module!r} has A {A} and B {B}, but r_ab is {rank}: the tensors and the configuration are of "
                "two adapters."
            )
    names = _targets(config.get("target_modules"), list(adapter.modules))
    settings = {"peft_type": "HIRA", "r": rank, "hira_dropout": 0.0, "target_modules": names}
    return adapter_of(path, {**_shared(config), **settings}, renamed)


@torch.no_grad()
def to_lora(
    adapter: Adapter, weight_of: Callable[[str], Tensor | None], rank: int
) -> tuple[dict[str, Any], dict[str, Tensor], LoraReport]:
    """Approximate a HiRA adapter by a LoRA adapter of some rank; this loses what is beyond that rank.

    Equation: ``L = sum_{k <= rank} s_k u_k v_k^T`` for ``U = W0 * BA = sum_k s_k u_k v_k^T``, the best approximation of
    that rank, as ``B = [sqrt(s_k) u_k]`` and ``A = [sqrt(s_k) v_k^T]`` with a scale of 1.

    The singular vectors of the shorter side are eigenvectors of ``U^T U`` in float64, the others U times these; U is
    never whole. A layer of which a side is below the rank has zeros in what is left of its A and B.

    Args:
        adapter: the adapter; its tensors of `modules_to_save` are handed on.
        weight_of: returns a module's base weight as it is stored; see `inspect`.
        rank: LoRA's rank.

    Returns:
        LoRA's configuration and tensors (float32, by the keys of PEFT's checkpoints), and what was lost: errors are
        measured on these tensors.

    Raises:
        HiraError: the rank is not a positive integer, a base weight is missing, a layer's shorter side is above 8192,
            or the adapter has `target_parameters` or adapts the output projection of `nn.MultiheadAttention`, whose
            update PEFT's LoRA would add twice. Grouped convolutions convert, but PEFT's LoRA has another layout for
            them and refuses to load it.

    Cost: for m rows and n <= m columns, 2 m n^2 and some 20 n^3, and memory for two matrices of n x n.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank <= 0:
        raise HiraError(f"The rank of the LoRA should be a positive integer, but is {rank!r}.")
    config = adapter.config
    _check(adapter, "where PEFT's LoRA adds an output projection's update twice (0.21)")
    converted, layers, lost, total = _others(adapter), [], 0.0, 0.0
    for module, factors in adapter.modules.items():
        W0 = weight_of(module)
        if W0 is None:
            raise HiraError(f"The base model has no weight for module {module!r}; LoRA needs it.")
        laid_out = layer_matrices(module, *factors.pair(), factors.kind, W0, bool(config.get("fan_in_fan_out")))
        left, right = _truncated(module, laid_out, rank)
        layer_lost, layer_total = _error(laid_out, left, right)
        layers.append(LayerError(module, math.sqrt(layer_lost / layer_total) if layer_total else 0.0))
        lost, total = lost + layer_lost, total + layer_total
        converted.update(_lora_tensors(module, factors, laid_out.transposed, left, right))
        del W0, laid_out
    overall = math.sqrt(lost / total) if total else 0.0
    lost_share = f"{overall:.2%} of its norm is lost over all layers"
    statement = (
        f"A LoRA of rank {rank} cannot hold HiRA's update, which has a high rank: {lost_share}. Its outputs are not "
        "the adapter's; use the merged model where they have to be."
        if overall > _ROUNDING
        else f"A LoRA of rank {rank} holds all of this update but for rounding: {lost_share}."
    )
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none"}
    return {**_shared(config), **settings}, converted, LoraReport(rank, tuple(layers), overall, statement)


def fold(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the configuration and the tensors of an adapter so that PEFT's own HiRA loads it and computes the same.

    Options are removed on which the outputs of A and B, as they are in the file, do not depend. PEFT up to 0.21 ignores
    `rank_pattern` for a model's first adapter, so factors of several ranks get zeros up to the largest:
    ``[B 0] [A; 0] = BA``.

    Raises:
        HiraError: the adapter has `target_parameters`, `trainable_token_indices`, `layer_replication`, or modules to
            save that `ensure_weight_tying` ties, or adapts the output projection of `nn.MultiheadAttention`, which
            PEFT's HiRA does not have. That other modules are attention, grouped convolutions or quantised by others
            than bitsandbytes is in the model, not in the adapter: PEFT refuses these as it loads.
    """
    _check(adapter, "which PEFT's own HiRA does not adapt")
    for name in ("trainable_token_indices", "layer_replication"):
        if adapter.config.get(name) is not None:
            raise HiraError(f"The adapter has {name}, which PEFT's own HiRA does not have; hira and PEFT's LoRA do.")
    if adapter.config.get("ensure_weight_tying") and adapter.config.get("modules_to_save"):
        raise HiraError(
            "The adapter has modules_to_save that ensure_weight_tying ties to others, which PEFT's own HiRA does not "
            "do. Train it with all of them in modules_to_save, without ensure_weight_tying."
        )
    config = {key: value for key, value in adapter.config.items() if key not in _WITHOUT_EFFECT}
    ranks = {factors.rank for factors in adapter.modules.values()}
    if ranks == {config.get("r")} and not config.get("rank_pattern"):
        return config, dict(adapter.tensors)
    folded, rank = _others(adapter), max(ranks)
    for module, factors in adapter.modules.items():
        A, B = factors.pair()
        more = rank - factors.rank
        name = f"{PREFIX}{module}.hira_{'embedding_' if factors.kind == 'embedding' else ''}"
        folded[f"{name}A"] = torch.cat([A, A.new_zeros(more, *A.shape[1:])])
        folded[f"{name}B"] = torch.cat([B, B.new_zeros(len(B), more, *B.shape[2:])], 1)
    return {**config, "r": rank, "rank_pattern": {}}, folded


def _targets(found: Any, modules: list[str]) -> str | list[str]:
    """The paper's `target_modules` for PEFT: a list names all modules by whole parts, without spaces."""
    if isinstance(found, str):
        return found.strip()
    names = [str(name).strip() for name in found or ()]
    return names + [module for module in modules if not any(f".{module}".endswith(f".{name}") for name in names)]


def _shared(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: config[name] for name in _SHARED if name in config}


def _others(adapter: Adapter) -> dict[str, Tensor]:
    return {key: adapter.tensors[key] for key in adapter.others.values()}


def _check(adapter: Adapter, why: str) -> None:
    check_adapter(adapter.config)
    nested = [module for module in adapter.modules if ".base_layer." in module]
    if nested:
        raise HiraError(
            f"Module {nested[0]!r} is inside nn.MultiheadAttention, {why}; merge the adapter into the model with "
            "`hira merge` instead."
        )


def _truncated(module: str, pair: LayerMatrices, rank: int) -> tuple[Tensor, Tensor]:
    """The best factors (rows, rank) and (rank, columns) of W0 * BA, in float32."""
    rows, columns = len(pair.left), pair.right.shape[1]
    if columns > MAX_DIM:
        raise HiraError(
            f"Module {module!r} is {rows} x {columns}; singular vectors are found up to a shorter side of {MAX_DIM}. "
            "Merge the adapter with `hira merge` instead."
        )
    gram = pair.left.new_zeros(columns, columns, dtype=torch.float64)
    for _, update in pair.updates():
        gram.addmm_(update.t(), update)
    if not bool(gram.isfinite().all()):
        raise HiraError(
            f"The update of module {module!r} is too large to be approximated. The training diverged, or the file is "
            "damaged; use an earlier checkpoint of the adapter."
        )
    squares, vectors = torch.linalg.eigh(gram)
    kept = min(rank, columns)
    vectors, roots = vectors.flip(1)[:, :kept], squares.flip(0)[:kept].clamp(min=0).pow(0.25)
    # directions with nothing in them but rounding have no left vector
    inverse = torch.where(roots > 1e-6 * roots[0], 1 / roots, 0.0)
    left, right = vectors.new_zeros(rows, rank), vectors.new_zeros(rank, columns)
    right[:kept] = (vectors * roots).t()
    for where, update in pair.updates():
        left[where, :kept] = update @ (vectors * inverse)
    factors = left.float(), right.float()
    if not all(map(all_finite, factors)):
        raise HiraError(f"The LoRA of module {module!r} has numbers beyond float32; use an earlier checkpoint.")
    return factors


def _error(pair: LayerMatrices, left: Tensor, right: Tensor) -> tuple[float, float]:
    """The squared norms of W0 * BA - left right and of W0 * BA."""
    lost = total = 0.0
    for where, update in pair.updates():
        total += float(update.square().sum())
        lost += float((update - left[where].double() @ right.double()).square().sum())
    return lost, total


def _lora_tensors(module: str, factors: Factors, transposed: bool, left: Tensor, right: Tensor) -> dict[str, Tensor]:
    """PEFT's tensors of a LoRA whose update is left right."""
    if transposed:
        left, right = right.t(), left.t()
    A, B = factors.shapes
    key, rank = f"{PREFIX}{module}", len(right)
    if factors.kind == "embedding":  # (num, r) and (r, dim), of which PEFT keeps the transposes
        return {
            f"{key}.lora_embedding_A": left.t().contiguous(),
            f"{key}.lora_embedding_B": right.t().contiguous(),
        }
    return {
        f"{key}.lora_A.weight": right.reshape(rank, *A[1:]).contiguous(),
        f"{key}.lora_B.weight": left.reshape(B[0], rank, *B[2:]).contiguous(),
    }
