"""Models of one kind under two sets of names."""

from __future__ import annotations

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

IDS = torch.tensor([[1, 5, 9]])
TENSORS = "adapter_model.safetensors"


def noisy(model: nn.Module) -> nn.Module:
    """So that an adapter that is not loaded is not, by the same seed, the same."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


def renamed(folder, rename) -> None:
    """Give the tensors of an adapter other names."""
    tensors = load_file(folder / TENSORS)
    found = {rename(key): value for key, value in tensors.items()}
    assert found.keys() != tensors.keys()
    save_file(found, folder / TENSORS, metadata={"format": "pt"})


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")
