"""HiraLayer, what the HiRA layers of all kinds have in common: adapters, and the forward that applies them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial, reduce
from numbers import Real
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from hira import ops
from hira.base_weights import offloaded
from hira.base_weights.dense import Storage
from hira.config.hira_config import InitWeights, check_init_weights, check_rank
from hira.errors import HiraError
from hira.layers import base_layer_call, merging, mixed_batch, weight_access
from hira.layers.alpha_scale import alpha_scales
from hira.layers.inference_cache import inference_cache
from hira.ops.linear import Dequantize
from hira.ops.workspace import formation_dtype
from hira.version import __version__


class HiraLayer(nn.Module, BaseTunerLayer):
    """A base layer with HiRA adapters on its weight, ``W' = W0 * (1 + BA)``, or with LoRA ``W0 * (1 + BA) + L2 L1``.

    Several active adapters act as one: ``W' = W0 * (1 + B1 A1 + B2 A2 + ...)`` is an adapter of the summed rank, and
    costs one product. Under dropout the base layer gets x and the update gets dropout(x). A base layer whose call does
    more than multiply, because of hooks, a forward of its own or another tuner's layer around it, is called, and finds
    W' where its weight was.

    Args:
        base_layer: the layer to adapt, possibly another tuner's.
        ephemeral_gpu_offload: accepted for PEFT, without effect.

    Attributes of the base layer that a model reads, such as a convolution's stride, are found on this layer too.

    Source: HiRA (ICLR 2025), equation 5; parameter names from PEFT.
    """

    adapter_layer_names: tuple[str, ...] = (
        *("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"),
        *("hira_lora_A", "hira_lora_B"),
    )
    other_param_names: tuple[str, ...] = (
        *("r", "lora_r", "hira_dropout", "weight_gradient", "scaling"),
        *("alpha_scale", "lora_scale", "tied_to"),
    )
    # of HiRA's factors, and of LoRA's, L1 and L2, which an adapter has if its `lora_r` is not 0
    factor_names: ClassVar[tuple[str, str]] = ("hira_A", "hira_B")
    lora_names: ClassVar[tuple[str, str]] = ("hira_lora_A", "hira_lora_B")
    # how the base layer stores its weight
    storage_type: type[Storage] = Storage
    # whether the model multiplies by `layer.weight` itself instead of calling the layer; then `weight` is W'
    weight_is_read: bool = False
    # the parameter that is adapted, where not the layer as such
    parameter_name: str | None = None

    def __init__(self, base_layer: nn.Module, ephemeral_gpu_offload: bool = False, **kwargs: Any) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer
        # the module's name in the model, for messages
        self.name = ""
        self.r: dict[str, int] = {}
        self.lora_r: dict[str, int] = {}
        self.hira_dropout = nn.ModuleDict()
        self.weight_gradient: dict[str, str] = {}
        # the adapters whose W' is kept from product to product
        self.keep_weight: set[str] = set()
        self.scaling: dict[str, float] = {}
        # what `hira_alpha` multiplies B and L2 by in this layer
        self.alpha_scale: dict[str, float] = {}
        self.lora_scale: dict[str, float] = {}
        # the layer that holds A and B of an adapter, where another layer with the same weight does
        self.tied_to: dict[str, HiraLayer] = {}
        self.hira_A = nn.ParameterDict()
        self.hira_B = nn.ParameterDict()
        self.hira_embedding_A = nn.ParameterDict()
        self.hira_embedding_B = nn.ParameterDict()
        self.hira_lora_A = nn.ParameterDict()
        self.hira_lora_B = nn.ParameterDict()
        self._disable_adapters = False
        # what is merged into the base weight; see `merging`
        self.merged_adapters: list[str] = []
        self.merged_scaling: dict[str, float] = {}
        self.record: merging.Record | None = None
        self.others_merged = False
        self.register_load_state_dict_post_hook(merging.settle_after_loading)
        # adapters which tensor parallelism has made equal on all processes
        self.equal_on_all_processes: set[str] = set()
        self.ephemeral_gpu_offload = ephemeral_gpu_offload
        self.cast_input_dtype_enabled = True
        self.kwargs = kwargs
        self.in_features, self.out_features = self._features(self.get_base_layer())

    def get_base_layer(self) -> Any:
        """Return the layer that is adapted, below other tuners' layers too; PEFT's own walk is slow."""
        base: Any = self._modules["base_layer"]
        while "base_layer" in base._modules:
            base = base._modules["base_layer"]
        return base

    @property
    def storage(self) -> Storage:
        """Access to the base weight; made once for each base layer."""
        base, storage = self.get_base_layer(), self.__dict__.get("_storage")
        if storage is None or storage.layer is not base:
            storage = self._storage = self._storage_of(base)
        return storage

    # What a kind of layer defines

    @staticmethod
    def _features(base: Any) -> tuple[int, int]:
        raise NotImplementedError

    def _storage_of(self, base: nn.Module) -> Storage:
        return self.storage_type(base)

    def _factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (r, self.in_features), (self.out_features, r)

    def _init_factors(self, A: Tensor, B: Tensor, r: int, init_weights: InitWeights) -> None:
        if init_weights == "gaussian":
            nn.init.normal_(A, std=1 / r)
        else:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        nn.init.zeros_(B)

    def _product(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """The layer's output with W' of some adapters in the place of W0."""
        raise NotImplementedError

    def _update(self, x: Tensor, names: Sequence[str], dropout: nn.Module | None = None) -> Tensor:
        """What some adapters add to the base layer's output."""
        raise NotImplementedError

    def _matrices(self, W0: Tensor, A: Tensor, B: Tensor, lora_r: int) -> tuple[Tensor, Tensor, Tensor, int]:
        """W0 (out, in), and A (r + lora_r, in) and B (out, r + lora_r), of a weight as the storage reads it."""
        return W0, A, B, lora_r

    def _effective_weight(self, W0: Tensor, A: Tensor, B: Tensor, lora_r: int) -> Tensor:
        """W' as the storage reads W0, tracked by autograd."""
        return ops.modulated_weight(*self._matrices(W0, A, B, lora_r)).view(W0.shape)

    def _delta(self, A: Tensor, B: Tensor) -> Tensor:
        """BA in the orientation in which the base layer stores its weight."""
        return B @ A

    # Adapters

    def update_layer(self, adapter_name: str, r: int, config: Any, **kwargs: Any) -> None:
        """Add an adapter.

        Args:
            adapter_name: its name.
            r: its rank.
            config: the HiraConfig with its dropout and its start.

        Raises:
            HiraError: the rank is not a positive integer or the start is unknown; the layer is left as it was.
        """
        check_rank(r, "r")
        check_init_weights(config.init_weights)
        self.storage.check_here()
        alpha_scale, lora_scale = alpha_scales(self, config, r)
        lora_r = getattr(config, "lora_r", 0)  # not in PEFT's config
        factors = self._new_factors(r, config.init_weights)
        lora_factors = self._new_factors(lora_r, config.init_weights) if lora_r else ()
        dropout = nn.Dropout(config.hira_dropout) if config.hira_dropout > 0 else nn.Identity()
        self.hira_dropout.update({adapter_name: dropout})
        self.r[adapter_name], self.lora_r[adapter_name] = r, lora_r
        self.weight_gradient[adapter_name] = getattr(config, "weight_gradient", "exact")  # not in PEFT's config
        if getattr(config, "keep_weight", False):
            self.keep_weight.add(adapter_name)
        else:
            self.keep_weight.discard(adapter_name)
        self.scaling[adapter_name] = 1  # an integer, which torch.compile never takes for a variable
        self.alpha_scale[adapter_name] = alpha_scale
        self.lora_scale[adapter_name] = lora_scale
        for name, value in zip((*self.factor_names, *self.lora_names), (*factors, *lora_factors), strict=False):
            values: Any = self._modules[name]
            values[adapter_name] = nn.Parameter(value)
        self.equal_on_all_processes.discard(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def reset_hira_parameters(self, adapter_name: str, init_weights: InitWeights) -> None:
        """Start an adapter again, in place, as `init_weights` says (False leaves it as it is)."""
        check_init_weights(init_weights)
        if init_weights is not False and self._present([adapter_name]):
            factors = [of_all[adapter_name] for of_all in self.factor_dicts(adapter_name)]
            ranks = self.r[adapter_name], self.lora_r[adapter_name]
            self.equal_on_all_processes.discard(adapter_name)
            with torch.no_grad():
                for A, B, r in zip(factors[::2], factors[1::2], ranks, strict=False):
                    self._init_factors(A, B, r, init_weights)

    def _new_factors(self, r: int, init_weights: InitWeights) -> tuple[Tensor, Tensor]:
        A, B = (torch.randn(shape) for shape in self._factor_shapes(r))
        if init_weights is not False:
            self._init_factors(A, B, r, init_weights)
        return A, B

    def tie_adapter(self, adapter_name: str, source: HiraLayer) -> None:
        """Have an adapter take its factors from that of another layer with the same weight, and hold none itself."""
        for factors in self.factor_dicts(adapter_name):
            del factors[adapter_name]
        for values in ("r", "lora_r", "alpha_scale", "lora_scale"):
            getattr(self, values)[adapter_name] = getattr(source, values)[adapter_name]
        self.tied_to[adapter_name] = source

    def resize_adapter(self, adapter_name: str, r: int, lora_r: int | None = None) -> None:
        """Give an adapter another rank, and its LoRA too if `lora_r` is not None; its values are lost."""
        lora_r = self.lora_r[adapter_name] if lora_r is None else lora_r
        if adapter_name not in self.tied_to:
            like = self._factor_dicts[0][adapter_name]
            for factors in self.factor_dicts(adapter_name):
                del factors[adapter_name]
        self.r[adapter_name], self.lora_r[adapter_name] = r, lora_r
        for factors, shape in zip(self.factor_dicts(adapter_name), self.shapes_of(r, lora_r), strict=False):
            factors[adapter_name] = nn.Parameter(like.new_zeros(shape), requires_grad=like.requires_grad)

    def copy_adapter(self, source: str, target: str) -> None:
        """Give an adapter the rank and the values of another; nothing happens where the layer lacks the other."""
        if not self._present([source]):
            return
        ranks = self.r[source], self.lora_r[source]
        if ranks != (self.r[target], self.lora_r[target]):
            self.resize_adapter(target, *ranks)
        if target not in self.tied_to:
            with torch.no_grad():
                factors = self.oriented(source, self.parameters_of(source))
                for new, old in zip(self.parameters_of(target), factors, strict=True):
                    new.copy_(old)
        self.alpha_scale[target] = self.alpha_scale[source]
        self.lora_scale[target] = self.lora_scale[source]

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype | None]:
        """Where PEFT moves an adapter to, and its dtype, unless that is one of integers."""
        stored = self.storage.stored
        base = self.get_base_layer()
        device = offloaded.execution_device(base) if offloaded.offloading_hook(base) is not None else stored.device
        return torch.device(device), getattr(base, "compute_dtype", stored.dtype)

    # Factors

    @property
    def _factor_dicts(self) -> tuple[nn.ParameterDict, nn.ParameterDict]:
        A, B = self.factor_names
        return self._modules[A], self._modules[B]  # type: ignore[return-value]

    def names_of(self, name: str) -> tuple[str, ...]:
        """The names of the factors of an adapter: those of A and B, and of L1 and L2 if it has a LoRA."""
        return (*self.factor_names, *self.lora_names) if self.lora_r[name] else self.factor_names

    def named_factor_dicts(self, name: str) -> list[tuple[str, nn.ParameterDict]]:
        """The dictionaries with A and B, and with L1 and L2, of an adapter; none where another layer holds them."""
        if name in self.tied_to:
            return []
        return [(factors, self._modules[factors]) for factors in self.names_of(name)]  # type: ignore[misc]

    def factor_dicts(self, name: str) -> list[nn.ParameterDict]:
        """Those dictionaries without their names."""
        return [factors for _, factors in self.named_factor_dicts(name)]

    def shapes_of(self, r: int, lora_r: int) -> tuple[tuple[int, ...], ...]:
        """The shapes of the factors of an adapter with these ranks, in the order of `factor_dicts`."""
        return (*self._factor_shapes(r), *self._factor_shapes(lora_r)) if lora_r else self._factor_shapes(r)

    def _holder(self, name: str) -> HiraLayer:
        """The layer that holds the factors of an adapter: this one, or one with the same weight."""
        return self.tied_to.get(name, self)

    def parameters_of(self, name: str) -> list[nn.Parameter]:
        """A and B of an adapter as they train, and L1 and L2, in the layer that holds them."""
        return [factors[name] for factors in self._holder(name).factor_dicts(name)]

    def oriented(self, name: str, factors: Sequence[Tensor]) -> list[Tensor]:
        """Factors as this layer has them: a linear layer's are an embedding's transposed, in the other order."""
        if self._holder(name).factor_names == self.factor_names:
            return list(factors)
        return [turned.t() for A, B in zip(factors[::2], factors[1::2], strict=True) for turned in (B, A)]

    def _get_available_adapters(self) -> set[str]:
        """The layer's adapters; PEFT looks for their parameters, which another layer may hold."""
        return set(self.r)

    def _present(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if name in self.r]

    def _applied(self) -> list[str]:
        """The adapters with which a forward forms W' of W0; none where the base layer's present weight will do.

        Merged adapters act through the weight. Where only some of the active ones are merged, all of both act on W0.
        """
        if self._disable_adapters:
            if self.merged_adapters:
                self.unmerge()
            return []
        active = self._present(self.active_adapters)
        if self.record is None:
            return active
        if all(name in self.merged_adapters for name in active):
            return []
        merging.settle(self, by_value=False)  # which forgets the merge if the base weight was replaced
        return [*self.merged_adapters, *(name for name in active if name not in self.merged_adapters)]

    def _dropped(self, names: Sequence[str]) -> list[str]:
        """Of some adapters, those whose dropout acts."""
        dropouts = self.hira_dropout._modules
        return [name for name in names if acts(dropouts[name])]

    def _factor(self, factors: nn.ParameterDict, name: str) -> Tensor:
        """A or B of an adapter, fetched if it is offloaded."""
        factor: Tensor = getattr(factors, name)
        if factor.is_meta:
            offloaded.check_can_train(factors, name)
            factor = offloaded.load(factors, name)
        return factor

    def _scale(self, name: str) -> float:
        return self.merged_scaling.get(name, self.scaling[name]) * self.alpha_scale[name]

    def _scaled(self, name: str) -> tuple[Tensor, Tensor]:
        """A and B of an adapter, B times its scale: of a merged adapter, the scale that it was merged with."""
        holder = self.tied_to.get(name, self)
        As, Bs = holder._factor_dicts
        A, B = self._factor(As, name), self._factor(Bs, name)
        if holder is not self:
            A, B = self.oriented(name, (A, B))
        scale = self._scale(name)
        return (A, B) if scale == 1 else (A, _times(B, scale))

    def _scaled_lora(self, name: str) -> tuple[Tensor, Tensor]:
        """L1 and L2 of an adapter, L2 times its scale."""
        dicts = self._holder(name).factor_dicts(name)[2:]
        L1, L2 = self.oriented(name, [self._factor(factors, name) for factors in dicts])
        return L1, _times(L2, self.merged_scaling.get(name, self.scaling[name]) * self.lora_scale[name])

    def _factors(self, names: Sequence[str]) -> tuple[Tensor, Tensor, int]:
        """A and B of some adapters, joined to one adapter of the summed rank, and the rank of LoRA in them.

        The rows of L1 and the columns of L2 come last, behind those of A and B of all adapters.
        """
        pairs, lora_r = [], 0
        for name in names:
            pairs.append(self._scaled(name))
        for name in names:
            if self.lora_r[name]:
                pairs.append(self._scaled_lora(name))
                lora_r += self.lora_r[name]
        return (*self._joined(pairs), lora_r)

    def _joined(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        if len(pairs) == 1:
            return pairs[0]
        As, Bs = zip(*pairs, strict=True)
        dtype = reduce(torch.promote_types, (factor.dtype for factor in (*As, *Bs)))
        return torch.cat([A.to(dtype) for A in As]), torch.cat([B.to(dtype) for B in Bs], dim=1)

    def weight_matrices(self, names: Sequence[str]) -> list[tuple[Tensor, Tensor, Tensor, int]]:
        """W0, joined A and B of some adapters as one, and the rank of LoRA in them, for each matrix that is adapted."""
        return [self._matrices(merging.read_original(self).detach(), *self._factors(names))]

    def pairs(self, name: str, lora: bool = False) -> list[tuple[Tensor, Tensor]]:
        """A (r, in) and B (out, r) of an adapter with its scale, or L1 and L2: a pair for each adapted matrix."""
        A, B = self._scaled_lora(name) if lora else self._scaled(name)
        return [(A.flatten(1), B.flatten(1))]

    def set_pairs(
        self, name: str, pairs: Sequence[tuple[Tensor, Tensor]], lora_pairs: Sequence[tuple[Tensor, Tensor]]
    ) -> None:
        """Give an adapter the ranks and the values of `pairs`, and of those of its LoRA, if any."""
        of_each = [each for each in (pairs, lora_pairs) if each]
        self.resize_adapter(name, *(len(each[0][0]) for each in of_each))
        values = [value for each in of_each for value in self._stored_factors(each)]
        for parameter, value in zip(self.parameters_of(name), values, strict=True):
            parameter.copy_(value.view(parameter.shape))

    def _stored_factors(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        ((A, B),) = pairs
        return A, B

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return BA, the modulation less one, of an adapter, without its LoRA.

        Args:
            adapter: its name.

        Returns:
            BA, times the adapter's scale, in the shape of the base layer's weight as it is stored and the dtype of B;
            formed in float32 if that is a half precision. The additive update W0 * BA is `get_additive_delta`.
        """
        A, B = self._joined([self._scaled(adapter)])
        dtype = formation_dtype(B.dtype)
        return self._delta(A.to(dtype), B.to(dtype)).to(self.parameters_of(adapter)[1].dtype)

    def get_additive_delta(self, adapter: str) -> Tensor:
        """Return ``W0 * BA + L2 L1``, what an adapter adds to the weight, in the weight's stored shape and dtype."""
        W0 = self._stored_orientation(merging.read_original(self).detach())
        dtype = formation_dtype(W0.dtype)
        A, B = self._joined([self._scaled(adapter)])
        delta = self._delta(A.to(dtype), B.to(dtype)) * W0
        if self.lora_r[adapter]:
            L1, L2 = self._joined([self._scaled_lora(adapter)])
            delta = delta + self._delta(L1.to(dtype), L2.to(dtype))
        return delta.to(W0.dtype)

    def _stored_orientation(self, W0: Tensor) -> Tensor:
        return W0

    # Forward

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """Return the layer's output under the active adapters.

        Args:
            x: the base layer's input.
            adapter_names: for inference, one adapter name for each row of x's first dimension, "__base__" for none;
                each adapter in it costs one product over its rows.

        Returns:
            The base layer's output with W' for W0.

        Raises:
            HiraError: `adapter_names` is not of x's length, or is passed while adapters are merged.
        """
        base = self.get_base_layer()
        if offloaded.is_hooked(base):
            # offloading the model may have given the hook the values of a state dict
            merging.settle(self, by_value=False)
            y = self._output(offloaded.to_execution_device(x, base), adapter_names, args, kwargs)
            return y.to(x.device) if offloaded.returns_output(base) else y
        return self._output(x, adapter_names, args, kwargs)

    def _output(self, x: Tensor, adapter_names: list[str] | None, args: Any, kwargs: Any) -> Tensor:
        if adapter_names is not None and not self._disable_adapters:
            return mixed_batch.output(self, x, adapter_names, *args, **kwargs)
        names = self._applied()
        if self.record is not None and names:
            y: Tensor = base_layer_call.output_beside_merged(self, x, names, *args, **kwargs)
            return y
        return self._adapted(x, names, *args, **kwargs)

    def _adapted(self, x: Tensor, names: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        """The output under some adapters: one product, where the base layer's own call is one product and no more."""
        if not names:
            return self._base_output(x, *args, **kwargs)
        storage = self.storage
        if storage.stored.is_meta:
            offloaded.check_reachable(storage.layer, storage.stored, x)
        if args or kwargs or not self._is_plain():
            return base_layer_call.output(self, x, names, *args, **kwargs)
        return self._combined(x, names, partial(self._base_output, x))

    def _combined(self, x: Tensor, names: Sequence[str], base_output: Callable[[], Tensor]) -> Tensor:
        """The output of a plain layer: one product for the adapters without dropout, one more for each with it."""
        dropped = self._dropped(names)
        if not dropped:
            return self._product(x, names)
        others = [name for name in names if name not in dropped]
        y = self._product(x, others) if others else base_output()
        return self._with_updates(y, x, dropped)

    def _with_updates(self, y: Tensor, x: Tensor, names: Sequence[str]) -> Tensor:
        """The base layer's output y and what some adapters add to it."""
        dropped = self._dropped(names)
        if others := [name for name in names if name not in dropped]:
            y = y + self._update(x, others).to(y.dtype)
        for name in dropped:
            y = y + self._update(x, [name], self.hira_dropout[name]).to(y.dtype)
        return y

    def _base_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = self.base_layer(x, *args, **kwargs)
        return y

    def _is_in_training_step(self) -> bool:
        """Whether a product counts as training though gradients may be off; generation in training mode does not."""
        return self.training and not inference_cache.is_open

    def _is_plain(self) -> bool:
        """Whether the base layer's own call is the product with its weight, and nothing else happens in it."""
        return base_layer_call.is_plain(self.base_layer, self.storage)

    def _substituted(self, names: Sequence[str]) -> AbstractContextManager[None]:
        """A context in which the base layer finds W' of some adapters for its weight; autograd keeps W0, A and B."""
        return base_layer_call.substituted_weight(self, names)

    def _dropped_change(self, name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What an adapter changes of the output of the base layer's own call, on the input that dropout leaves."""
        return base_layer_call.change(self, name, self.hira_dropout[name](x), *args, **kwargs)

    def _mixed_parts(self, x: Tensor, rows: dict[str, list[int]], *args: Any, **kwargs: Any) -> list[Tensor]:
        """The outputs for the rows of each adapter of a mixed batch, in the order of the adapters."""
        return [self._adapted(x[rows[name]], self._present([name]), *args, **kwargs) for name in rows]

    # What a model reads instead of calling the layer

    @property
    def weight(self) -> Tensor:
        """The base layer's weight; W' where a model's forward reads it instead of calling the layer."""
        return weight_access.parameter(self, "weight")

    def _lazy_weight(self, names: Sequence[str], dequantize: Dequantize | None = None) -> Tensor:
        """W' of some adapters, formed where it is multiplied by; `dequantize` reads W0 in the place of the storage."""
        return weight_access.lazy_weight(self, names, dequantize)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if hasattr(type(self), name):  # a property raised an AttributeError, which it does again
                return object.__getattribute__(self, name)
            if name.startswith("_") or "base_layer" not in self._modules:
                raise
            return getattr(self._modules["base_layer"], name)

    # Merging

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put W', formed as the forward forms it, in the place of the base weight, and keep W0 to restore it.

        Args:
            safe_merge: check that W' is finite before anything is changed.
            adapter_names: the adapters to merge; the active ones by default. Adapters that are merged already stay
                merged: W' is formed again from W0 with all of them.

        Raises:
            HiraError: with `safe_merge`, W' is not finite; nothing is changed.
        """
        merging.merge(self, safe_merge, adapter_names)

    def unmerge(self) -> None:
        """Put W0 back, bit for bit. A base weight that was loaded while merged is kept instead, as the new W0."""
        merging.unmerge(self)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the base layer, merged if asked for, without keeping a copy of W0; PEFT calls this to unload."""
        return merging.unload(self, merge, safe_merge, adapter_names)

    # Checkpoints

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        """The module's state, with W0 while adapters are merged too, and with adapters that accelerate offloads."""
        merging.settle(self, by_value=False)
        if self.record is None or self.storage.is_one_parameter:
            state = super().state_dict(*args, prefix=prefix, **kwargs)
            self._put_W0(state, prefix)
        else:
            with merging.holding_W0(self):
                state = super().state_dict(*args, prefix=prefix, **kwargs)
        for attribute in self.adapter_layer_names:
            offloaded.load_into(state, getattr(self, attribute), f"{prefix}{attribute}.")
        return state

    def _put_W0(self, state: dict[str, Any], prefix: str) -> None:
        """Put W0 in the place of a merged weight; the layer itself is not touched, as other threads may run it."""
        storage, layer, path = self.storage, self.base_layer, f"{prefix}base_layer."
        while isinstance(layer, BaseTunerLayer):
            layer, path = layer.base_layer, f"{path}base_layer."
        key = f"{path}{storage.name}"
        if self.record is not None and key in state and offloaded.offloading_hook(storage.layer) is None:
            W0 = storage.value_of(self.record.original)
            state[key] = W0 if state[key].requires_grad else W0.detach()

    # Scales

    def set_scale(self, adapter: str, scale: float) -> None:
        """Have an adapter act by ``W' = W0 * (1 + scale * BA)`` until the next call; as of LoRA, no checkpoint has it.

        Args:
            adapter: its name; nothing happens where the layer does not have it.
            scale: the scale, 1 at first. Of an adapter that is merged, the merged weight keeps its own until unmerged.

        Raises:
            HiraError: the scale is not a finite number.
        """
        _check_scale(scale)
        if adapter in self.scaling:
            self.scaling[adapter] = scale

    def scale_layer(self, scale: float) -> None:
        """Multiply the scales of the active adapters by a number; a HiraError if it is not a finite one."""
        _check_scale(scale)
        for name in self._present(self.active_adapters):
            self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scales of the active adapters by a number, or set them to 1; a HiraError for 0 or no number."""
        if scale is not None:
            _check_scale(scale, nonzero=True)
        for name in self._present(self.active_adapters):
            self.scaling[name] = 1 if scale is None else self.scaling[name] / scale

    # What PEFT and Python ask of a layer

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: PEFT's generic conversion takes `get_delta_weight` for an additive update, which BA is not."""
        return False

    def __setstate__(self, state: Any) -> None:
        """Refuse to be made of the pickle of another class, PEFT's own layer of that name."""
        if "weight_gradient" not in state:
            raise HiraError(
                f"The pickle holds a {type(self).__name__} of PEFT's own HiRA, and not of hira. Load it without hira, "
                "or after hira.unregister(), save its adapter with save_pretrained, and load that with hira."
            )
        if "record" not in state and state.get("merged_adapters"):
            raise HiraError(
                f"The pickle holds a {type(self).__name__} that an older hira merged, which kept W0 otherwise. "
                "Unpickle and unmerge it there; then pickle it again, or save its adapter with save_pretrained."
            )
        super().__setstate__({**_absent_from_older_pickles(state["r"]), **state})  # type: ignore[no-untyped-call]
        for name in self.lora_names:
            if name not in self._modules:
                self.add_module(name, nn.ParameterDict())

    def __repr__(self) -> str:
        return "hira." + super().__repr__()

    def extra_repr(self) -> str:
        """Name the package: the layers of PEFT's own HiRA print as `hira.Linear` too."""
        return f"hira {__version__}"


def _absent_from_older_pickles(names: Iterable[str]) -> dict[str, Any]:
    """Attributes that layers did not always have."""
    return {
        "name": "",
        "scaling": dict.fromkeys(names, 1),
        "alpha_scale": dict.fromkeys(names, 1),
        "lora_r": dict.fromkeys(names, 0),
        "lora_scale": dict.fromkeys(names, 1),
        "keep_weight": set(),
        "tied_to": {},
        "merged_scaling": {},
        "record": None,
        "others_merged": False,
        "equal_on_all_processes": set(),
    }


def acts(dropout: nn.Module) -> bool:
    """Whether a dropout changes its input now."""
    return isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0


def _times(B: Tensor, scale: float) -> Tensor:
    """B times a scale, in float32 at least."""
    return B.to(torch.promote_types(B.dtype, torch.float32)) * scale


def _check_scale(scale: Any, nonzero: bool = False) -> None:
    if not isinstance(scale, Real) or not math.isfinite(scale) or (nonzero and scale == 0):
        expected = f"a finite number{' other than 0' if nonzero else ''}"
        raise HiraError(f"The scale of an adapter must be {expected}, but is {scale!r}.")
