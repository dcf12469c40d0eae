"""Sizes, ranks and spectra of an adapter's BA and W0 * BA, layer by layer."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hira.errors import HiraError
from hira.files.io.adapter_folder import Adapter, Kind, dtypes_and_shapes, read_adapter
from hira.files.model.base_weights import BaseWeights
from hira.files.model.layer_matrices import LayerMatrices, layer_matrices
from hira.ops import heuristics
from hira.ops.dither import Noise, noise_of, round_into
from hira.ops.measures import effective_rank, product_singular_values

WeightOf = Callable[[str], Tensor | None]

# |1 + BA| below this is an entry that the adapter all but switches off
NEAR = 0.01
# the side of the largest matrix whose singular values are found: half a GiB, and minutes on a CPU
MAX_DIM = 8192


@dataclass(frozen=True)
class Spectrum:
    """The singular values of a matrix, ``s_1 >= s_2 >= ...``, and two measures of its rank.

    Args:
        values: the largest of them.
        effective_rank: ``exp(-sum_i p_i ln p_i)`` with ``p_i = s_i / sum_j s_j``; 0 for a matrix of zeros.
        stable_rank: ``||M||_F^2 / ||M||_2^2 = sum_i s_i^2 / s_1^2``; 0 for a matrix of zeros.
    """

    values: tuple[float, ...]
    effective_rank: float
    stable_rank: float


@dataclass(frozen=True)
class LayerReport:
    """The numbers of one module. Those that need W0 are None without it; norms are Frobenius norms.

    Args:
        name: the module's name.
        kind: "matrix", "embedding" or "convolution".
        shape: (out, in, *kernel), or (num_embeddings, dim) for an embedding.
        rank: r.
        lora_rank: the rank of the LoRA beside HiRA, 0 without; its L2 L1 is part of U, not of BA.
        parameters: the number of entries of all factors.
        delta_norm: ``||BA||``.
        largest_delta: ``max |BA|``.
        near_minus_one: the number of entries with ``|1 + BA| < 0.01``, which the adapter all but switches off.
        near_minus_one_share: their share of all entries.
        delta: the singular values of BA.
        weight_norm: ``||W0||``.
        update_norm: ``||U||`` of the update ``U = W0 * BA + L2 L1``.
        relative_norm: ``||U|| / ||W0||``; None too where W0 is zero.
        bfloat16_lost: ``1 - <K, U> / ||U||^2`` with ``K = W' - W0`` what is left of it in bfloat16,
            W' rounded as merging rounds it: with a dither where W0 is in half precision. 0 if merging loses nothing, 1
            if it loses all, below 0 by a little where rounding happens to add. None too where U is zero, or W' too
            large for bfloat16.
        bfloat16_lost_to_nearest: the same, W' rounded to nearest.
        bfloat16_unchanged: the share of the entries with ``U != 0`` where K, of W' as merging rounds it, is 0.
        weight: the singular values of W0.
        update: those of U.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    rank: int
    parameters: int
    delta_norm: float
    largest_delta: float
    near_minus_one: int
    near_minus_one_share: float
    delta: Spectrum
    weight_norm: float | None = None
    update_norm: float | None = None
    relative_norm: float | None = None
    bfloat16_lost: float | None = None
    bfloat16_lost_to_nearest: float | None = None
    bfloat16_unchanged: float | None = None
    weight: Spectrum | None = None
    update: Spectrum | None = None
    lora_rank: int = 0


@dataclass(frozen=True)
class Report:
    """The numbers of an adapter.

    Args:
        config: the adapter's configuration.
        parameters: the number of entries of all its tensors.
        layers: a report for each module with factors.
        relative_norm: ``sqrt(sum ||W0 * BA||^2 / sum ||W0||^2)`` over the layers; None unless W0 is known for all.
        bfloat16_lost: that of the layers, of all their updates together; None unless it is known of all that change.
        bfloat16_lost_to_nearest: likewise.
        notes: why it is not certain that the base model is the right one.
    """

    config: dict[str, Any]
    parameters: int
    layers: tuple[LayerReport, ...]
    relative_norm: float | None
    bfloat16_lost: float | None
    bfloat16_lost_to_nearest: float | None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The report as dictionaries, tuples, strings and numbers, of which JSON can be made."""
        return asdict(self)


def inspect(adapter: Adapter, weight_of: WeightOf | None = None, *, spectra: bool = True, top: int = 64) -> Report:
    """Return the report of an adapter.

    Args:
        adapter: the adapter, all numbers of which are finite.
        weight_of: returns a module's base weight as it is stored, or None where there is none.
        spectra: whether to find the singular values of W0 and of ``W0 * BA``.
        top: how many singular values to keep.

    Raises:
        HiraError: as of `inspect_adapter`.
    """
    check_adapter(adapter.config)
    transposed = bool(adapter.config.get("fan_in_fan_out"))
    layers = [
        inspect_layer(
            None if weight_of is None else weight_of(module),
            *factors.pair(),
            factors.kind,
            lora=None if factors.lora is None else factors.lora.pair(),
            name=module,
            fan_in_fan_out=transposed,
            spectra=spectra,
            top=top,
        )
        for module, factors in adapter.modules.items()
    ]
    return Report(
        config=dict(adapter.config),
        parameters=sum(math.prod(shape) for _, shape in dtypes_and_shapes(adapter.tensors).values()),
        layers=tuple(layers),
        relative_norm=_overall(layers),
        bfloat16_lost=_lost(layers, lambda layer: layer.bfloat16_lost),
        bfloat16_lost_to_nearest=_lost(layers, lambda layer: layer.bfloat16_lost_to_nearest),
    )


@torch.no_grad()
def inspect_adapter(
    adapter: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    *,
    spectra: bool = True,
    any_base: bool = False,
    allow_pickle: bool = False,
) -> Report:
    """Look at all layers of an adapter in a folder.

    Args:
        adapter: the folder, with `adapter_config.json` and `adapter_model.safetensors`, or its name on the hub,
            `owner/name` or `owner/name@revision`.
        base: the folder of the model that it was trained on, or its name on the hub; without it the report has what BA
            tells.
        spectra: whether to find the singular values of W0 and of ``W0 * BA``, which takes most of the time.
        any_base: take the base model although the adapter was trained on another.
        allow_pickle: read `adapter_model.bin` where there is no safetensors file, with ``weights_only=True``.

    Returns:
        The report.

    Raises:
        HiraError: a file is missing or damaged, the two do not belong together, or a number is not finite.
    """
    found = read_adapter(adapter, allow_pickle)
    weight_of = None if base is None else BaseWeights(base, found, any_base)
    found.check_finite()
    report = inspect(found, weight_of, spectra=spectra)
    return report if weight_of is None else replace(report, notes=tuple(weight_of.notes))


def inspect_layer(
    W0: Tensor | None,
    A: Tensor,
    B: Tensor,
    kind: Kind,
    *,
    lora: tuple[Tensor, Tensor] | None = None,
    name: str = "",
    fan_in_fan_out: bool = False,
    spectra: bool = True,
    top: int = 64,
) -> LayerReport:
    """Look at one layer; `LayerReport` has the equations.

    Everything is computed in float64, on W0's device, over blocks of rows, so that neither BA nor ``W0 * BA`` is ever
    whole. `product_singular_values` finds the singular values of BA. Those of W0 and of ``U = W0 * BA`` are the square
    roots of the eigenvalues of ``U^T U``, summed over the blocks: exact but for an absolute error of about
    ``1e-8 s_1``, which is below what float32 leaves of them.

    Args:
        W0: the weight as it is stored, (out, in, *kernel), (num_embeddings, dim), or for a linear layer (in, out).
        A: (r, in, *kernel), or (r, num_embeddings).
        B: (out, r, 1, ...), or (dim, r).
        kind: the kind of the module.
        lora: L1 and L2, laid out as A and B; None without LoRA.
        name: its name.
        fan_in_fan_out: whether a square weight of a linear layer is stored as (in, out).
        spectra: whether to find the singular values of W0 and of U.
        top: how many singular values to keep.

    Raises:
        HiraError: W0 is not finite, or A and B are so large that a norm is not.

    Cost: with m rows, n columns and n <= m, 2 m n r for the norms, and for both spectra 4 m n^2, some 20 n^3 more, and
    memory for three matrices of n x n: about a minute for 4096 x 4096 on two cores. Above n = 8192 W0 and U have no
    spectra.
    """
    pair = layer_matrices(name, A, B, kind, W0, fan_in_fan_out, lora)
    columns = pair.right.shape[1]
    known = W0 is not None and spectra and columns <= MAX_DIM
    sums, grams = _Sums(pair), [pair.left.new_zeros(columns, columns, dtype=torch.float64) for _ in range(2 * known)]
    for rows, weight, delta in pair.blocks():
        sums.add_delta(delta)
        if weight is not None:
            update = pair.update(rows, weight, delta)
            sums.add_update(rows, weight, update)
            for gram, matrix in zip(grams, (weight, update), strict=False):
                gram.addmm_(matrix.t(), matrix)
    if not all(map(math.isfinite, (sums.delta, sums.weight, sums.update))):
        raise HiraError(
            f"The update of module {name!r} is too large to be measured: max |BA| is {sums.largest:.3g}. The training "
            "diverged, or a file is damaged; use an earlier checkpoint of the adapter."
        )
    out, inputs = (B.shape[0], A.shape[1:]) if kind != "embedding" else (A.shape[1], B.shape[:1])
    count = pair.left.shape[0] * columns
    fields: dict[str, Any] = {} if W0 is None else sums.update_fields()
    if known:
        fields["weight"], fields["update"] = (_spectrum(_gram_values(gram), top) for gram in grams)
    return LayerReport(
        name=name,
        kind=kind,
        shape=(out, *inputs),
        rank=A.shape[0],
        lora_rank=0 if lora is None else lora[0].shape[0],
        parameters=sum(factor.numel() for factor in (A, B, *(lora or ()))),
        delta_norm=math.sqrt(sums.delta),
        largest_delta=sums.largest,
        near_minus_one=sums.near,
        near_minus_one_share=sums.near / count if count else 0.0,
        delta=_spectrum(product_singular_values(pair.left, pair.right), top),
        **fields,
    )


def check_adapter(config: Mapping[str, Any]) -> None:
    """Refuse an adapter on stacked parameters, whose factors have another layout."""
    if config.get("target_parameters"):
        raise HiraError(
            f"The adapter has target_parameters {list(config['target_parameters'])}, the stacked weights of experts, "
            "which are only loaded, or merged with `hira merge`; look at or convert an adapter without them."
        )


class _Sums:
    """Sums over the blocks of a layer."""

    def __init__(self, pair: LayerMatrices) -> None:
        self.delta = self.weight = self.update = self.kept = self.kept_to_nearest = self.largest = 0.0
        self.near = self.changed = self.moved = 0
        self._noise: Noise | None = None
        if pair.W0 is not None and heuristics.dithers(pair.W0.dtype, torch.bfloat16):
            # the noise of an entry is that of its row and its column in the layer's own orientation
            noise = noise_of(pair.W0.t() if pair.transposed else pair.W0)
            self._noise = Noise(noise.columns, noise.rows) if pair.transposed else noise

    def add_delta(self, delta: Tensor) -> None:
        self.delta += float(delta.square().sum())
        self.largest = max(self.largest, float(delta.abs().max()) if delta.numel() else 0.0)
        self.near += int(((1 + delta).abs() < NEAR).sum())

    def add_update(self, rows: slice, weight: Tensor, update: Tensor) -> None:
        merged, base = weight + update, weight.bfloat16().double()
        to_nearest = kept = merged.bfloat16().double() - base
        if self._noise is not None:
            rounded = torch.empty_like(merged, dtype=torch.bfloat16)
            kept = round_into(rounded, merged.float(), self._noise.rows[rows], self._noise.columns).double() - base
        self.kept_to_nearest += float((to_nearest * update).sum())
        self.weight += float(weight.square().sum())
        self.update += float(update.square().sum())
        self.kept += float((kept * update).sum())
        self.changed += int((update != 0).sum())
        self.moved += int(((update != 0) & (kept != 0)).sum())

    def update_fields(self) -> dict[str, Any]:
        return {
            "weight_norm": math.sqrt(self.weight),
            "update_norm": math.sqrt(self.update),
            "relative_norm": math.sqrt(self.update / self.weight) if self.weight else None,
            "bfloat16_lost": self._share_lost(self.kept),
            "bfloat16_lost_to_nearest": self._share_lost(self.kept_to_nearest),
            "bfloat16_unchanged": 1 - self.moved / self.changed if self.changed else None,
        }

    def _share_lost(self, kept: float) -> float | None:
        return 1 - kept / self.update if self.update and math.isfinite(kept) else None


def _gram_values(gram: Tensor) -> Tensor:
    """The singular values of a matrix M from M^T M, in descending order."""
    squares: Tensor = torch.linalg.eigvalsh(gram)
    return squares.flip(0).clamp(min=0).sqrt()


def _spectrum(values: Tensor, top: int) -> Spectrum:
    largest = float(values[0]) if values.numel() else 0.0
    if largest == 0:
        return Spectrum(tuple(values[:top].tolist()), 0.0, 0.0)
    return Spectrum(
        values=tuple(values[:top].tolist()),
        effective_rank=effective_rank(values),
        stable_rank=float((values / largest).square().sum()),
    )


def _overall(layers: list[LayerReport]) -> float | None:
    norms = [(layer.update_norm, layer.weight_norm) for layer in layers]
    if any(update is None or weight is None for update, weight in norms):
        return None
    total = math.hypot(*(weight for _, weight in norms if weight))
    return math.hypot(*(update for update, _ in norms if update)) / total if total else None


def _lost(layers: list[LayerReport], of: Callable[[LayerReport], float | None]) -> float | None:
    """The share lost of all updates together, each weighed by its squared norm."""
    changed = [(layer.update_norm, of(layer)) for layer in layers if layer.update_norm != 0]
    whole = math.hypot(*(norm or 0.0 for norm, _ in changed))
    if not whole or any(norm is None or lost is None for norm, lost in changed):
        return None
    return sum((norm / whole) ** 2 * lost for norm, lost in changed if norm is not None and lost is not None)
