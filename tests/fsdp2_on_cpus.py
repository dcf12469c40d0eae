"""A process of `hira finetune` under FSDP2 on a CPU, where accelerate knows FSDP for accelerators alone."""

from __future__ import annotations

import sys
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from hira.training.finetune.run import finetune

_init = AcceleratorState.__init__


def _init_with_fsdp(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    """As accelerate does it for several GPUs, at each call, since each takes the type from the process's state."""
    _init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        if self.mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self.mixed_precision)
        self.fsdp_plugin = fsdp_plugin
    if getattr(self, "fsdp_plugin", None) is not None:
        self.distributed_type = DistributedType.FSDP


if __name__ == "__main__":
    AcceleratorState.__init__ = _init_with_fsdp
    finetune(sys.argv[1:], launched=True)
