"""W' as a tensor that forms a matrix where a product asks for it, and only there.

A mixture-of-experts module multiplies the tokens of each expert by that expert's matrix of one parameter. Given a
`LazyWeight` in the place of the parameter, its own code does so by way of `ops.linear`. So does code that reads the
weight of a layer instead of calling it: that is the weight of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map

from hira.errors import HiraError
from hira.ops import heuristics
from hira.ops.effective_weight import modulated_weight, no_autocast
from hira.ops.embedding import embedding
from hira.ops.grouped import form_stack, grouped_linear
from hira.ops.linear import Dequantize, WeightGradient, linear


class Expert(NamedTuple):
    """One expert's base weight and adapter; its effective weight is ``W' = W0 * (1 + BA) + L2 L1``."""

    W0: Tensor  # (out, in)
    A: Tensor  # (r + lora_r, in), A over L1
    B: Tensor  # (out, r + lora_r), B beside L2
    lora_r: int = 0
    dequantize: Dequantize | None = None  # what makes W0 of a tensor in its place


class LazyWeight(Tensor):
    """The effective weights of experts, (n, out, in) or of one (out, in), without data of their own.

    Indexing and transposing give another of the kind, and products with it, those of `F.linear`, `matmul`, `bmm` and
    grouped ones, go expert by expert through `ops.linear`: an expert without a token costs nothing, and nothing
    weight-sized is kept for backward. On an accelerator a grouped one is one product of all experts, by
    `ops.grouped.grouped_linear`. Anything else forms W' of the experts it is about, tracked by autograd.

    Args:
        experts: the experts there are.
        ids: for each matrix, the index of its expert.
        transposed: whether the matrices are W'^T (in, out).
        stacked: whether it has three dimensions; otherwise it is one matrix, and `ids` has one entry.
        kernel: the shape of a convolution's weight, of which the matrix is what it flattens to.
        weight_gradient, training: as for `ops.linear`.
        whole: W0, A and B of all experts, stacked, where they are at hand and the matrices are those of all.
    """

    experts: Sequence[Expert]
    ids: list[int]
    transposed: bool
    stacked: bool
    kernel: torch.Size | None
    weight_gradient: WeightGradient
    whole: Expert | None
    training: bool

    @staticmethod
    def __new__(
        cls,
        experts: Sequence[Expert],
        ids: Iterable[int],
        *,
        transposed: bool = False,
        stacked: bool = True,
        kernel: torch.Size | None = None,
        weight_gradient: WeightGradient = "exact",
        whole: Expert | None = None,
        training: bool = False,
    ) -> LazyWeight:
        """Make the tensor; see the class."""
        W0, A, B, *_ = experts[0]
        ids = list(ids)
        rows, columns = W0.shape[::-1] if transposed else W0.shape
        trains = torch.is_grad_enabled() and any(t.requires_grad for t in (W0, A, B))
        self: LazyWeight = Tensor._make_wrapper_subclass(
            cls,
            kernel or ((len(ids), rows, columns) if stacked else (rows, columns)),
            dtype=W0.dtype,
            device=A.device,
            requires_grad=trains,
        )
        self.experts, self.ids, self.weight_gradient, self.training = experts, ids, weight_gradient, training
        self.transposed, self.stacked, self.kernel, self.whole = transposed, stacked, kernel, whole
        if trains:
            with torch._C.DisableTorchFunctionSubclass():
                self.register_hook(_refuse_gradient)
        return self

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Take the way that a function has of its own, or else hand it W'."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = func.__self__.__name__
        if name in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        way = _WAYS.get(name)
        result = NotImplemented if way is None or kwargs.keys() - _KEYWORDS else way(*args, **kwargs)
        if result is not NotImplemented:
            return result
        args, kwargs = tree_map(lambda value: value.form() if isinstance(value, LazyWeight) else value, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Refuse: only what does not ask `__torch_function__` comes here, and there is no data to give it."""
        raise HiraError(
            f"{func} asks for the data of an adapted weight that is formed where it is multiplied by. Leave the module "
            "out of target_modules; for experts, use another implementation, such as "
            "model.set_experts_implementation('grouped_mm')."
        )

    def form(self) -> Tensor:
        """W' of the experts that it is about, dense and tracked by autograd."""
        if self.whole is not None and not torch.is_grad_enabled() and heuristics.stacks(self.whole.W0):
            W0, A, B, lora_r, _ = self.whole  # by the operations of a grouped product
            formed_whole = form_stack(W0, A, B, lora_r, W0.dtype)
            return formed_whole.mT if self.transposed else formed_whole
        formed = {i: self._form(*self.experts[i]) for i in set(self.ids)}
        matrices = [formed[i].t() if self.transposed else formed[i] for i in self.ids]
        if self.kernel is not None:
            return matrices[0].view(self.kernel)
        return torch.stack(matrices) if self.stacked else matrices[0]

    @staticmethod
    def _form(W0: Tensor, A: Tensor, B: Tensor, lora_r: int, dequantize: Dequantize | None) -> Tensor:
        return modulated_weight(W0 if dequantize is None else dequantize(W0), A, B, lora_r)

    def _apply(self, i: int, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., in) -> (..., out), the product with W' of expert i."""
        W0, A, B, lora_r, dequantize = self.experts[i]
        return linear(
            x,
            W0,
            A,
            B,
            bias,
            lora_r=lora_r,
            dequantize=dequantize,
            weight_gradient=self.weight_gradient,
            training=self.training,
        )

    def _of(self, ids: list[int], *, stacked: bool) -> LazyWeight:
        return self._like(ids, self.transposed, stacked, None)

    def _flipped(self) -> LazyWeight:
        return self._like(self.ids, not self.transposed, self.stacked, self.whole)

    def _like(self, ids: list[int], transposed: bool, stacked: bool, whole: Expert | None) -> LazyWeight:
        return LazyWeight(
            self.experts,
            ids,
            transposed=transposed,
            stacked=stacked,
            weight_gradient=self.weight_gradient,
            training=self.training,
            whole=whole,
        )


def weight_of_layer(expert: Expert, *, transposed: bool, kernel: torch.Size | None) -> Tensor:
    """W' of one layer, which may be given as a whole to an autograd function too.

    Args:
        expert: W0 and adapter of the layer, as matrices.
        transposed, kernel: as for `LazyWeight`.
    """
    if not torch.is_grad_enabled():
        return LazyWeight([expert], [0], transposed=transposed, stacked=False, kernel=kernel)
    weight: Tensor = _Whole.apply(expert, transposed, kernel, expert.W0, expert.A, expert.B)
    return weight


class _Whole(torch.autograd.Function):
    """Hands a gradient of W' as a whole on to W0, A and B."""

    @staticmethod
    def forward(
        ctx: Any, expert: Expert, transposed: bool, kernel: torch.Size | None, W0: Tensor, A: Tensor, B: Tensor
    ) -> Tensor:
        ctx.save_for_backward(W0, A, B)
        ctx.lora_r, ctx.dequantize, ctx.transposed = expert.lora_r, expert.dequantize, transposed
        return LazyWeight([expert], [0], transposed=transposed, stacked=False, kernel=kernel)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        W0, A, B = ctx.saved_tensors
        needed = ctx.needs_input_grad[3:]
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_(need) for tensor, need in zip((W0, A, B), needed, strict=True)]
            W0, A, B = leaves
            weight = modulated_weight(W0 if ctx.dequantize is None else ctx.dequantize(W0), A, B, ctx.lora_r)
        matrix = gradient.t() if ctx.transposed else gradient.reshape(weight.shape)
        found = iter(torch.autograd.grad(weight, [leaf for leaf in leaves if leaf.requires_grad], matrix))
        return None, None, None, *(next(found) if need else None for need in needed)


# Functions that LazyWeight has a way of its own for. Each returns NotImplemented for arguments that need W' itself.


def _index(weight: LazyWeight, index: Any) -> Any:
    if not weight.stacked or isinstance(index, bool):
        return NotImplemented
    if isinstance(index, Tensor):
        if index.dtype not in (torch.int64, torch.int32) or index.dim() > 1:
            return NotImplemented
        index = index.tolist()
        if isinstance(index, list):
            return weight._of([weight.ids[i] for i in index], stacked=True) if index else NotImplemented
    return weight._of([weight.ids[index]], stacked=False) if isinstance(index, int) else NotImplemented


def _transpose(weight: LazyWeight, dim0: int = -2, dim1: int = -1) -> Any:
    if weight.kernel is not None:
        return NotImplemented
    last_two = {weight.dim() - 2, weight.dim() - 1}
    return weight._flipped() if {dim0 % weight.dim(), dim1 % weight.dim()} == last_two else NotImplemented


def _transpose_matrix(weight: LazyWeight) -> Any:
    return NotImplemented if weight.stacked or weight.kernel is not None else weight._flipped()


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if not _is_factor(weight, transposed=False, stacked=False) or isinstance(x, LazyWeight):
        return NotImplemented
    return weight._apply(weight.ids[0], x, bias)


def _matmul(x: Tensor, weight: Tensor) -> Any:
    if _is_factor(weight, transposed=True, stacked=False) and not isinstance(x, LazyWeight):
        return weight._apply(weight.ids[0], x)
    return _bmm(x, weight) if x.dim() == weight.dim() == 3 and len(x) == len(weight) else NotImplemented


def _bmm(x: Tensor, weight: Tensor) -> Any:
    """The products of a batch, those with one expert's matrix together."""
    if _is_factor(x, transposed=False, stacked=True) and not isinstance(weight, LazyWeight):
        return _bmm(weight.transpose(1, 2), x._flipped()).transpose(1, 2)  # W' x = (x^T W'^T)^T
    if not _is_factor(weight, transposed=True, stacked=True) or isinstance(x, LazyWeight):
        return NotImplemented
    places: dict[int, list[int]] = {}
    for place, i in enumerate(weight.ids):
        places.setdefault(i, []).append(place)
    parts = [weight._apply(i, x[batch]) for i, batch in places.items()]
    order = torch.tensor([place for batch in places.values() for place in batch], device=x.device)
    return torch.cat(parts)[torch.argsort(order)]


def _grouped(x: Tensor, weight: Tensor, offs: Tensor | None = None, **options: Any) -> Any:
    """x (T, in), sorted by expert, `offs` the end of each expert's rows; rows behind the last end give zeros."""
    plain = all(value is None for value in options.values())
    if not _is_factor(weight, transposed=True, stacked=True) or offs is None or x.dim() != 2 or not plain:
        return NotImplemented
    whole = weight.whole
    if whole is not None and weight.weight_gradient == "exact" and heuristics.groups(x, len(weight.ids)):
        return grouped_linear(x, whole.W0, whole.A, whole.B, whole.lora_r, offs)
    parts, start = [], 0
    with no_autocast(x.device):  # a grouped product is none of those that autocast is for
        for i, end in zip(weight.ids, offs.tolist(), strict=True):
            if end > start:
                parts.append(weight._apply(i, x[start:end]))
                start = end
    return torch.cat([*parts, x.new_zeros(len(x) - start, weight.shape[-1])])


def _is_factor(value: Any, *, transposed: bool, stacked: bool) -> TypeGuard[LazyWeight]:
    if not isinstance(value, LazyWeight) or value.kernel is not None:
        return False
    return (value.transposed, value.stacked) == (transposed, stacked)


def _refuse_gradient(gradient: Tensor) -> None:
    raise HiraError(
        "A gradient was computed of an adapted weight as a whole, by code that HiRA cannot follow to its adapters. "
        "Leave the module out of target_modules; for experts, use another implementation, such as "
        "model.set_experts_implementation('grouped_mm')."
    )


def _embedding(ids: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **options: Any) -> Any:
    """Rows of a table (num_embeddings, dim), which is W'^T of an embedding."""
    if not _is_factor(weight, transposed=False, stacked=False) or isinstance(ids, LazyWeight) or args:
        return NotImplemented
    W0, A, B, lora_r, dequantize = weight.experts[weight.ids[0]]
    table = W0 if dequantize is None else dequantize(W0)
    padding_idx = padding_idx if padding_idx is None else padding_idx % len(table)
    return embedding(ids, table, B.t(), A.t(), lora_r, padding_idx=padding_idx, **options)


_WAYS: dict[str, Callable[..., Any]] = {
    "embedding": _embedding,
    "__getitem__": _index,
    "t": _transpose_matrix,
    "T": _transpose_matrix,
    "mT": _transpose,
    "transpose": _transpose,
    "linear": _linear,
    "matmul": _matmul,
    "__matmul__": _matmul,
    "mm": _matmul,
    "bmm": _bmm,
    "grouped_mm": _grouped,
    "_grouped_mm": _grouped,
    "grouped_mm_fallback": _grouped,  # of transformers
    "data_ptr": lambda weight: 0,  # asked for its alignment; there is no memory to point to
}
_KEYWORDS = frozenset(
    (
        *("bias", "offs", "out_dtype", "dim0", "dim1"),
        *("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
    )
)
_METADATA = frozenset(
    (
        *("shape", "size", "dim", "ndim", "numel", "__len__", "__hash__", "requires_grad", "layout"),
        *("dtype", "element_size", "itemsize", "is_floating_point", "is_complex", "is_sparse", "is_quantized"),
        *("device", "get_device", "is_cuda", "is_cpu", "is_meta"),
    )
)
