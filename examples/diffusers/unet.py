"""A diffusion model with diffusers and HiRA: a UNet that draws the digits of scikit-learn.

    python examples/diffusers/unet.py [--steps 200] [--output hira-unet]

As with LoRA but for one line, that of the configuration. The UNet is small and has random weights; with
UNet2DConditionModel.from_pretrained(..., subfolder="unet") it is Stable Diffusion's, which also needs its VAE and its
text encoder. Attention and convolutions have adapters. Prompts are the ten digits, each a fixed vector.
"""

import argparse

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import PeftModel, get_peft_model
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from hira import HiraConfig

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_out"]


def unet() -> UNet2DConditionModel:
    """A UNet for images of 8 x 8, conditioned on vectors of 32."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=32,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def main(arguments: list[str] | None = None) -> tuple[PeftModel, list[float]]:
    """Train, save the adapter and a drawing of each digit, and return the model and its losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", default="hira-unet")
    options = parser.parse_args(arguments)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    scheduler = DDPMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2")
    base = unet()
    prompts = torch.randn(10, 1, 32)

    # with LoRA: LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS)
    config = HiraConfig(r=8, hira_alpha=16, target_modules=TARGETS)
    model = get_peft_model(base, config)
    model.print_trainable_parameters()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    losses = []
    for _ in range(options.steps):
        rows = torch.randint(len(images), (32,))
        clean, noise = images[rows], torch.randn(32, 1, 8, 8)
        times = torch.randint(scheduler.config.num_train_timesteps, (32,))
        noisy = scheduler.add_noise(clean, noise, times)
        predicted = model(noisy, times, prompts[digits.target[rows]]).sample
        loss = (predicted - noise).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.save_pretrained(options.output)
    drawn = ((drawings(model.eval(), scheduler, prompts) + 1) * 127.5).clamp(0, 255).byte()
    Image.fromarray(torch.cat(list(drawn[:, 0]), dim=1).numpy()).save(f"{options.output}/digits.png")
    return model, losses


@torch.no_grad()
def drawings(model: PeftModel, scheduler: DDPMScheduler, prompts: Tensor) -> Tensor:
    """An image of each prompt, (10, 1, 8, 8)."""
    scheduler.set_timesteps(25)
    images = torch.randn(len(prompts), 1, 8, 8)
    for time in scheduler.timesteps:
        images = scheduler.step(model(images, time, prompts).sample, time, images).prev_sample
    return images


if __name__ == "__main__":
    main()
