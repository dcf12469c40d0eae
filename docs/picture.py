"""Draws the picture of the README, docs/picture.png, from random matrices: python docs/picture.py"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch

matplotlib.use("agg")
import matplotlib.pyplot as plt

SIZE, RANK = 32, 2
GREEN, GREY = "#1f6f5c", "#8a8a8a"


def main() -> None:
    """Draw W0, BA and W0 * BA for one A and B, and the singular values of the two updates."""
    generator = torch.Generator().manual_seed(0)
    W0, A, B = (torch.randn(*shape, generator=generator) for shape in ((SIZE, SIZE), (RANK, SIZE), (SIZE, RANK)))
    BA = B @ A
    panels = {
        "$W_0$, frozen": W0,
        f"$BA$, LoRA's update\nrank {torch.linalg.matrix_rank(BA)}": BA,
        f"$W_0 \\odot BA$, HiRA's update\nrank {torch.linalg.matrix_rank(W0 * BA)}": W0 * BA,
    }
    figure, axes = plt.subplots(1, 4, figsize=(10, 2.9), layout="constrained", facecolor="white")
    for panel, (title, matrix) in zip(axes, panels.items(), strict=False):
        limit = float(matrix.abs().quantile(0.99))
        panel.imshow(matrix, cmap="RdBu", vmin=-limit, vmax=limit)
        panel.set(title=title, xticks=[], yticks=[])
    for matrix, label, colour in ((BA, "LoRA", GREY), (W0 * BA, "HiRA", GREEN)):
        values = torch.linalg.svdvals(matrix)
        axes[3].plot(range(1, SIZE + 1), values / values[0], "o-", markersize=3, color=colour, label=label)
    axes[3].set(title="singular values,\nlargest = 1", xlabel="index", ylim=(-0.03, 1.05))
    axes[3].legend()
    figure.savefig(Path(__file__).with_name("picture.png"), dpi=120)


if __name__ == "__main__":
    main()
