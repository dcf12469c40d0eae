"""HiraLayer, what the HiRA layers of all kinds have in common: adapters, and the forward that applies them."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial, reduce
from numbers import Real
from types import FrameType
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from hira import ops
from hira.base_weights import offloaded
from hira.base_weights.dense import Storage, Transposed
from hira.config.hira_config import InitWeights, check_init_weights, check_rank
from hira.distributed.detection import is_dtensor, only_gathers
from hira.errors import HiraError
from hira.layers.lazy_weight import Expert, weight_of_layer
from hira.layers.merging import MergeableLayer
from hira.layers.sharded import ShardedLayer
from hira.layers.substitution import exclusive, substituted
from hira.ops.linear import Dequantize
from hira.ops.recompute import formed, recomputed
from hira.ops.workspace import formation_dtype
from hira.version import __version__

BASE = "__base__"  # in adapter_names, a row of a mixed batch without an adapter
# the adapter_names of the mixed batch that a model computes
adapters_of_rows: ContextVar[list[str] | None] = ContextVar("adapters_of_rows", default=None)
_CALL = nn.Module._call_impl.__code__


class HiraLayer(nn.Module, MergeableLayer, ShardedLayer):
    """A base layer with HiRA adapters on its weight, ``W' = W0 * (1 + BA)``.

    Active adapters add up, ``W' = W0 * (1 + B1 A1 + B2 A2 + ...)``, which is one adapter of the summed rank, so they
    cost one product. Where the base layer's forward is not the plain one of its type (another tuner inside, a subclass
    with its own forward, hooks on the layer), the base layer is called, and finds W' in the place of its weight. Under
    dropout the base sees x and the update dropout(x). Where the base layer's own call brings its weight in, as it may
    in a model that is sharded, the product is computed inside that call.

    Args:
        base_layer: the layer to adapt, possibly another tuner's.
        ephemeral_gpu_offload: accepted for PEFT, without effect.

    Attributes of the base layer that a model reads, such as a convolution's stride, are found on this layer too.

    Source: HiRA (ICLR 2025), equation 5; parameter names from PEFT.
    """

    adapter_layer_names: tuple[str, ...] = ("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B")
    other_param_names: tuple[str, ...] = ("r", "hira_dropout", "weight_gradient", "scaling")
    factor_names: ClassVar[tuple[str, str]] = ("hira_A", "hira_B")
    # how the base layer stores its weight
    storage_type: type[Storage] = Storage
    # whether the model multiplies by `layer.weight` itself instead of calling the layer; then `weight` is W'
    weight_is_read: bool = False
    # the parameter that is adapted, where not the layer as such
    parameter_name: str | None = None

    def __init__(self, base_layer: nn.Module, ephemeral_gpu_offload: bool = False, **kwargs: Any) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer
        self.r: dict[str, int] = {}
        self.hira_dropout = nn.ModuleDict()
        self.weight_gradient: dict[str, str] = {}
        self.scaling: dict[str, float] = {}
        self.hira_A = nn.ParameterDict()
        self.hira_B = nn.ParameterDict()
        self.hira_embedding_A = nn.ParameterDict()
        self.hira_embedding_B = nn.ParameterDict()
        self._disable_adapters = False
        self._init_merging()
        self._init_sharding()
        self.ephemeral_gpu_offload = ephemeral_gpu_offload
        self.cast_input_dtype_enabled = True
        self.kwargs = kwargs
        self.in_features, self.out_features = self._features(self.get_base_layer())

    # What a kind of layer defines

    @staticmethod
    def _features(base: Any) -> tuple[int, int]:
        raise NotImplementedError

    @property
    def storage(self) -> Storage:
        """Access to the base weight."""
        return self.storage_type(self.get_base_layer())

    def _factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (r, self.in_features), (self.out_features, r)

    def _init_factors(self, A: Tensor, B: Tensor, r: int, init_weights: InitWeights) -> None:
        if init_weights == "gaussian":
            nn.init.normal_(A, std=1 / r)
        else:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        nn.init.zeros_(B)

    def _product(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """The layer's output with W' in the place of W0."""
        raise NotImplementedError

    def _update(self, x: Tensor, A: Tensor, B: Tensor, dropout: nn.Module | None = None) -> Tensor:
        """What the adapter adds to the base layer's output."""
        raise NotImplementedError

    def _matrices(self, W0: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """W0 (out, in), A (r, in) and B (out, r) of a weight as the storage reads it."""
        return W0, A, B

    def _effective_weight(self, W0: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """W' as the storage reads W0, tracked by autograd."""
        return ops.modulated_weight(*self._matrices(W0, A, B)).view(W0.shape)

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
        A, B = (torch.randn(shape) for shape in self._factor_shapes(r))
        if config.init_weights is not False:
            self._init_factors(A, B, r, config.init_weights)
        dropout = nn.Dropout(config.hira_dropout) if config.hira_dropout > 0 else nn.Identity()
        self.hira_dropout.update({adapter_name: dropout})
        self.r[adapter_name] = r
        self.weight_gradient[adapter_name] = getattr(config, "weight_gradient", "exact")  # not in PEFT's config
        self.scaling[adapter_name] = 1  # an integer, which torch.compile never takes for a variable
        self._set_factors(adapter_name, nn.Parameter(A), nn.Parameter(B))
        self._equal_on_all_processes.discard(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def reset_hira_parameters(self, adapter_name: str, init_weights: InitWeights) -> None:
        """Start an adapter anew, in place, as `init_weights` says (False leaves it as it is)."""
        check_init_weights(init_weights)
        if init_weights is not False and adapter_name in self._factor_dicts[0]:
            A, B = (factors[adapter_name] for factors in self._factor_dicts)
            self._equal_on_all_processes.discard(adapter_name)
            with torch.no_grad():
                self._init_factors(A, B, self.r[adapter_name], init_weights)

    def resize_adapter(self, adapter_name: str, r: int) -> None:
        """Give an adapter another rank; its values are lost."""
        for factors, shape in zip(self._factor_dicts, self._factor_shapes(r), strict=True):
            old = factors[adapter_name]
            factors[adapter_name] = nn.Parameter(old.new_zeros(shape), requires_grad=old.requires_grad)
        self.r[adapter_name] = r

    def copy_adapter(self, source: str, target: str) -> None:
        """Give an adapter the rank and the values of another; nothing happens where the layer lacks the other."""
        if not self._present([source]):
            return
        if self.r[target] != self.r[source]:
            self.resize_adapter(target, self.r[source])
        with torch.no_grad():
            for factors in self._factor_dicts:
                factors[target].copy_(factors[source])

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype | None]:
        """Where PEFT moves an adapter to, and its dtype, unless that is one of integers."""
        stored = self.storage.stored
        base = self.get_base_layer()
        device = offloaded.execution_device(base) if offloaded.offloading_hook(base) is not None else stored.device
        return torch.device(device), getattr(base, "compute_dtype", stored.dtype)

    @property
    def _factor_dicts(self) -> tuple[nn.ParameterDict, nn.ParameterDict]:
        A, B = self.factor_names
        return self._modules[A], self._modules[B]  # type: ignore[return-value]

    def _set_factors(self, adapter_name: str, A: nn.Parameter, B: nn.Parameter) -> None:
        for factors, value in zip(self._factor_dicts, (A, B), strict=True):
            factors[adapter_name] = value

    def _present(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if name in self._factor_dicts[0]]

    def _factor(self, factors: nn.ParameterDict, name: str) -> Tensor:
        """A or B of an adapter, brought in if it was offloaded."""
        factor: Tensor = getattr(factors, name)
        if factor.is_meta:
            offloaded.check_can_train(factors, name)
            factor = offloaded.load(factors, name)
        return factor

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        """The module's state, with W0 while adapters are merged too, and with adapters that accelerate offloads."""
        self._settle(by_value=False)
        if self._record is None or self.storage.is_one_parameter:
            state = super().state_dict(*args, prefix=prefix, **kwargs)
            self._put_W0(state, prefix)
        else:
            with self.holding_W0():
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
        if self._record is not None and key in state and offloaded.offloading_hook(storage.layer) is None:
            W0 = storage.value_of(self._record.original)
            state[key] = W0 if state[key].requires_grad else W0.detach()

    def _scale(self, name: str) -> float:
        return self.merged_scaling.get(name, self.scaling[name])

    def _scaled(self, name: str) -> tuple[Tensor, Tensor]:
        """A and B of an adapter, B times its scale: of a merged adapter, the scale that it was merged with."""
        A, B = (self._factor(factors, name) for factors in self._factor_dicts)
        scale = self._scale(name)
        return (A, B) if scale == 1 else (A, B.to(torch.promote_types(B.dtype, torch.float32)) * scale)

    def _factors(self, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """A and B of some adapters, joined to one adapter of the summed rank."""
        if len(names) == 1:
            return self._scaled(names[0])
        As, Bs = zip(*map(self._scaled, names), strict=True)
        dtype = reduce(torch.promote_types, (factor.dtype for factor in (*As, *Bs)))
        return torch.cat([A.to(dtype) for A in As]), torch.cat([B.to(dtype) for B in Bs], dim=1)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return BA, the modulation less one, of an adapter.

        Args:
            adapter: its name.

        Returns:
            BA, times the adapter's scale, in the shape of the base layer's weight as it is stored and the dtype of B;
            formed in float32 if that is a half precision. The additive update W0 * BA is `get_additive_delta`.
        """
        A, B = self._factors([adapter])
        dtype = formation_dtype(B.dtype)
        return self._delta(A.to(dtype), B.to(dtype)).to(self._factor_dicts[1][adapter].dtype)

    def get_additive_delta(self, adapter: str) -> Tensor:
        """Return ``W0 * BA``, what an adapter adds to the weight, in the base weight's stored shape and dtype."""
        A, B = self._factors([adapter])
        W0 = self._stored_orientation(self._read_original().detach())
        dtype = formation_dtype(W0.dtype)
        return (self._delta(A.to(dtype), B.to(dtype)) * W0).to(W0.dtype)

    def _stored_orientation(self, W0: Tensor) -> Tensor:
        return W0

    @property
    def weight(self) -> Tensor:
        """The base layer's weight; W' where a model's forward reads it instead of calling the layer."""
        return self._read_by_model("weight")

    def _read_by_model(self, name: str) -> Tensor:
        """A parameter of the base layer, or W' if that is the adapted one and a forward reads it."""
        storage = self.storage
        if name == storage.name and storage.takes_dense and (self.weight_is_read or _is_in_a_call()):
            names = self._applied()
            if self.weight_is_read or torch.compiler.is_compiling():
                if names:
                    return self._stored_orientation(
                        self._effective_weight(self._read_original(), *self._factors(names))
                    )
            elif (rows := adapters_of_rows.get()) is not None and any(self._present([row]) != names for row in rows):
                return self._lazy_weight(list(self._factor_dicts[0]), partial(self._refuse_rows, names))
            elif names:
                return self._lazy_weight(names)
        weight: Tensor = getattr(self._modules["base_layer"], name)
        return weight

    def _lazy_weight(self, names: list[str], dequantize: Dequantize | None = None) -> Tensor:
        """W' that is formed where it is multiplied by: often a forward reads no more than its dtype."""
        with self.holding_W0() if self._record is not None else nullcontext():
            storage = self.storage
            stored, brings_in = storage.stored, dequantize or storage.dequantize
            if is_dtensor(stored):
                brings_in = lambda _: storage.kept()  # noqa: E731  # which says why it cannot be read
            else:
                stored = storage.kept()
        A, B = self._factors(names)
        expert = Expert(*self._matrices(stored, A, B))
        if brings_in is not None:
            fetch = brings_in
            expert = expert._replace(dequantize=lambda _: self._matrices(fetch(stored), A, B)[0])
        return weight_of_layer(
            expert, transposed=isinstance(storage, Transposed), kernel=stored.shape if stored.dim() > 2 else None
        )

    def _refuse_rows(self, active: list[str], stored: Tensor) -> Tensor:
        raise HiraError(
            f"adapter_names asks for other adapters than the active {active}, but the model multiplies by the weight "
            f"of {self.name or 'a layer'} itself, which is one for all rows; set the adapter and pass no names."
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if hasattr(type(self), name):  # a property raised an AttributeError, which it does again
                return object.__getattribute__(self, name)
            if name.startswith("_") or "base_layer" not in self._modules:
                raise
            return getattr(self._modules["base_layer"], name)

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
        super().__setstate__(state)  # type: ignore[no-untyped-call]

    def __repr__(self) -> str:
        return "hira." + super().__repr__()

    def extra_repr(self) -> str:
        """Name the package: the layers of PEFT's own HiRA print as `hira.Linear` too."""
        return f"hira {__version__}"

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
        y: Tensor
        base, given = self.get_base_layer(), x.device
        if offloaded.is_hooked(base):
            self._settle(by_value=False)  # whoever offloads a model may have made the hook's values of a state dict
            x = offloaded.to_execution_device(x, base)
        if adapter_names is not None and not self.disable_adapters:
            y = self._mixed_batch_forward(x, adapter_names, *args, **kwargs)
        elif names := self._applied():
            output = self._active if self._record is None else self._beside_merged
            y = output(x, names, *args, **kwargs)
        else:
            y = self._base_output(x, *args, **kwargs)
        return y.to(given) if offloaded.is_hooked(base) and offloaded.returns_output(base) else y

    def _base_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = self.base_layer(x, *args, **kwargs)
        return y

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _beside_merged(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """The output under adapters of which some are merged, that of W0 with all of them; compiled, a graph break."""
        if not self.others_merged:
            with self.holding_W0():
                return self._active(x, names, *args, **kwargs)
        if self.storage.takes_dense and not self._is_plain(self.get_base_layer()):
            raise HiraError(
                f"Of {names} in {self.name or 'a layer'}, which has a forward of its own, only {self.merged_adapters} "
                "are merged, and so are adapters of another tuner. Merge all active adapters, or unmerge first."
            )
        y = self._base_output(x, *args, **kwargs)
        with self.holding_W0():
            return self._with_updates(y, x, [name for name in names if name not in self.merged_adapters])

    def _active(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """The output under the active adapters; a kind of layer may find it sooner than `_adapted` would."""
        return self._adapted(x, names, *args, **kwargs)

    def _adapted(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """The output under some adapters: one product where the base layer is plain, or its call has one."""
        base_output = partial(self._base_output, x, *args, **kwargs)
        if not names:
            return base_output()
        offloaded.check_reachable(self.get_base_layer(), self.storage.stored, x)
        if self._runs_inside():
            y, met = self._inside(names, base_output)
            return y if met else self._with_updates(y, x, names)
        if self._is_plain() and not (args or kwargs):
            return self._combined(x, names, base_output)
        if not self.storage.takes_dense:
            return self._with_updates(base_output(), x, names)
        plain = self._has_one_product() and offloaded.is_own_forward(self.get_base_layer())
        if plain and any(map(self._drops, names)):
            # what is around the plain layer, hooks and another tuner's dropout, runs once
            if torch.compiler.is_compiling():
                return self._with_updates(base_output(), x, names)
            y, met = self._inside(names, base_output)
            return y if met else self._with_updates(y, x, names)
        y = self._called([name for name in names if not self._drops(name)], x, *args, **kwargs)
        for name in names:
            if self._drops(name):
                y = y + self._dropped_change(name, x, *args, **kwargs)
        return y

    def _called(self, names: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's own call, in which it finds W' of some adapters in the place of its weight."""
        if not names:
            return self._base_output(x, *args, **kwargs)
        storage, factors = self.storage, self._factors(names)
        with exclusive(storage.layer), ExitStack() as stack:
            if storage.is_computed_by_hook():
                # the weight to adapt is there once the layer's hooks have run, of which this is the last
                stack.enter_context(substituted(storage.layer, **{storage.name: storage.stored}))
                hook = partial(self._substitute_computed, factors)
                stack.callback(storage.layer.register_forward_pre_hook(hook).remove)
            else:
                stack.enter_context(self._substituted(*factors))
            y: Tensor = self.base_layer(x, *args, **kwargs)
            return y

    @contextmanager
    def _substituted(self, A: Tensor, B: Tensor) -> Iterator[None]:
        """Have the base layer find W' for its weight; autograd keeps W0, A and B of it."""
        storage = self.storage
        W0 = storage.read()
        weight = formed(*self._matrices(W0, A, B))
        stored = self._stored_orientation(weight.weight.view(W0.shape))
        with substituted(storage.layer, **{storage.name: stored}), recomputed(weight):
            yield

    def _substitute_computed(self, factors: tuple[Tensor, Tensor], layer: nn.Module, args: Any) -> None:
        weight = self._effective_weight(self.storage.read(), *factors)
        layer.__dict__[self.storage.name] = self._stored_orientation(weight)

    def _dropped_change(self, name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What an adapter changes of the output of the base layer's own call, on the input that dropout leaves."""
        return self._change(name, self.hira_dropout[name](x), *args, **kwargs)

    def _change(self, name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What an adapter changes of the base layer's output, both computed with the same random numbers."""
        with _random_numbers_again(x.device):
            adapted = self._called([name], x, *args, **kwargs)
        return adapted - self._base_output(x, *args, **kwargs)

    def _combined(self, x: Tensor, names: list[str], base_output: Callable[[], Tensor]) -> Tensor:
        """The output of a plain layer: one product for the adapters without dropout, one more for each with it."""
        steady = [name for name in names if not self._drops(name)]
        y = self._product(x, *self._factors(steady)) if steady else base_output()
        return self._with_updates(y, x, [name for name in names if name not in steady])

    def _with_updates(self, y: Tensor, x: Tensor, names: list[str]) -> Tensor:
        steady = [name for name in names if not self._drops(name)]
        if steady:
            y = y + self._update(x, *self._factors(steady)).to(y.dtype)
        for name in (name for name in names if name not in steady):
            y = y + self._update(x, *self._factors([name]), self.hira_dropout[name]).to(y.dtype)
        return y

    def _drops(self, name: str) -> bool:
        dropout = self.hira_dropout[name]
        return dropout.training and isinstance(dropout, nn.Dropout) and dropout.p > 0

    def _is_one_product(self, names: list[str], args: Any, kwargs: Any) -> bool:
        """Whether the output under some adapters is that of the plain forward with W', and nothing else."""
        plain = not (args or kwargs or self._runs_inside()) and self._is_plain()
        return plain and bool(names) and not any(self._drops(name) for name in names)

    def _is_plain(self, base: nn.Module | None = None) -> bool:
        """Whether a layer, the one inside by default, does no more than the forward of its type."""
        base = self.base_layer if base is None else base
        if type(base).forward not in self.storage.plain_forwards or not offloaded.is_own_forward(base):
            return False
        hooks = (base._forward_hooks, base._forward_pre_hooks, base._backward_hooks, base._backward_pre_hooks)
        return not any(hooks) or all(only_gathers(hook) for kind in hooks for hook in kind.values())

    def _mixed_batch_forward(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        if self.merged:
            raise HiraError(
                f"adapter_names was passed while {self.merged_adapters} are merged into {self.name or 'a layer'}; call "
                "unmerge_adapter() first."
            )
        if len(adapter_names) != len(x):
            raise HiraError(
                f"adapter_names names {len(adapter_names)} rows, but {self.name or 'a layer'} got {len(x)}; pass one "
                "name for each sample of the batch."
            )
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(adapter_names):
            rows.setdefault(name if name in self._factor_dicts[0] else BASE, []).append(row)
        self._check_mixed_batch(rows)
        if len(rows) == 1:
            return self._adapted(x, self._present(list(rows)), *args, **kwargs)
        parts = self._mixed_parts(x, rows, *args, **kwargs)
        order = torch.tensor([row for group in rows.values() for row in group], device=x.device)
        return torch.cat(parts)[torch.argsort(order)]

    def _mixed_parts(self, x: Tensor, rows: dict[str, list[int]], *args: Any, **kwargs: Any) -> list[Tensor]:
        """The outputs for the rows of each adapter, in the order of the adapters."""
        return [self._adapted(x[rows[name]], self._present([name]), *args, **kwargs) for name in rows]


def _check_scale(scale: Any, nonzero: bool = False) -> None:
    if not isinstance(scale, Real) or not math.isfinite(scale) or (nonzero and scale == 0):
        expected = f"a finite number{' other than 0' if nonzero else ''}"
        raise HiraError(f"The scale of an adapter must be {expected}, but is {scale!r}.")


def _random_numbers_again(device: torch.device) -> AbstractContextManager[None]:
    """A context behind which random numbers are those of its body again."""
    if torch.compiler.is_compiling():
        return nullcontext()
    if device.type == "cpu":
        return torch.random.fork_rng([])
    return torch.random.fork_rng([device], device_type=device.type)


def _is_in_a_call() -> bool:
    """Whether a module is being called: only then is a weight read to compute with; else to load, tie or resize it."""
    if torch.compiler.is_compiling():
        return True
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _CALL:
            return True
        frame = frame.f_back
    return False
