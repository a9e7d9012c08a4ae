"""Draws docs/architecture.png: `python docs/make/architecture.py` (pip install 'rlx[figures]')."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

OUT = Path(__file__).resolve().parents[1] / "architecture.png"
INK, LINE = "#1c2733", "#5b6b7b"
COLOURS = {"acting": "#dbeafe", "replay": "#fef3c7", "training": "#dcfce7", "runs": "#f1f5f9"}
# name: (x, y, width, height, colour, title, lines)
BOXES = {
    "envs": (0.2, 3.1, 2.0, 1.5, "acting", "Environments", "EnvPool, gymnasium:\nN lanes an actor"),
    "actors": (
        3.1,
        3.1,
        2.5,
        1.5,
        "acting",
        "Actors",
        "policy, blocks of rows:\nhere, in threads, on Ray",
    ),
    "replay": (6.5, 3.1, 2.3, 1.5, "replay", "Replay", "every frame once:\nmemory, file, device"),
    "learner": (
        9.7,
        3.1,
        2.4,
        1.5,
        "training",
        "Learner",
        "agent.update by pmap:\ndevices, processes",
    ),
    "keeper": (9.7, 0.5, 2.4, 1.4, "runs", "Keeper", "evaluations, rows,\ncheckpoints"),
    "folder": (6.5, 0.5, 2.3, 1.4, "runs", "Run folder", "metrics, status,\ncheckpoints, videos"),
    "tools": (
        3.1,
        0.5,
        2.5,
        1.4,
        "runs",
        "Commands",
        "evaluate, export, report,\nwatch, diff, resume",
    ),
    "config": (0.2, 0.5, 2.0, 1.4, "runs", "Hydra", "an experiment\nis a YAML diff"),
}
# from, to, text, above or below the line
ARROWS = [
    ("envs", "actors", "timesteps", 0.5),
    ("actors", "replay", "rollouts", 0.5),
    ("replay", "learner", "batches", 0.5),
    ("keeper", "folder", "", 0.5),
    ("folder", "tools", "", 0.5),
]


def draw() -> None:
    """Writes the picture."""
    figure, axes = plt.subplots(figsize=(12.3, 5.4), dpi=100)
    axes.set_xlim(0, 12.3)
    axes.set_ylim(0, 5.9)
    axes.axis("off")
    for box in BOXES.values():
        _box(axes, *box)
    for begin, end, text, height in ARROWS:
        _beside(axes, begin, end, text, height)
    _arrow(axes, (3.1, 3.45), (2.2, 3.45))
    axes.text(2.65, 3.2, "actions", ha="center", va="top", fontsize=9, color=LINE)
    _arrow(axes, (9.7, 3.45), (8.8, 3.45))
    axes.text(9.25, 3.2, "priorities", ha="center", va="top", fontsize=9, color=LINE)
    _arrow(axes, (10.9, 3.1), (10.9, 1.9))
    _over(axes)
    figure.savefig(OUT, bbox_inches="tight", facecolor="white")


def _box(
    axes: Axes, x: float, y: float, width: float, height: float, kind: str, title: str, text: str
) -> None:
    shape = FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0.02,rounding_size=0.12",
        facecolor=COLOURS[kind], edgecolor=LINE, linewidth=1.2,
    )  # fmt: skip
    axes.add_patch(shape)
    middle = x + width / 2
    axes.text(middle, y + height - 0.32, title, ha="center", va="center", fontsize=13,
              fontweight="bold", color=INK)  # fmt: skip
    axes.text(
        middle, y + (height - 0.5) / 2, text, ha="center", va="center", fontsize=10, color=INK
    )


def _beside(axes: Axes, begin: str, end: str, text: str, height: float) -> None:
    """An arrow between two boxes of one row, with its text above."""
    x, y, width, tall = BOXES[begin][:4]
    to, _, to_width, _ = BOXES[end][:4]
    level = y + tall * (height + 0.12)
    start, stop = (x + width, to) if to > x else (x, to + to_width)
    _arrow(axes, (start, level), (stop, level))
    axes.text(
        (start + stop) / 2, level + 0.12, text, ha="center", va="bottom", fontsize=9, color=LINE
    )


def _over(axes: Axes) -> None:
    """The weights' way back, over the replay."""
    for begin, end in (((10.9, 4.6), (10.9, 5.3)), ((10.9, 5.3), (4.35, 5.3))):
        axes.plot(*zip(begin, end, strict=True), color=LINE, linewidth=1.6)
    _arrow(axes, (4.35, 5.3), (4.35, 4.6))
    text = "weights: every version once, with each request"
    axes.text(7.6, 5.38, text, ha="center", va="bottom", fontsize=9, color=LINE)


def _text(axes: Axes, x: float, y: float, text: str, **how: object) -> None:
    axes.text(x, y, text, ha="center", **how)


def _arrow(axes: Axes, begin: tuple[float, float], end: tuple[float, float]) -> None:
    axes.add_patch(
        FancyArrowPatch(
            begin,
            end,
            arrowstyle="-|>",
            mutation_scale=14,
            color=LINE,
            linewidth=1.6,
            shrinkA=2,
            shrinkB=2,
        )
    )


if __name__ == "__main__":
    draw()
