"""Ways of storing a base weight: the cases of test_storages.py, and of the table in docs/base_layers.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

IN, OUT = 128, 64
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class StorageCase:
    """One way of storing the weight of a linear layer.

    Args:
        name: as it stands in the table.
        dtype: the one that the layer computes in, or that its weight had; None where it takes any.
        package: the distribution that it comes from.
        quantise: makes such a layer of an `nn.Linear`.
        dense: W0 (out, in) of such a layer, by the package's own functions.
        stored: all tensors that its weight consists of.
        write: the W0 that the package stores for a layer like the first argument when given a dense weight; None where
            it cannot store one.
        product: the dtype in which the layer multiplies x of a dtype.
        whole: whether the layer's output is x W0^T; False where it rounds x as well.
        inputs: dtypes of x that the layer takes.
        processor: the kind of processor of which the layer believes that it runs there; empty where that is the same.
    """

    name: str
    dtype: torch.dtype | None
    package: str
    quantise: Callable[[nn.Linear], nn.Module]
    dense: Callable[[Any], Tensor]
    stored: Callable[[Any], list[Tensor]]
    write: Callable[[Any, Tensor], Tensor] | None
    product: Callable[[torch.dtype], torch.dtype] = lambda dtype: dtype
    whole: bool = True
    inputs: tuple[torch.dtype, ...] = FLOATS
    processor: str = ""

    @property
    def id(self) -> str:
        """The name of its tests."""
        dtype = "" if self.dtype is None else str(self.dtype).removeprefix("torch.")
        return ", ".join(part for part in (self.name, dtype, self.processor) if part)

    @property
    def installed(self) -> str | None:
        """The version of the package; None where it is not installed."""
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None


def _weight(layer: Any) -> Tensor:
    return layer.weight.detach()


def _plain(dtype: torch.dtype) -> StorageCase:
    return StorageCase(
        name="`nn.Linear`",
        dtype=dtype,
        package="torch",
        quantise=lambda linear: linear.to(dtype),
        dense=_weight,
        stored=lambda layer: [layer.weight],
        write=lambda layer, weight: weight,
        inputs=(dtype,),
    )


def _conv1d(linear: nn.Linear) -> nn.Module:
    layer = Conv1D(linear.out_features, linear.in_features)
    layer.weight = nn.Parameter(linear.weight.detach().t().contiguous())
    layer.bias = nn.Parameter(torch.zeros(linear.out_features) if linear.bias is None else linear.bias.detach())
    return layer


CONV1D = StorageCase(
    name="`Conv1D` of Transformers",
    dtype=torch.float32,
    package="transformers",
    quantise=_conv1d,
    dense=lambda layer: layer.weight.detach().t(),
    stored=lambda layer: [layer.weight],
    write=lambda layer, weight: weight,
    inputs=(torch.float32,),
)


def _bnb_4bit(kind: str, double: bool, compute: torch.dtype, repacks: bool) -> StorageCase:
    def quantise(linear: nn.Linear) -> nn.Module:
        import bitsandbytes as bnb

        layer = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            quant_type=kind,
            compress_statistics=double,
            compute_dtype=compute,
        )
        layer.load_state_dict(linear.state_dict())
        layer.support_avx512bf16_for_cpu = repacks
        return layer.to("cpu")

    def dense(layer: Any) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(layer.weight.data, layer.weight.quant_state)

    def stored(layer: Any) -> list[Tensor]:
        assert layer.quant_state is layer.weight.quant_state
        statistics = layer.weight.quant_state.as_dict(packed=True)
        return [layer.weight.data, *(value for _, value in sorted(statistics.items()))]

    def write(layer: Any, weight: Tensor) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        options = {"blocksize": 64, "compress_statistics": double, "quant_type": kind}
        return dequantize_4bit(*quantize_4bit(weight, **options))

    return StorageCase(
        name=f"`Linear4bit`, {kind}{', double quantisation' if double else ''}",
        dtype=compute,
        package="bitsandbytes",
        quantise=quantise,
        dense=dense,
        stored=stored,
        write=write,
        product=lambda dtype: compute,
        processor="AVX512-BF16" if repacks else "no AVX512-BF16",
    )


def _bnb_8bit() -> StorageCase:
    def quantise(linear: nn.Linear) -> nn.Module:
        import bitsandbytes as bnb

        options = {"bias": linear.bias is not None, "has_fp16_weights": False}
        layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, **options)
        layer.load_state_dict(linear.state_dict())
        return layer.to("cpu")

    def stored(layer: Any) -> list[Tensor]:
        state, weight = layer.state, layer.weight
        return [weight.data, weight.SCB if state.SCB is None else state.SCB]

    def dense(layer: Any) -> Tensor:
        from bitsandbytes.functional import int8_vectorwise_dequant

        return int8_vectorwise_dequant(*stored(layer))

    def write(layer: Any, weight: Tensor) -> Tensor:
        from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant

        codes, scales, _ = int8_vectorwise_quant(weight.half())
        return int8_vectorwise_dequant(codes, scales)

    return StorageCase(
        name="`Linear8bitLt`",
        dtype=None,
        package="bitsandbytes",
        quantise=quantise,
        dense=dense,
        stored=stored,
        write=write,
        whole=False,
    )


def _torchao(name: str, config: Callable[[Any], Any], dtype: torch.dtype) -> StorageCase:
    def quantise(linear: nn.Linear) -> nn.Module:
        from torchao import quantization

        linear.to(dtype)
        quantization.quantize_(linear, config(quantization))
        return linear

    def stored(layer: Any) -> list[Tensor]:
        names = layer.weight.tensor_data_names
        return [getattr(layer.weight, name).view(torch.uint8) for name in names]

    return StorageCase(
        name=name,
        dtype=dtype,
        package="torchao",
        quantise=quantise,
        dense=lambda layer: layer.weight.detach().dequantize(),
        stored=stored,
        write=lambda layer, weight: _weight(quantise(_linear(weight))).dequantize(),
        inputs=(dtype,),
    )


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return linear


TORCHAO = [
    _torchao(name, config, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for name, config in (
        ("`Int8Tensor`, a scale for each row", lambda ao: ao.Int8WeightOnlyConfig()),
        ("`Int8Tensor`, for 32 columns", lambda ao: ao.Int8WeightOnlyConfig(granularity=ao.PerGroup(32))),
        ("`Int8Tensor`, for all", lambda ao: ao.Int8WeightOnlyConfig(granularity=ao.PerTensor())),
        ("`Float8Tensor`, e4m3, for each row", lambda ao: ao.Float8WeightOnlyConfig()),
        ("`Float8Tensor`, e4m3, for all", lambda ao: ao.Float8WeightOnlyConfig(granularity=ao.PerTensor())),
        ("`Float8Tensor`, e5m2", lambda ao: ao.Float8WeightOnlyConfig(weight_dtype=torch.float8_e5m2)),
        (
            "`IntxUnpackedToInt8Tensor`, 4 bits, for 32 columns",
            lambda ao: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(32)),
        ),
        (
            "`IntxUnpackedToInt8Tensor`, 4 bits, shifted",
            lambda ao: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, mapping_type=ao.MappingType.ASYMMETRIC),
        ),
    )
]


def _hqq(bits: int, group: int, axis: int, compute: torch.dtype) -> StorageCase:
    def quantise(linear: nn.Linear) -> nn.Module:
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        config = BaseQuantizeConfig(nbits=bits, group_size=group, axis=axis)
        return HQQLinear(linear.requires_grad_(False), config, compute_dtype=compute, device="cpu")

    return StorageCase(
        name=f"`HQQLinear`, {bits} bits, axis {axis}",
        dtype=compute,
        package="hqq",
        quantise=quantise,
        dense=lambda layer: layer.dequantize(),
        stored=lambda layer: [layer.W_q, layer.meta["scale"], layer.meta["zero"]],
        write=lambda layer, weight: quantise(_linear(weight)).dequantize(),
        inputs=(compute,),
    )


def _aqlm(dtype: torch.dtype) -> StorageCase:
    """Random codes and codebooks: AQLM learns them on data."""

    def quantise(linear: nn.Linear) -> nn.Module:
        from aqlm import QuantizedLinear

        options = {"in_group_size": 8, "out_group_size": 1, "num_codebooks": 1, "nbits_per_codebook": 16}
        bias = linear.bias is not None
        layer = QuantizedLinear(linear.in_features, linear.out_features, **options, bias=bias, dtype=dtype)
        layer.codebooks.data.normal_()
        layer.scales.data.fill_(0.05)
        layer.codes.data = torch.randint(-(2**15), 2**15, layer.codes.shape, dtype=torch.int16)
        if bias:
            layer.bias.data.copy_(linear.bias.data)
        return layer

    def dense(layer: Any) -> Tensor:
        from aqlm.utils import _dequantize_weight, unpack_int_data

        return _dequantize_weight(unpack_int_data(layer.codes, layer.nbits_per_codebook), layer.codebooks, layer.scales)

    return StorageCase(
        name="`QuantizedLinear`, one codebook of 16 bits",
        dtype=dtype,
        package="aqlm",
        quantise=quantise,
        dense=lambda layer: dense(layer).detach().clone(),
        stored=lambda layer: [layer.codes, layer.codebooks, layer.scales],
        write=None,
        inputs=(dtype,),
    )


def _gptq(method: str, kind: str, bits: int) -> StorageCase:
    """Rounded to nearest: what calibration would choose instead makes no difference to how codes are read."""
    group, top = 32, 2**bits - 1

    def quantise(linear: nn.Linear) -> nn.Module:
        from gptqmodel.nn_modules.qlinear import torch as gptq
        from gptqmodel.nn_modules.qlinear import torch_aten_kernel, torch_aten_kernel_awq, torch_awq

        kinds = {"TorchLinear": gptq, "AwqTorchLinear": torch_awq}
        kinds |= {"TorchAtenLinear": torch_aten_kernel, "TorchAtenAwqLinear": torch_aten_kernel_awq}
        linear.requires_grad_(False)
        blocks = linear.weight.data.reshape(linear.out_features, -1, group)
        scales = (2 * blocks.abs().amax(-1) / top).half().float()
        zeros = torch.full_like(scales, (top + 1) // 2)
        low, high = (edge.repeat_interleave(group, 1) for edge in (-zeros * scales, (top - zeros) * scales))
        linear.weight.data = linear.weight.data.clamp(low, high)
        options = {"bits": bits, "group_size": group, "sym": method == "GPTQ", "desc_act": False}
        sizes = {"in_features": linear.in_features, "out_features": linear.out_features}
        options |= {**sizes, "bias": linear.bias is not None, "register_buffers": True}
        if method == "GPTQ":
            packed = gptq.TorchLinear(**options)
            packed.pack_original(linear, scales, zeros, torch.arange(linear.in_features, dtype=torch.int32) // group)
        else:
            packed = torch_awq.AwqTorchLinear(**options)
            packed.pack(linear, scales, zeros)
        layer = getattr(kinds[kind], kind)(**options)
        for name, buffer in packed.state_dict().items():
            setattr(layer, name, buffer)
        layer.post_init()
        return layer

    def dense(layer: Any) -> Tensor:
        if method == "GPTQ":
            return type(layer).dequantize_weight(layer).T.clone()
        from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

        return dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, bits, group).T.clone()

    return StorageCase(
        name=f"`{kind}`, {method}, {bits} bits",
        dtype=None,
        package="gptqmodel",
        quantise=quantise,
        dense=dense,
        stored=lambda layer: [layer.qweight, layer.qzeros, layer.scales],
        write=None,
    )


CASES = (
    *(_plain(dtype) for dtype in (*FLOATS, torch.float64)),
    CONV1D,
    *(
        _bnb_4bit(kind, double, compute, repacks)
        for repacks in (False, True)
        for compute, kind, double in (
            *((torch.float32, kind, double) for kind in ("nf4", "fp4") for double in (False, True)),
            *((compute, "nf4", True) for compute in (torch.bfloat16, torch.float16)),
        )
    ),
    _bnb_8bit(),
    *TORCHAO,
    *(_hqq(bits, 64, 1, torch.float32) for bits in (8, 4, 3, 2)),
    *(_hqq(4, 64, axis, compute) for axis in (1, 0) for compute in (torch.bfloat16, torch.float16)),
    _gptq("GPTQ", "TorchAtenLinear", 4),
    _gptq("GPTQ", "TorchLinear", 8),
    _gptq("AWQ", "TorchAtenAwqLinear", 4),
    *(_aqlm(dtype) for dtype in (torch.float32, torch.bfloat16)),
)
