"""Draws what a step computes and what it keeps, docs/forward.svg and docs/backward.svg: python docs/flow.py"""

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
    "dy": ("dy", 0.95, 3.0, GIVEN),
    "G": ("a block of\nG = dyᵀ x", 3.2, 3.0, PASSING),
    "M": ("G ⊙ W0", 5.4, 3.0, PASSING),
    "dAB": ("dB = (G ⊙ W0) Aᵀ\ndA = Bᵀ (G ⊙ W0)", 5.2, 1.7, TRAINED),
    "W": ("a block of W',\nformed again", 1.6, 1.7, PASSING),
    "dx": ("dx = dy W'", 1.6, 0.5, GIVEN),
}
# the boxes, what leads where, and what is said below
PASSES = {
    "forward": (
        FORWARD,
        [("x", "y"), ("W0", "W"), ("AB", "W"), ("W", "y")],
        "kept for backward: x, W0, A and B",
    ),
    "backward": (
        BACKWARD,
        [("dy", "G"), ("G", "M"), ("M", "dAB"), ("dy", "W"), ("W", "dx")],
        "dashed: a block at a time, in memory that is used again",
    ),
}


def main() -> None:
    """Draw each pass into a file of its own, so that a narrow page has one below the other."""
    plt.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "hira", "font.size": 11})
    for title, (boxes, arrows, below) in PASSES.items():
        figure, axes = plt.subplots(figsize=(5.4, 3.4), layout="constrained", facecolor="white")
        places = {key: _box(axes, *box) for key, box in boxes.items()}
        for begin, end in arrows:
            style = {"arrowstyle": "-|>", "color": INK, "shrinkA": 2, "shrinkB": 2}
            tip, tail = _edge(places[end], places[begin]), _edge(places[begin], places[end])
            axes.annotate("", tip, tail, arrowprops=style)
        axes.text(0.05, 3.75, title, color=GREEN, weight="bold", fontsize=13)
        axes.text(0.05, -0.3, below, color=GREY)
        axes.set(xlim=(-0.1, 6.6), ylim=(-0.4, 4.1))
        axes.axis("off")
        figure.savefig(Path(__file__).with_name(f"{title}.svg"), metadata={"Date": None})


def _box(axes: Axes, text: str, x: float, y: float, colour: str) -> tuple[float, float, float, float]:
    """A box with a text in it, and its centre and half its sizes."""
    width = 0.062 * max(map(len, text.split("\n"))) + 0.2
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
