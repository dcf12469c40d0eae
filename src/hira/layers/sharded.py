"""The product with W' of a layer whose weight is spread over processes, computed in the base layer's own call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from hira.base_weights.dense import Storage
from hira.distributed import tensor_parallel
from hira.distributed.detection import is_gathered_by_call, is_laid_out_by_call, sharded_by
from hira.distributed.interception import Product, intercept
from hira.distributed.tensor_parallel import Layout, layout_of
from hira.errors import HiraError


class ShardedLayer(BaseTunerLayer):
    """The half of a HiRA layer that knows of processes. The other half says which adapters there are."""

    # the module's name in the model, for messages
    name: str = ""

    def _init_sharding(self) -> None:
        # adapters of which tensor parallelism was seen to that all processes have the same
        self._equal_on_all_processes: set[str] = set()

    @property
    def storage(self) -> Storage:
        """How the base weight is stored."""
        raise NotImplementedError

    @property
    def _factor_dicts(self) -> tuple[nn.ParameterDict, nn.ParameterDict]:
        raise NotImplementedError

    def _factors(self, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _drops(self, name: str) -> bool:
        raise NotImplementedError

    def _combined(self, x: Tensor, names: list[str], base_output: Callable[[], Tensor]) -> Tensor:
        raise NotImplementedError

    def _runs_inside(self) -> bool:
        """Whether the product has to be computed in the base layer's own call."""
        if torch.compiler.is_compiling():
            return False
        return is_laid_out_by_call(self.storage.layer, self.storage.name) and self._has_one_product()

    def _has_one_product(self) -> bool:
        """Whether the base layer's own call computes one product with its weight, which another can stand in for."""
        return type(self.storage.layer).forward in self.storage.plain_forwards

    def _inside(self, names: list[str], call: Callable[[], Tensor]) -> tuple[Tensor, bool]:
        """The output of a call of the base layer, and whether it had a product, for which one with W' stood in."""
        return intercept(self.storage.layer, call, partial(self._exchange, names, self._layout()))

    def _exchange(self, names: list[str], layout: Layout | None, product: Product) -> Tensor:
        layout = layout_of(product.weight) or layout
        if layout is None:
            return self._combined(product.x, names, product.compute)
        tensor_parallel.check_laid_out(product.x, product.weight)
        if product.weight.requires_grad or any(self._drops(name) for name in names):
            raise HiraError(
                f"{self.name or 'A layer'} has a base weight that trains, or hira_dropout, which HiRA does not serve "
                "under tensor parallelism: freeze the weight and set hira_dropout=0."
            )
        for name in names:
            if name not in self._equal_on_all_processes:
                tensor_parallel.broadcast(layout, [factors[name] for factors in self._factor_dicts])
                self._equal_on_all_processes.add(name)
        return tensor_parallel.compute(product, layout, *self._factors(names))

    def _layout(self) -> Layout | None:
        """How the weight is divided before the base layer's call, which may take a process's own part of it."""
        storage = self.storage
        return None if is_gathered_by_call(storage.layer) else layout_of(storage.stored)

    def _check_mixed_batch(self, rows: Any) -> None:
        """Refuse a mixed batch where the rows of a process decide what it gathers, and other processes would wait."""
        layer = self.storage.layer
        calls_differ = len(rows) > 1 and is_gathered_by_call(layer)
        if calls_differ or sharded_by(layer, self.storage.name) == "ZeRO-3":
            raise HiraError(
                f"adapter_names asks for {sorted(rows)}, but {self.name or 'this layer'} is spread over processes that "
                "would gather other weights than this one, and wait; set an adapter and pass no names, or serve mixed "
                "batches on a model that is not sharded."
            )
