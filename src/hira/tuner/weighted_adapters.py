"""A new adapter from others: their weighted sum, exact or of a smaller rank, or what TIES, DARE or pruning make."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast

import torch
from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties
from torch import Tensor, nn

from hira.errors import HiraError
from hira.layers.base import HiraLayer
from hira.tuner.transaction import unchanged_on_error

SignMethod = Literal["total", "frequency"]
Combine = Callable[[list[Tensor], Tensor], Tensor]
_EXACT = ("cat", "linear")
_SIGNED: dict[str, Any] = {"ties": ties, "dare_ties": dare_ties}
_DENSE: dict[str, Any] = {"dare_linear": dare_linear, "magnitude_prune": magnitude_prune}


def add_weighted_adapter(
    model: Any,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
    svd: Svd,
    density: float | None,
    majority_sign_method: SignMethod,
) -> None:
    """`HiraModel.add_weighted_adapter`, which says what it does."""
    combine = _combination(combination_type, density, majority_sign_method)
    _check(model, adapters, weights, adapter_name)
    svd.check()
    config = replace(
        model.peft_config[adapters[0]],
        r=svd.rank or max(model.peft_config[name].r for name in adapters),
        rank_pattern={},
        hira_alpha=None,  # what it scales is in B
        alpha_pattern=None,
        use_rslora=False,
        ensure_weight_tying=False,  # other adapters of tied layers need not be equal
        target_modules=_targets([model.peft_config[name].target_modules for name in adapters]),
        inference_mode=True,
    )
    lora_ranks = [getattr(model.peft_config[name], "lora_r", 0) for name in adapters]  # not in PEFT's config
    if any(lora_ranks):  # one rank for all layers, as there is no pattern of it
        config.lora_r = sum(lora_ranks) if combine is None else svd.rank or max(lora_ranks)
    with unchanged_on_error(model):
        model.peft_config[adapter_name] = config
        model.inject_adapter(model.model, adapter_name)
        for layer in model.model.modules():
            if isinstance(layer, HiraLayer) and layer._present([adapter_name]):
                _fill(layer, adapters, weights, adapter_name, combine, svd, config.lora_r)
    set_ranks(config, model.model, adapter_name)


@torch.no_grad()
def _fill(
    layer: HiraLayer,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combine: Combine | None,
    svd: Svd,
    lora_r: int,
) -> None:
    """Give the new adapter of a layer its values: of its LoRA those of a rank `lora_r`."""
    present = [(name, weight) for name, weight in zip(adapters, weights, strict=True) if name in layer.r]
    rank = svd.rank or max(layer.r[name] for name, _ in present)
    pairs = _combined([(layer.pairs(name), weight) for name, weight in present], combine, svd, rank)
    lora = [(layer.pairs(name, lora=True), weight) for name, weight in present if layer.lora_r[name]]
    lora_pairs = [_padded(*pair, lora_r) for pair in _combined(lora, combine, svd, lora_r)]
    if lora_r and not lora:
        lora_pairs = [_padded(A[:0], B[:, :0], lora_r) for A, B in pairs]
    layer.set_pairs(adapter_name, pairs, lora_pairs)


def _combined(
    each: list[tuple[list[tuple[Tensor, Tensor]], float]], combine: Combine | None, svd: Svd, rank: int
) -> list[tuple[Tensor, Tensor]]:
    """A and B for each matrix of a layer, of some adapters' pairs and their weights."""
    combined = []
    weights = [weight for _, weight in each]
    for of_matrix in zip(*(pairs for pairs, _ in each), strict=True):
        if combine is None:
            weighted = [weight * B for weight, (_, B) in zip(weights, of_matrix, strict=True)]
            combined.append((torch.cat([A for A, _ in of_matrix]), torch.cat(weighted, dim=1)))
        else:
            products = [B.float() @ A.float() for A, B in of_matrix]
            combined.append(svd.factors(combine(products, torch.tensor(weights, device=products[0].device)), rank))
    return combined


def _padded(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) with the same product, by zeros."""
    more = rank - len(A)
    return nn.functional.pad(A, (0, 0, 0, more)), nn.functional.pad(B, (0, more))


def set_ranks(config: Any, model: nn.Module, adapter_name: str) -> None:
    """Make `r` and `rank_pattern` of a configuration those that its adapter has in a model."""
    layers = [module for module in model.modules() if isinstance(module, HiraLayer)]
    ranks = {layer.name: layer.r[adapter_name] for layer in layers if layer._present([adapter_name])}
    config.r = Counter(ranks.values()).most_common(1)[0][0] if ranks else config.r
    config.rank_pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != config.r}


@dataclass(frozen=True)
class Svd:
    """How a matrix is brought to a rank; the names are those of PEFT, with `svd_` before them.

    Args:
        rank: the rank; None for the largest of the adapters' ranks.
        clamp: a quantile of the entries of A and B; larger ones are cut to it, with either sign.
        full_matrices: whether all singular vectors are computed; those beyond the rank are not used.
        driver: cuSOLVER's method.
    """

    rank: int | None
    clamp: float | None
    full_matrices: bool
    driver: str | None

    def check(self) -> None:
        """Refuse values that are out of range."""
        if self.rank is not None and (isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1):
            raise HiraError(f"svd_rank must be a positive integer, not {self.rank!r}.")
        if self.clamp is not None and (not isinstance(self.clamp, int | float) or not 0 <= self.clamp <= 1):
            raise HiraError(f"svd_clamp is a quantile, a number from 0 to 1, not {self.clamp!r}.")
        if self.driver not in (None, "gesvd", "gesvdj", "gesvda"):
            raise HiraError(f"svd_driver must be 'gesvd', 'gesvdj', 'gesvda' or None, not {self.driver!r}.")

    def factors(self, matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """The A (rank, in) and B (out, rank) whose product is nearest to a matrix, with zeros beyond its own rank."""
        if self.driver is not None and not matrix.is_cuda:
            raise HiraError(
                f"svd_driver is a method of cuSOLVER, for CUDA, and the adapters are on {matrix.device}: leave it out."
            )
        U, S, V = torch.linalg.svd(matrix, full_matrices=self.full_matrices, driver=self.driver)
        S = S[:rank]
        A, B = V[: len(S)], U[:, : len(S)] * S
        if self.clamp is not None:
            limit = _quantile(torch.cat([A.flatten(), B.flatten()]), self.clamp)
            A, B = A.clamp(-limit, limit), B.clamp(-limit, limit)
        return _padded(A, B, rank)


def _quantile(values: Tensor, q: float) -> float:
    """A quantile, interpolated linearly; torch.quantile refuses more than 2^24 values."""
    position = q * (len(values) - 1)
    below, ordered = math.floor(position), values.sort().values
    low, high = ordered[below], ordered[min(below + 1, len(values) - 1)]
    return float(low + (high - low) * (position - below))


def _combination(name: str, density: float | None, majority_sign_method: SignMethod) -> Combine | None:
    """What makes one matrix of some; None for their weighted sum by concatenation."""
    if name in _EXACT:
        return None
    if name == "svd":
        return cast(Combine, task_arithmetic)
    plain = name.removesuffix("_svd")
    if plain not in _SIGNED and plain not in _DENSE:
        known = [*_EXACT, "svd", *(f"{each}{end}" for each in (*_SIGNED, *_DENSE) for end in ("", "_svd"))]
        raise HiraError(f"combination_type must be one of {', '.join(known)}, not {name!r}.")
    if density is None or not 0 < density <= 1:
        raise HiraError(f"{name} keeps a share of the entries: density must be in (0, 1], not {density!r}.")
    if plain in _DENSE:
        return partial(_DENSE[plain], density=density)
    return partial(_SIGNED[plain], density=density, majority_sign_method=majority_sign_method)


def _check(model: Any, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
    unknown = [name for name in adapters if name not in model.peft_config]
    if not adapters or isinstance(adapters, str) or unknown:
        known = ", ".join(model.peft_config)
        raise HiraError(f"adapters must be a list of the model's adapters, which are {known}, not {adapters!r}.")
    if adapter_name in model.peft_config:
        raise HiraError(f"There is an adapter {adapter_name!r} already; delete it or choose another name.")
    bad = [weight for weight in weights if not isinstance(weight, int | float) or not math.isfinite(weight)]
    if len(weights) != len(adapters) or bad:
        raise HiraError(f"weights must be {len(adapters)} numbers, one for each adapter, not {weights!r}.")
    for field in ("target_parameters", "layers_to_transform", "layers_pattern", "exclude_modules"):
        values = [getattr(model.peft_config[name], field, None) for name in adapters]
        if any(value != values[0] for value in values):
            raise HiraError(f"{field} is {values} for adapters {list(adapters)}, which have to agree to be joined.")
    for name in adapters:
        for field, what in (("modules_to_save", "modules"), ("trainable_token_indices", "rows")):
            if value := getattr(model.peft_config[name], field, None):
                raise HiraError(
                    f"Adapter {name!r} has {field}, {value}, which are whole {what}: there is no weighted sum of them. "
                    "Merge such adapters into the model one by one."
                )


def _targets(targets: list[Any]) -> Any:
    """The modules that some adapters target between them."""
    patterns = {target for target in targets if isinstance(target, str)}
    if not patterns:
        return set().union(*(target or () for target in targets))
    if len(patterns) == 1 and all(isinstance(target, str) for target in targets):
        return targets[0]
    if all(isinstance(target, str) for target in targets):
        return "|".join(f"({pattern})" for pattern in sorted(patterns))
    raise HiraError(
        "Some adapters have a list for target_modules and others a regular expression; they cannot be joined."
    )
