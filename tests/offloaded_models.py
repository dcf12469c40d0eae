"""Adapted models whose weights accelerate keeps elsewhere, beside the same models in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from offloading import TARGETS, WAYS, Way, llama
from peft import get_peft_model
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from hira import HiraConfig
from hira.tuner.model import hira_layers

IDS = torch.randint(0, 48, (2, 7), generator=torch.Generator().manual_seed(5))


def each(ways: list[Way]) -> Any:
    return pytest.mark.parametrize("way", ways, ids=lambda way: way.name.split("`")[1].split("(")[0])


ways = each(WAYS)
LOADED = next(way for way in WAYS if "from_pretrained" in way.name)


def fill(model: nn.Module) -> Any:
    """Give all adapters values, the same for the same names."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "hira_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def adapt(model: nn.Module, **options: Any) -> Any:
    return fill(get_peft_model(model, HiraConfig(**{"r": 3, "target_modules": TARGETS} | options)))


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def logits(model: nn.Module, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **options).logits


def assert_away(model: nn.Module, way: Way) -> None:
    """Between calls the weights are not in the model, but for those that the way leaves there; adapters are."""
    away = [layer.storage.stored.is_meta for layer in hira_layers(model)]
    assert {"all": all(away), "some": any(away) and not all(away), "none": not any(away)}[way.away]
    for layer in hira_layers(model):
        assert not any(factor.is_meta for factors in layer._factor_dicts for factor in factors.values())


def assert_same_training(model: nn.Module, expected: nn.Module, steps: int = 3) -> None:
    optimizers = [torch.optim.SGD(trained(each).values(), lr=0.5) for each in (model, expected)]
    for _ in range(steps):
        losses = []
        for each, optimizer in zip((model, expected), optimizers, strict=True):
            optimizer.zero_grad()
            losses.append(each(input_ids=IDS, labels=IDS).loss)
            losses[-1].backward()
        assert torch.equal(*losses)
        found, wanted = trained(model), trained(expected)
        assert found.keys() == wanted.keys()
        for name, parameter in found.items():
            assert wanted[name].grad.any()
            assert torch.equal(parameter.grad, wanted[name].grad), name
        for optimizer in optimizers:
            optimizer.step()
    for name, parameter in found.items():
        assert torch.equal(parameter, wanted[name])


EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


def mixtral() -> Any:
    sizes = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "pad_token_id": None}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 1}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = MixtralForCausalLM(MixtralConfig(**sizes, **heads))
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def loaded(folder: Path, base: nn.Module | None = None) -> nn.Module:
    """A model in part on the disk, as Transformers loads it."""
    return LOADED.offload(llama() if base is None else base, folder)
