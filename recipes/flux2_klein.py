"""DreamBooth on FLUX.2-klein with HiRA, as in the image generation table of PEFT's method comparison.

    python recipes/flux2_klein.py --images data/cat [--model NAME_OR_FOLDER] [--steps 750] [--output hira-flux2-klein]

Not run at full size. The images' folder is that of `python recipes/prepare.py cat`, or has any images and their prompts
in metadata.jsonl. Settings are those of PEFT's experiment hira/flux2-klein-default: pull requests #3640 (the adapter)
and #3661 (the learning rate) of https://github.com/huggingface/peft, and method_comparison/image-gen there.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from diffusers import Flux2KleinPipeline
from peft import get_peft_model
from PIL import Image
from torch import Tensor

from hira import HiraConfig

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
TARGETS += ["linear_in", "linear_out", "to_qkv_mlp_proj"]
RATE, WEIGHT_DECAY, LARGEST_GRADIENT, BATCH = 5e-4, 1e-4, 1.0, 2


def main(arguments: list[str] | None = None) -> list[float]:
    """Train, save the adapter, and return the losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--model", default="black-forest-labs/FLUX.2-klein-base-4B")
    parser.add_argument("--steps", type=int, default=750)
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--text_layers", type=int, nargs=3, default=[10, 20, 30], help="of the text encoder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="hira-flux2-klein")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(options.seed)

    pipeline = Flux2KleinPipeline.from_pretrained(options.model, torch_dtype=dtype)
    rows = [json.loads(line) for line in (options.images / "metadata.jsonl").read_text("utf-8").splitlines()]
    texts, text_ids = encoded_texts(pipeline, [row["prompt"] for row in rows], options.text_layers, device)
    files = [options.images / row["file_name"] for row in rows]
    latents, positions = encoded_images(pipeline, files, options.resolution, device)

    transformer = pipeline.transformer.to(device)
    transformer.enable_gradient_checkpointing()
    # with LoRA: LoraConfig(r=32, lora_alpha=32, target_modules=TARGETS)
    transformer = get_peft_model(transformer, HiraConfig(r=32, target_modules=TARGETS)).train()
    transformer.print_trainable_parameters()
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=WEIGHT_DECAY)

    epochs = math.ceil(options.steps * BATCH / len(rows))
    order = torch.cat([torch.randperm(len(rows)) for _ in range(epochs)])
    losses = []
    for step in range(options.steps):
        rows_of_step = order[step * BATCH : (step + 1) * BATCH].to(device)
        clean = latents[rows_of_step]
        noise = torch.randn_like(clean)
        drawn = (torch.rand(len(clean)) * len(pipeline.scheduler.timesteps)).long()
        sigma = pipeline.scheduler.sigmas[drawn].to(device, dtype)[:, None, None]
        velocity = transformer(
            hidden_states=(1 - sigma) * clean + sigma * noise,
            timestep=pipeline.scheduler.timesteps[drawn].to(device, dtype) / 1000,
            encoder_hidden_states=texts[rows_of_step],
            txt_ids=text_ids[rows_of_step],
            img_ids=positions[rows_of_step],
            return_dict=False,
        )[0]
        loss = (velocity.float() - (noise - clean).float()).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, LARGEST_GRADIENT)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 25 == 0:
            print(f"step {step}: loss {losses[-1]:.4f}", flush=True)
    transformer.save_pretrained(options.output)
    return losses


@torch.no_grad()
def encoded_texts(
    pipeline: Flux2KleinPipeline, prompts: list[str], layers: list[int], device: str
) -> tuple[Tensor, Tensor]:
    """The prompts' states (rows, tokens, width) and positions; the text encoder is dropped, which takes much memory."""
    pipeline.text_encoder.to(device)
    texts, positions = pipeline.encode_prompt(prompts, device=device, text_encoder_out_layers=tuple(layers))
    pipeline.text_encoder = None
    return texts, positions.to(device)


@torch.no_grad()
def encoded_images(
    pipeline: Flux2KleinPipeline, paths: list[Path], resolution: int, device: str
) -> tuple[Tensor, Tensor]:
    """The images' normalised latents as the transformer takes them, (rows, patches, channels), and positions."""
    vae = pipeline.vae.to(device)
    found = []
    for path in paths:
        image = Image.open(path).convert("RGB").resize((resolution, resolution), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.asarray(image, dtype=np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
        latents = vae.encode(pixels.to(device, vae.dtype)).latent_dist.mode()
        found.append(pipeline._patchify_latents(latents))
    vae.cpu()
    mean, variance = vae.bn.running_mean.to(device), vae.bn.running_var.to(device)
    latents = torch.cat(found) - mean.view(1, -1, 1, 1)
    latents /= torch.sqrt(variance.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
    return pipeline._pack_latents(latents), pipeline._prepare_latent_ids(latents).to(device)


if __name__ == "__main__":
    main()
