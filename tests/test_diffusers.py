"""What diffusers does with LoRA adapters, on a UNet with HiRA adapters."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import HiraConfig
from torch import Tensor

import hira

diffusers = pytest.importorskip("diffusers")

X = torch.randn(2, 4, 8, 8)
STATES = torch.randn(2, 3, 8)


def unet(*names: str):
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    for name in names:
        targets = ["to_q", "to_v", "conv1"]
        model.add_adapter(HiraConfig(r=2, target_modules=targets, init_weights=False), adapter_name=name)
    return model.eval()


@torch.no_grad()
def run(model, **options) -> Tensor:
    return model(X, 3, STATES, **options).sample


def layers(model) -> list[hira.HiraLayer]:
    return [module for module in model.modules() if isinstance(module, hira.HiraLayer)]


def with_weights(model, **scales: float) -> Tensor:
    """The output with W0 (1 + sum of s BA) in the place of each adapted weight, by the base layers alone."""
    model = copy.deepcopy(model)
    for layer in layers(model):
        change = 1
        for name, scale in scales.items():
            A, B = layer.hira_A[name].flatten(1), layer.hira_B[name].flatten(1)
            change = change + scale * (B @ A).view(layer.base_layer.weight.shape)
        layer.base_layer.weight.data.mul_(change)
    model.disable_lora()
    return run(model)


CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def test_set_adapters_with_weights():
    model = unet("a", "b")
    model.set_adapters(["a", "b"], weights=[0.5, 2.0])
    assert model.active_adapters() == ["a", "b"]
    torch.testing.assert_close(run(model), with_weights(model, a=0.5, b=2.0), **CLOSE)
    model.set_adapters("b")
    torch.testing.assert_close(run(model), with_weights(model, b=1.0), **CLOSE)
    assert not torch.allclose(with_weights(model, a=0.5, b=2.0), with_weights(model, b=1.0), **CLOSE)


def test_a_scale_for_one_call():
    model = unet("a")
    y = run(model)
    found = run(model, cross_attention_kwargs={"scale": 0.25})
    torch.testing.assert_close(found, with_weights(model, a=0.25), **CLOSE)
    assert torch.equal(run(model), y)
    torch.testing.assert_close(run(model, cross_attention_kwargs={"scale": 0.0}), with_weights(model), **CLOSE)
    assert torch.equal(run(model), y)


def test_fuse_and_unfuse():
    model = unet("a", "b")
    model.set_adapters(["a", "b"])
    expected = with_weights(model, a=0.5)
    before = [layer.base_layer.weight.clone() for layer in layers(model)]
    model.set_adapters("a")
    model.fuse_lora(lora_scale=0.5, safe_fusing=True, adapter_names=["a"])
    torch.testing.assert_close(run(model), expected, **CLOSE)
    model.unfuse_lora()
    assert all(torch.equal(layer.base_layer.weight, old) for layer, old in zip(layers(model), before, strict=True))


def test_disable_enable_delete_and_unload():
    model, plain = unet("a", "b"), unet()
    model.set_adapters(["a", "b"])
    y = run(model)
    model.disable_lora()
    torch.testing.assert_close(run(model), run(plain), **CLOSE)
    model.enable_lora()
    assert torch.equal(run(model), y)
    model.delete_adapters("a")
    model.set_adapters("b")
    assert all(layer.scaling == {"b": 1.0} for layer in layers(model))
    torch.testing.assert_close(run(model), with_weights(model, b=1.0), **CLOSE)
    model.unload_lora()
    assert not layers(model)
    assert torch.equal(run(model), run(plain))


def test_a_pipeline():
    """The methods of a pipeline, which are those of its parts."""
    scheduler = diffusers.DDIMScheduler()
    model = unet("a", "b")

    class Pipeline(diffusers.DiffusionPipeline, diffusers.loaders.StableDiffusionLoraLoaderMixin):
        def __init__(self, unet, scheduler) -> None:
            super().__init__()
            self.register_modules(unet=unet, scheduler=scheduler)

    pipeline = Pipeline(model, scheduler)
    pipeline.set_adapters(["a", "b"], adapter_weights=[0.5, 2.0])
    assert pipeline.get_active_adapters() == ["a", "b"]
    torch.testing.assert_close(run(model), with_weights(model, a=0.5, b=2.0), **CLOSE)
    expected = with_weights(model, a=0.25, b=1.0)
    pipeline.fuse_lora(components=["unet"], lora_scale=0.5)
    torch.testing.assert_close(run(model), expected, **CLOSE)
    pipeline.unfuse_lora(components=["unet"])
    pipeline.disable_lora()
    torch.testing.assert_close(run(model), run(unet()), **CLOSE)
    pipeline.enable_lora()
    pipeline.delete_adapters("a")
    assert pipeline.get_list_adapters() == {"unet": ["b"]}
