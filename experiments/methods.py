"""The methods that are compared. A method makes a model ready to be trained, at a rank r and with alpha = 2 r.

All adapters of one rank have as many parameters, but for the magnitude that DoRA has for each output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, get_peft_model
from torch import nn

from hira import HiraConfig

Adapt = Callable[[nn.Module, list[str], int], nn.Module]


@dataclass(frozen=True)
class Method:
    """A method.

    Args:
        adapt: (model, names of the adapted modules, rank) -> the model to train, where what trains has requires_grad.
        faster: how many times the rate of the others B has.
    """

    adapt: Adapt
    faster: float = 1


def frozen(model: nn.Module, targets: list[str], r: int) -> nn.Module:
    """Nothing trains, but a new head where the task has one."""
    return model.requires_grad_(False)


def full(model: nn.Module, targets: list[str], r: int) -> nn.Module:
    """Everything trains."""
    return model


def lora(model: nn.Module, targets: list[str], r: int, **options: Any) -> nn.Module:
    """LoRA or one of its variants."""
    return get_peft_model(model, LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets, **options))


def rslora(model: nn.Module, targets: list[str], r: int) -> nn.Module:
    """LoRA scaled by alpha / sqrt(r)."""
    return lora(model, targets, r, use_rslora=True)


def dora(model: nn.Module, targets: list[str], r: int) -> nn.Module:
    """LoRA of directions, and magnitudes."""
    return lora(model, targets, r, use_dora=True)


def hira(model: nn.Module, targets: list[str], r: int) -> nn.Module:
    """HiRA with LoRA's alpha."""
    return get_peft_model(model, HiraConfig(r=r, hira_alpha=2 * r, target_modules=targets))


def plain_hira(model: nn.Module, targets: list[str], r: int) -> nn.Module:
    """The paper's HiRA."""
    return get_peft_model(model, HiraConfig(r=r, target_modules=targets))


def hilora(model: nn.Module, targets: list[str], r: int) -> nn.Module:
    """HiRA and LoRA, half of the rank each."""
    return get_peft_model(
        model, HiraConfig(r=r - r // 2, lora_r=r // 2, hira_alpha=2 * (r - r // 2), target_modules=targets)
    )


METHODS = {
    "frozen": Method(frozen),
    "LoRA": Method(lora),
    "rsLoRA": Method(rslora),
    "DoRA": Method(dora),
    "LoRA+": Method(lora, faster=16),
    "HiRA": Method(hira),
    "plain HiRA": Method(plain_hira),
    "HiLoRA": Method(hilora),
    "full": Method(full),
}
