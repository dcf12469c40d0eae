"""The HiRA layers: HiraLayer, and Linear, Embedding and ConvNd on top of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hira import ops
from hira.config import InitWeights, check_init_weights, check_rank
from hira.errors import HiraError
from hira.merging import MergeableLayer
from hira.ops import modulate
from hira.weights import Storage, Transposed

BASE = "__base__"  # in adapter_names, a row of a mixed batch without an adapter


class HiraLayer(nn.Module, MergeableLayer):
    """A base layer with HiRA adapters on its weight, ``W' = W0 * (1 + BA)``.

    Active adapters add up, ``W' = W0 * (1 + B1 A1 + B2 A2 + ...)``, which is one adapter of the summed rank, so they
    cost one product. The base layer's own forward runs instead of it, and the update is added to its output, where that
    forward is not the plain one of its type: another tuner inside, a subclass with its own forward, hooks on the layer.
    So it does under dropout, where the base sees x and the update dropout(x).

    Args:
        base_layer: the layer to adapt, possibly another tuner's.
        ephemeral_gpu_offload: accepted for PEFT, without effect.

    Attributes of the base layer that a model reads, such as a convolution's stride, are found on this layer too.

    Source: HiRA (ICLR 2025), equation 5; parameter names from PEFT.
    """

    adapter_layer_names: tuple[str, ...] = ("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B")
    other_param_names: tuple[str, ...] = ("r", "hira_dropout")
    factor_names: ClassVar[tuple[str, str]] = ("hira_A", "hira_B")
    # forwards that compute the plain function of the weight, for which one product with W' stands in
    plain_forwards: ClassVar[tuple[Callable[..., Any], ...]] = ()
    # whether the model multiplies by `layer.weight` itself instead of calling the layer; then `weight` is W'
    weight_is_read = False

    def __init__(self, base_layer: nn.Module, ephemeral_gpu_offload: bool = False, **kwargs: Any) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer
        self.r: dict[str, int] = {}
        self.hira_dropout = nn.ModuleDict()
        self.hira_A = nn.ParameterDict()
        self.hira_B = nn.ParameterDict()
        self.hira_embedding_A = nn.ParameterDict()
        self.hira_embedding_B = nn.ParameterDict()
        self._disable_adapters = False
        self._init_merging()
        self.ephemeral_gpu_offload = ephemeral_gpu_offload
        self.cast_input_dtype_enabled = True
        self.kwargs = kwargs
        self.in_features, self.out_features = self._features(self.get_base_layer())

    # What a kind of layer defines

    @staticmethod
    def _features(base: nn.Module) -> tuple[int, int]:
        raise NotImplementedError

    @property
    def storage(self) -> Storage:
        """How the base weight is stored."""
        return Storage(self.get_base_layer())

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

    def _effective_weight(self, W0: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """W' as the storage reads W0, tracked by autograd."""
        return ops.modulated_weight(W0, A, B)

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
        A, B = (torch.randn(shape) for shape in self._factor_shapes(r))
        if config.init_weights is not False:
            self._init_factors(A, B, r, config.init_weights)
        dropout = nn.Dropout(config.hira_dropout) if config.hira_dropout > 0 else nn.Identity()
        self.hira_dropout.update({adapter_name: dropout})
        self.r[adapter_name] = r
        self._set_factors(adapter_name, nn.Parameter(A), nn.Parameter(B))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def reset_hira_parameters(self, adapter_name: str, init_weights: InitWeights) -> None:
        """Start an adapter anew, in place, as `init_weights` says (False leaves it as it is)."""
        check_init_weights(init_weights)
        if init_weights is not False and adapter_name in self._factor_dicts[0]:
            A, B = (factors[adapter_name] for factors in self._factor_dicts)
            with torch.no_grad():
                self._init_factors(A, B, self.r[adapter_name], init_weights)

    def resize_adapter(self, adapter_name: str, r: int) -> None:
        """Give an adapter another rank; its values are lost."""
        for factors, shape in zip(self._factor_dicts, self._factor_shapes(r), strict=True):
            old = factors[adapter_name]
            factors[adapter_name] = nn.Parameter(old.new_zeros(shape), requires_grad=old.requires_grad)
        self.r[adapter_name] = r

    @property
    def _factor_dicts(self) -> tuple[nn.ParameterDict, nn.ParameterDict]:
        A, B = self.factor_names
        return getattr(self, A), getattr(self, B)

    def _set_factors(self, adapter_name: str, A: nn.Parameter, B: nn.Parameter) -> None:
        for factors, value in zip(self._factor_dicts, (A, B), strict=True):
            factors[adapter_name] = value

    def _present(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if name in self._factor_dicts[0]]

    def _factors(self, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """A and B of some adapters, joined to one adapter of the summed rank."""
        As, Bs = ([factors[name] for name in names] for factors in self._factor_dicts)
        if len(names) == 1:
            return As[0], Bs[0]
        dtype = torch.promote_types(As[0].dtype, As[-1].dtype)
        return torch.cat([A.to(dtype) for A in As]), torch.cat([B.to(dtype) for B in Bs], dim=1)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return BA, the modulation less one, of an adapter.

        Args:
            adapter: its name.

        Returns:
            BA in the shape of the base layer's weight as it is stored and the dtype of B; formed in float32 if that is
            a half precision. The additive update W0 * BA is `get_additive_delta`.
        """
        A, B = self._factors([adapter])
        dtype = modulate.formation_dtype(B.dtype)
        return self._delta(A.to(dtype), B.to(dtype)).to(B.dtype)

    def get_additive_delta(self, adapter: str) -> Tensor:
        """Return ``W0 * BA``, what an adapter adds to the weight, in the base weight's stored shape and dtype."""
        A, B = self._factors([adapter])
        W0 = self._stored_orientation(self.storage.read().detach())
        dtype = modulate.formation_dtype(W0.dtype)
        return (self._delta(A.to(dtype), B.to(dtype)) * W0).to(W0.dtype)

    def _stored_orientation(self, W0: Tensor) -> Tensor:
        return W0

    @property
    def weight(self) -> Tensor:
        """The base layer's weight; W' where the model reads the weight instead of calling the layer."""
        names = self._present(self.active_adapters)
        if self.weight_is_read and names and not self.disable_adapters and not self.merged:
            return self._stored_orientation(self._effective_weight(self.storage.read(), *self._factors(names)))
        weight: Tensor = super().weight
        return weight

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "base_layer" not in self._modules:
                raise
            return getattr(self._modules["base_layer"], name)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: PEFT's generic conversion takes `get_delta_weight` for an additive update, which BA is not."""
        return False

    def __repr__(self) -> str:
        return "hira." + super().__repr__()

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
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            y = self.base_layer(x, *args, **kwargs)
        elif adapter_names is not None:
            y = self._mixed_batch_forward(x, adapter_names, *args, **kwargs)
        elif self.merged:
            y = self.base_layer(x, *args, **kwargs)
        else:
            y = self._adapted(x, self._present(self.active_adapters), *args, **kwargs)
        return y

    def _adapted(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """The output under some adapters: one product for those without dropout, one more for each with it."""
        dropping = [name for name in names if self._drops(name)]
        steady = [name for name in names if name not in dropping]
        if steady and self._is_plain() and not (args or kwargs):
            y = self._product(x, *self._factors(steady))
        else:
            y = self.base_layer(x, *args, **kwargs)
            if steady:
                y = y + self._update(x, *self._factors(steady)).to(y.dtype)
        for name in dropping:
            y = y + self._update(x, *self._factors([name]), self.hira_dropout[name]).to(y.dtype)
        return y

    def _drops(self, name: str) -> bool:
        dropout = self.hira_dropout[name]
        return dropout.training and isinstance(dropout, nn.Dropout) and dropout.p > 0

    def _is_plain(self) -> bool:
        base = self.base_layer
        return (
            type(base).forward in self.plain_forwards
            and "forward" not in base.__dict__
            and not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks)
        )

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
        if len(rows) == 1:
            return self._adapted(x, self._present(list(rows)), *args, **kwargs)
        parts = [self._adapted(x[rows[name]], self._present([name]), *args, **kwargs) for name in rows]
        order = torch.tensor([row for group in rows.values() for row in group], device=x.device)
        return torch.cat(parts)[torch.argsort(order)]


class Linear(HiraLayer):
    """HiRA on `nn.Linear`, or on a transformers `Conv1D` or another layer that stores its weight as (in, out).

    Args:
        base_layer: the layer to adapt.
        adapter_name: the first adapter's name.
        config: its HiraConfig.
        r: its rank; ``config.r`` by default.
        fan_in_fan_out: whether the weight is stored as (in, out).
        is_target_conv_1d_layer: whether the base layer is a `Conv1D`.

    Raises:
        HiraError: the rank is not a positive integer.

    Source: HiRA (ICLR 2025), equation 5.
    """

    plain_forwards = (nn.Linear.forward, Conv1D.forward)

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: Any,
        r: int | None = None,
        fan_in_fan_out: bool = False,
        is_target_conv_1d_layer: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(base_layer, **kwargs)
        self.fan_in_fan_out = fan_in_fan_out
        self.is_target_conv_1d_layer = is_target_conv_1d_layer
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config.r if r is None else r, config=config)

    @staticmethod
    def _features(base: nn.Module) -> tuple[int, int]:
        if isinstance(base, Conv1D):
            return base.weight.shape[0], base.weight.shape[1]
        return base.in_features, base.out_features

    @property
    def storage(self) -> Storage:
        base = self.get_base_layer()
        return Transposed(base) if self.fan_in_fan_out else Storage(base)

    def _product(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        storage = self.storage
        return ops.linear(x, storage.kept(), A, B, self.get_base_layer().bias, dequantize=storage.dequantize)

    def _update(self, x: Tensor, A: Tensor, B: Tensor, dropout: nn.Module | None = None) -> Tensor:
        storage = self.storage
        x = x if dropout is None else dropout(x)
        return ops.linear(x, storage.kept(), A, B, update_only=True, dequantize=storage.dequantize)

    def _delta(self, A: Tensor, B: Tensor) -> Tensor:
        return self._stored_orientation(B @ A)

    def _stored_orientation(self, W0: Tensor) -> Tensor:
        return W0.t() if self.fan_in_fan_out else W0


class Embedding(HiraLayer):
    """HiRA on `nn.Embedding`: A (r, num_embeddings), B (dim, r), ``W' = W0 * (1 + (BA)^T)``.

    Args:
        base_layer, adapter_name, config, r: as for Linear.
        fan_in_fan_out: accepted for PEFT, without effect.

    Raises:
        HiraError: the rank is not a positive integer.

    Source: HiRA (ICLR 2025), equation 5, on the rows that are looked up.
    """

    factor_names = ("hira_embedding_A", "hira_embedding_B")
    plain_forwards = (nn.Embedding.forward,)

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: Any,
        r: int | None = None,
        fan_in_fan_out: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(base_layer, **kwargs)
        self.fan_in_fan_out = fan_in_fan_out
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config.r if r is None else r, config=config)

    @staticmethod
    def _features(base: nn.Module) -> tuple[int, int]:
        return base.num_embeddings, base.embedding_dim

    def _init_factors(self, A: Tensor, B: Tensor, r: int, init_weights: InitWeights) -> None:
        nn.init.zeros_(A)
        nn.init.normal_(B)

    def _lookup(self, ids: Tensor, A: Tensor, B: Tensor, **options: Any) -> Tensor:
        base = self.get_base_layer()
        return ops.embedding(
            ids,
            self.storage.read(),
            A,
            B,
            padding_idx=base.padding_idx,
            scale_grad_by_freq=base.scale_grad_by_freq,
            sparse=base.sparse,
            **options,
        )

    def _product(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        base = self.get_base_layer()
        return self._lookup(x, A, B, max_norm=base.max_norm, norm_type=base.norm_type)

    def _update(self, x: Tensor, A: Tensor, B: Tensor, dropout: nn.Module | None = None) -> Tensor:
        keep = None if dropout is None else dropout(torch.ones(x.shape, device=x.device))
        update = self._lookup(x, A, B, keep=keep, update_only=True)
        scale = self._get_embed_scale()
        return update if scale is None else update * scale.to(update.dtype)

    def _effective_weight(self, W0: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return ops.modulated_weight(W0, B.t(), A.t())

    def _delta(self, A: Tensor, B: Tensor) -> Tensor:
        return (B @ A).t()


class ConvNd(HiraLayer):
    """HiRA on a convolution: A (r, in / groups, *kernel), B (out, r, 1, ...), multiplied over flattened kernels.

    Args:
        base_layer, adapter_name, config, r: as for Linear.

    Raises:
        HiraError: the rank is not a positive integer, or the convolution has another number of dimensions.

    Source: HiRA (ICLR 2025), equation 5, on the weight flattened to (out, in / groups * kernel).
    """

    plain_forwards = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
    spatial_dims: ClassVar[int | None] = None

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: Any, r: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(base_layer, **kwargs)
        found = self.get_base_layer().weight.dim() - 2
        if self.spatial_dims not in (None, found):
            raise HiraError(f"{type(self).__name__} needs {self.spatial_dims} spatial dimensions, the weight has {found}.")
        # short convolutions over each channel alone are often applied by kernels that take the weight
        self.weight_is_read = self.get_base_layer().groups == self.get_base_layer().in_channels > 1
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config.r if r is None else r, config=config)

    @staticmethod
    def _features(base: nn.Module) -> tuple[int, int]:
        return base.in_channels, base.out_channels

    def _factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        _, *rest = self.get_base_layer().weight.shape
        return (r, *rest), (self.out_features, r, *(1 for _ in rest[1:]))

    def _convolve(self, x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, *, update_only: bool) -> Tensor:
        base = self.get_base_layer()
        padding, pad = _padding(base)
        if pad is not None:
            mode: Literal["constant", "reflect", "replicate", "circular"]
            mode = "constant" if base.padding_mode == "zeros" else base.padding_mode
            x = F.pad(x, pad, mode=mode)
        return ops.conv(
            x,
            self.storage.read(),
            A,
            B,
            bias,
            stride=base.stride,
            padding=padding,
            dilation=base.dilation,
            groups=base.groups,
            update_only=update_only,
        )

    def _product(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return self._convolve(x, A, B, self.get_base_layer().bias, update_only=False)

    def _update(self, x: Tensor, A: Tensor, B: Tensor, dropout: nn.Module | None = None) -> Tensor:
        return self._convolve(x if dropout is None else dropout(x), A, B, None, update_only=True)

    def _effective_weight(self, W0: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return ops.modulated_weight(W0.flatten(1), A.flatten(1), B.flatten(1)).view(W0.shape)

    def _delta(self, A: Tensor, B: Tensor) -> Tensor:
        return (B.flatten(1) @ A.flatten(1)).view(self.get_base_layer().weight.shape)


class Conv1d(ConvNd):
    """HiRA on `nn.Conv1d`; see ConvNd."""

    spatial_dims = 1


class Conv2d(ConvNd):
    """HiRA on `nn.Conv2d`; see ConvNd."""

    spatial_dims = 2


class Conv3d(ConvNd):
    """HiRA on `nn.Conv3d`; see ConvNd."""

    spatial_dims = 3


def _padding(base: nn.Module) -> tuple[tuple[int, ...], list[int] | None]:
    """The zero padding to convolve with, and what to pad beforehand, in `F.pad`'s order, where zeros will not do."""
    dims = len(base.kernel_size)
    before_and_after = list(base._reversed_padding_repeated_twice)
    even = before_and_after[::2] == before_and_after[1::2]
    if base.padding_mode == "zeros" and even:
        return tuple(reversed(before_and_after[::2])), None
    return (0,) * dims, before_and_after
