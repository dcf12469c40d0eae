"""Draws what a step computes and what it keeps, docs/flow.svg: python docs/flow.py"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

GREEN, GREY, INK = "#1f6f5c", "#8a8a8a", "#222222"
FROZEN, TRAINED, PASSING, GIVEN = "#dfe6ee", "#cfe8df", "#ffffff", "#f3efe2"
# what is shown: the text, its place, its colour
FORWARD = {
    "x": ("x", 0.95, 3.0, GIVEN),
    "W0": ("W0, frozen", 0.95, 1.8, FROZEN),
    "AB": ("A, B, trained", 0.95, 0.6, TRAINED),
    "W": ("a block of\nW' = W0 + W0 ⊙ BA", 3.6, 1.8, PASSING),
    "y": ("y = x W'ᵀ", 5.5, 3.0, GIVEN),
}
BACKWARD = {
    "dy": ("dy", 7.7, 3.0, GIVEN),
    "W": ("a block of W',\nformed again", 9.9, 1.8, PASSING),
    "dx": ("dx = dy W'", 12.4, 1.8, GIVEN),
    "G": ("a block of\nG = dyᵀ x", 9.9, 3.0, PASSING),
    "M": ("G ⊙ W0", 12.4, 3.0, PASSING),
    "dAB": ("dB = (G ⊙ W0) Aᵀ\ndA = Bᵀ (G ⊙ W0)", 14.9, 3.0, TRAINED),
}
ARROWS = {
    "forward": (FORWARD, [("x", "y"), ("W0", "W"), ("AB", "W"), ("W", "y")]),
    "backward": (BACKWARD, [("dy", "G"), ("G", "M"), ("M", "dAB"), ("dy", "W"), ("W", "dx")]),
}


def main() -> None:
    """Draw both passes beside each other."""
    plt.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "hira", "font.size": 11})
    figure, axes = plt.subplots(figsize=(12.6, 3.1), layout="constrained", facecolor="white")
    for title, (boxes, arrows) in ARROWS.items():
        places = {key: _box(axes, *box) for key, box in boxes.items()}
        for begin, end in arrows:
            style = {"arrowstyle": "-|>", "color": INK, "shrinkA": 2, "shrinkB": 2}
            axes.annotate(
                "", xy=_edge(places[end], places[begin]), xytext=_edge(places[begin], places[end]), arrowprops=style
            )
        axes.text(boxes[next(iter(boxes))][1] - 0.85, 3.75, title, color=GREEN, weight="bold", fontsize=13)
    axes.text(0.1, -0.15, "kept from forward to backward: x, W0, A and B", color=GREY)
    axes.text(7.0, -0.15, "dashed: a block at a time, in memory that is used again", color=GREY)
    axes.axvline(6.65, color="#dddddd")
    axes.set(xlim=(-0.1, 16.4), ylim=(-0.35, 4.1))
    axes.axis("off")
    figure.savefig(Path(__file__).with_name("flow.svg"), metadata={"Date": None})


def _box(axes: Axes, text: str, x: float, y: float, colour: str) -> tuple[float, float, float, float]:
    """A box with a text in it, and its centre and half its sizes."""
    width = 0.055 * max(map(len, text.split("\n"))) + 0.2
    height = 0.2 * text.count("\n") + 0.28
    style = {"linestyle": "--" if colour == PASSING else "-", "edgecolor": GREY, "facecolor": colour}
    axes.add_patch(FancyBboxPatch((x - width, y - height), 2 * width, 2 * height, boxstyle="round,pad=0.02", **style))
    axes.text(x, y, text, ha="center", va="center", color=INK)
    return x, y, width, height


def _edge(box: tuple[float, float, float, float], towards: tuple[float, float, float, float]) -> tuple[float, float]:
    """Where the line from a box's centre to another's leaves it."""
    x, y, width, height = box
    dx, dy = towards[0] - x, towards[1] - y
    share = min(width / abs(dx) if dx else 9, height / abs(dy) if dy else 9)
    return x + share * dx, y + share * dy


if __name__ == "__main__":
    main()
