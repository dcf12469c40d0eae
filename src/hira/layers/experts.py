"""ParamWrapper: HiRA on one parameter of a module, such as the stacked weights of a mixture of experts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from hira.base_weights import offloaded
from hira.base_weights.dense import Storage
from hira.base_weights.offloaded import OffloadedTensor
from hira.distributed.detection import check_not_sharded
from hira.errors import HiraError
from hira.layers import merging, weight_access
from hira.layers.base import HiraLayer
from hira.layers.lazy_weight import Expert, LazyWeight
from hira.layers.mixed_batch import BASE
from hira.layers.substitution import exclusive, substituted
from hira.ops.linear import Dequantize

# Implementations of transformers' experts that multiply by way of PyTorch's functions. Others call kernels.
FOLLOWED = ("eager", "grouped_mm", "batched_mm", None)


class ParamWrapper(HiraLayer):
    """HiRA on a parameter of E stacked weights, ``W'[e] = W0[e] * (1 + B[e] A[e])``, or on one that is a matrix.

    The module's own forward runs, with a `LazyWeight` in the place of the parameter: only experts with tokens have
    their W' formed, in blocks, by `ops.linear`. Wrappers nest where several parameters of one module are adapted.
    PEFT finds a wrapper that is already there by the name of this class.

    A and B are laid out as by PEFT's LoRA: A (E r, in), whose row e r + k is row k of A[e], and B (out, r E), whose
    column k E + e is column k of B[e]. The parameter is (E, out, in), or (E, in, out) where the module says so by
    ``is_transposed``; a matrix is (out, in).

    Args:
        base_layer: the module with the parameter, or another parameter's wrapper around it.
        adapter_name: the first adapter's name.
        config: its HiraConfig.
        r: its rank for each expert; ``config.r`` by default.
        parameter_name: the parameter's name in the module.

    Raises:
        HiraError: the rank is not a positive integer, the parameter is not a dense float one of two or three
            dimensions, another tuner wraps the module, or the config asks for dropout or `fan_in_fan_out`.

    Source: HiRA (ICLR 2025), equation 5; the layout from PEFT's LoRA.
    """

    parameter_name: str

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: Any,
        r: int | None = None,
        *,
        parameter_name: str,
        **kwargs: Any,
    ) -> None:
        self.parameter_name = parameter_name
        check_parameter(base_layer, parameter_name)
        super().__init__(base_layer, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config.r if r is None else r, config=config)

    def update_layer(self, adapter_name: str, r: int, config: Any, **kwargs: Any) -> None:
        """Add an adapter; arguments and errors as HiraLayer's."""
        for field in ("hira_dropout", "fan_in_fan_out"):
            if getattr(config, field):
                raise HiraError(
                    f"{field} must be off for target_parameters, but is {getattr(config, field)}: the module's own "
                    "forward multiplies by the parameter. Adapt its modules with another adapter."
                )
        super().update_layer(adapter_name, r, config, **kwargs)

    def _storage_of(self, base: nn.Module) -> Storage:
        return self.storage_type(base, self.parameter_name)

    def _features(self, base: Any) -> tuple[int, int]:  # type: ignore[override]
        out_features, in_features = self.storage.stored.shape[-2:]
        return (out_features, in_features) if self._is_transposed else (in_features, out_features)

    @property
    def _is_transposed(self) -> bool:
        return self._is_stacked and bool(getattr(self.get_base_layer(), "is_transposed", False))

    @property
    def _is_stacked(self) -> bool:
        return bool(self.storage.stored.dim() == 3)

    @property
    def _num_experts(self) -> int:
        return len(self.storage.stored) if self._is_stacked else 1

    def _factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (self._num_experts * r, self.in_features), (self.out_features, r * self._num_experts)

    def _joined(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """A (E, r, in) and B (E, out, r) of factors as they are stored, joined to one pair of the summed rank."""
        E = self._num_experts
        As, Bs = zip(*pairs, strict=True)
        A = torch.cat([A.reshape(E, -1, self.in_features) for A in As], dim=1)
        B = torch.cat([B.reshape(self.out_features, -1, E) for B in Bs], dim=1)
        return A, B.permute(2, 0, 1)

    def pairs(self, name: str, lora: bool = False) -> list[tuple[Tensor, Tensor]]:
        A, B = self._joined([self._scaled_lora(name) if lora else self._scaled(name)])
        return list(zip(A.unbind(0), B.unbind(0), strict=True))

    def _stored_factors(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        As, Bs = zip(*pairs, strict=True)
        return torch.cat(As), torch.stack(Bs, dim=2).flatten(1)

    def _unstacked(self, W0: Tensor) -> list[Tensor]:
        """The matrices (out, in) of the parameter as it is stored."""
        matrices = W0.unbind(0) if self._is_stacked else (W0,)
        return [matrix.t() if self._is_transposed else matrix for matrix in matrices]

    def weight_matrices(self, names: Sequence[str]) -> list[tuple[Tensor, Tensor, Tensor, int]]:
        A, B, lora_r = self._factors(names)
        matrices = self._unstacked(merging.read_original(self).detach())
        return [(W0, A[e], B[e], lora_r) for e, W0 in enumerate(matrices)]

    def _lazy(self, W0: Tensor, A: Tensor, B: Tensor, lora_r: int, away: OffloadedTensor | None = None) -> LazyWeight:
        """W' of W0 as it is stored, or of what it is a placeholder for, for A (E, R, in) and B (E, out, R)."""
        experts = [
            Expert(*parts, lora_r, None if away is None else self._fetcher(away, e))
            for e, parts in enumerate(zip(self._unstacked(W0), A.unbind(0), B.unbind(0), strict=True))
        ]
        return LazyWeight(
            experts,
            range(len(experts)),
            transposed=self._is_transposed,
            stacked=self._is_stacked,
            weight_gradient="int8" if set(self.weight_gradient.values()) == {"int8"} else "exact",
            training=self._is_in_training_step(),
        )

    def _fetcher(self, away: OffloadedTensor, e: int) -> Dequantize:
        """What fetches W0[e], (out, in), and no other expert's."""
        index, transposed = (e if self._is_stacked else ...), self._is_transposed

        def fetch(placeholder: Tensor) -> Tensor:
            W0 = away.fetch(placeholder, index)
            return W0.t() if transposed else W0

        return fetch

    def _effective_weight(self, W0: Tensor, A: Tensor, B: Tensor, lora_r: int) -> Tensor:
        return self._lazy(W0, A, B, lora_r).form()

    def _delta(self, A: Tensor, B: Tensor) -> Tensor:
        delta = torch.bmm(B, A)
        if self._is_transposed:
            delta = delta.transpose(1, 2)
        return delta if self._is_stacked else delta[0]

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the module without this wrapper and the wrappers in it, their parameters merged if asked for."""
        if isinstance(self.base_layer, ParamWrapper):
            self.base_layer.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        return super().unload_and_optionally_merge_module(merge, safe_merge, adapter_names)

    # Forward

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """Return the module's output under the active adapters of all its wrapped parameters.

        Args:
            *args, **kwargs: the module's own.
            adapter_names: in a mixed batch, the adapter of each row; all have to be the active ones.

        Raises:
            HiraError: `adapter_names` asks for other adapters: the module gets tokens, not rows; or the parameter is
                spread over processes where it cannot be followed.
        """
        wrappers = list(self._wrappers())
        if adapter_names is not None and not self.disable_adapters:
            for wrapper in wrappers:
                wrapper._check_rows(adapter_names)
        in_use = [(wrapper, names) for wrapper in wrappers if (names := wrapper._applied())]
        base = self.get_base_layer()
        return _call(base, in_use, *args, **kwargs) if in_use else base(*args, **kwargs)

    def _check_rows(self, adapter_names: list[str]) -> None:
        """Refuse a mixed batch that asks for other adapters than the active ones."""
        active = self._present(self.active_adapters)
        if any(self._present([name]) != active for name in adapter_names):
            raise HiraError(
                f"adapter_names asks for other adapters than the active {active} for {self.name or 'a parameter'}, "
                f"which is one for all rows ({BASE!r} included); set the adapter and pass no names."
            )

    def _wrappers(self) -> Iterator[ParamWrapper]:
        layer: Any = self
        while isinstance(layer, ParamWrapper):
            yield layer
            layer = layer.base_layer

    def _weight(self, names: Sequence[str]) -> Tensor:
        """What the module is to find in the place of the parameter."""
        base = self.get_base_layer()
        check_not_sharded(base, self.parameter_name)
        with merging.holding_W0(self):
            weight = self._lazy(self.storage.stored, *self._factors(names), offloaded.find(base, self.parameter_name))
        config = getattr(base, "config", None)
        return weight if getattr(config, "_experts_implementation", None) in FOLLOWED else weight.form()

    def _lazy_weight(self, names: Sequence[str], dequantize: Dequantize | None = None) -> Tensor:
        if dequantize is not None:  # it refuses
            dequantize(self.storage.stored)
        return self._weight(names)

    def __getattr__(self, name: str) -> Any:
        if name == self.__dict__.get("parameter_name"):
            return weight_access.parameter(self, name)
        return super().__getattr__(name)

    def __repr__(self) -> str:
        return super().__repr__().replace("(", f"(\n  (parameter_name): {self.parameter_name}", 1)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _call(base: nn.Module, in_use: list[tuple[ParamWrapper, list[str]]], *args: Any, **kwargs: Any) -> Any:
    """The output of a module with W' in the place of the wrapped parameters; under torch.compile a graph break."""
    if offloaded.is_own_forward(base):
        args, kwargs = offloaded.inputs_to_execution_device((args, kwargs), base)
    elif offloaded.offloading_hook(base) is not None:
        raise HiraError(
            f"accelerate offloads the parameters of {type(base).__name__}, whose forward was replaced, and would bring "
            "them in over the adapted ones. Leave this module on its device in the device map."
        )
    with exclusive(base):
        weights = {wrapper.parameter_name: wrapper._weight(names) for wrapper, names in in_use}
        with substituted(base, **weights):
            return base(*args, **kwargs)


def check_parameter(layer: nn.Module, name: str) -> None:
    """Refuse a parameter that no ParamWrapper serves."""
    base: Any = layer.get_base_layer() if isinstance(layer, ParamWrapper) else layer
    if isinstance(base, BaseTunerLayer):
        raise HiraError(
            f"The parameter {name} is one of a layer of {type(layer).__module__}, which adapts it too; target it with "
            "target_parameters or its module with target_modules, not both."
        )
    parameter = getattr(base, name)
    if parameter.dim() not in (2, 3) or not Storage.serves(base, name):
        raise HiraError(
            f"The parameter {name} of {type(base).__name__} is a {type(parameter.data).__name__} of {parameter.dtype} "
            f"and shape {tuple(parameter.shape)}. HiRA adapts dense float parameters of two dimensions, or of three "
            "for stacked weights; leave it out of target_parameters."
        )


def check_targets(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse a name in `target_parameters` that no parameter of a model has."""
    parts_of_wrappers = r"\.base_layer|\.parametrizations|\.original\d*$"
    found = [re.sub(parts_of_wrappers, "", name) for name, _ in model.named_parameters(remove_duplicate=False)]
    unknown = [name for name in names if not any(f".{key}".endswith(f".{name}") for key in found)]
    if unknown:
        raise HiraError(
            f"target_parameters names {', '.join(unknown)}, but the model has no such parameter; give the end of a "
            "name in model.named_parameters(), such as 'experts.down_proj'."
        )
