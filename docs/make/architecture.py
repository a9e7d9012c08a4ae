"""Draws docs/architecture.png: `python docs/make/architecture.py` (pip install 'rlx[figures]')."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

OUT = Path(__file__).resolve().parents[1] / "architecture.png"
INK, LINE = "#1c2733", "#5b6b7b"
ACTING, REPLAY, TRAINING, RUNS = "#dbeafe", "#fef3c7", "#dcfce7", "#f1f5f9"
WIDTH, HEIGHT = 14.2, 5.6  # inches, and the coordinates of everything below
ABOVE = 5.0  # where the weights travel back


@dataclass(frozen=True, kw_only=True)
class Box:
    """A part of rlx."""

    x: float
    y: float
    width: float
    height: float
    colour: str
    title: str
    text: str

    @property
    def middle(self) -> float:
        return self.x + self.width / 2

    @property
    def right(self) -> float:
        return self.x + self.width

    @property
    def top(self) -> float:
        return self.y + self.height


def upper(x: float, width: float, colour: str, title: str, text: str) -> Box:
    return Box(x=x, y=2.75, width=width, height=1.75, colour=colour, title=title, text=text)


def lower(x: float, width: float, title: str, text: str) -> Box:
    return Box(x=x, y=0.2, width=width, height=1.5, colour=RUNS, title=title, text=text)


ENVS = upper(0.1, 2.4, ACTING, "Environments", "EnvPool, gymnasium:\nN lanes of each actor")
POOL = upper(3.7, 2.7, ACTING, "Pool of actors", "in the loop, in threads,\nor on a Ray cluster")
STORE = upper(7.6, 2.5, REPLAY, "Replay", "each frame once, in\nmemory, file or device")
LEARNER = upper(11.3, 2.8, TRAINING, "Learner", "one pmap over the devices\nof 1 to n processes")
HYDRA = lower(0.1, 2.4, "Hydra", "YAML groups become\nchecked parts")
COMMANDS = lower(3.7, 2.7, "Commands", "evaluate, export, report,\nwatch, diff, resume")
FOLDER = lower(7.6, 2.5, "Run folder", "metrics, status,\ncheckpoints, videos")
KEEPER = lower(11.3, 2.8, "Keeper", "evaluations, rows of\nmetrics, checkpoints")


def draw() -> None:
    """Writes the picture."""
    figure, axes = plt.subplots(figsize=(WIDTH, HEIGHT), dpi=90)
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
    axes.axis("off")
    for box in (ENVS, POOL, STORE, LEARNER, HYDRA, COMMANDS, FOLDER, KEEPER):
        show(axes, box)
    for left, right, there, back in (
        (ENVS, POOL, "timesteps", "actions"),
        (POOL, STORE, "blocks", ""),
        (STORE, LEARNER, "batches", "priorities"),
    ):
        beside(axes, left, right, 0.62, there)
        if back:
            beside(axes, right, left, 0.3, back)
    beside(axes, KEEPER, FOLDER, 0.5, "writes")
    beside(axes, FOLDER, COMMANDS, 0.5, "read")
    arrow(axes, (LEARNER.middle, LEARNER.y), (KEEPER.middle, KEEPER.top))
    weights(axes)
    figure.subplots_adjust(0, 0, 1, 1)
    figure.savefig(OUT, facecolor="white")


def show(axes: Axes, box: Box) -> None:
    """A box with its title and its text."""
    shape = FancyBboxPatch(
        (box.x, box.y), box.width, box.height, boxstyle="round,pad=0,rounding_size=0.14"
    )
    shape.set(facecolor=box.colour, edgecolor=LINE, linewidth=1.3)
    axes.add_patch(shape)
    how = {"ha": "center", "va": "center", "color": INK}
    axes.text(box.middle, box.top - 0.42, box.title, fontsize=17, fontweight="bold", **how)
    axes.text(box.middle, box.y + (box.height - 0.62) / 2, box.text, fontsize=13, **how)


def beside(axes: Axes, begin: Box, end: Box, share: float, text: str) -> None:
    """An arrow between two boxes of a row at a share of their height, its text outside."""
    level = begin.y + share * begin.height
    start, stop = (begin.right, end.x) if end.x > begin.x else (begin.x, end.right)
    arrow(axes, (start, level), (stop, level))
    away = 0.1 if share >= 0.5 else -0.1
    place = "bottom" if share >= 0.5 else "top"
    middle = (start + stop) / 2
    axes.text(middle, level + away, text, fontsize=12.5, color=LINE, ha="center", va=place)


def weights(axes: Axes) -> None:
    """The weights' way back, over the replay."""
    across = [LEARNER.middle, LEARNER.middle, POOL.middle]
    axes.plot(across, [LEARNER.top, ABOVE, ABOVE], color=LINE, linewidth=1.7)
    arrow(axes, (POOL.middle, ABOVE), (POOL.middle, POOL.top))
    text, middle = "weights: numbered versions, one with each request", STORE.middle
    axes.text(middle, ABOVE + 0.1, text, fontsize=12.5, color=LINE, ha="center", va="bottom")


def arrow(axes: Axes, begin: tuple[float, float], end: tuple[float, float]) -> None:
    """A straight arrow."""
    shape = FancyArrowPatch(begin, end, arrowstyle="-|>", mutation_scale=17, shrinkA=2, shrinkB=2)
    shape.set(color=LINE, linewidth=1.7)
    axes.add_patch(shape)


if __name__ == "__main__":
    draw()
