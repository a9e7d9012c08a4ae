"""Pictures of episodes side by side, with what the agent thinks of each action (Pillow).

A tile is the environment's picture over a panel: the return so far, the largest Q-value, and a bar
per action, above or below the mean of all actions. Bars keep one scale within an episode.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

WIDTH, HEIGHT = 320, 240  # pixels of a tile's picture
LINE, BARS, EDGE = 18, 64, 6  # pixels of a line of text, of the bars, around both
PANEL = 2 * EDGE + 2 * LINE + BARS + LINE
FONT, SMALL = 13, 10
LEAST = 60  # pixels that an action needs to have its Q-value written beside its number
NARROW = 24  # with fewer its number is written smaller

BACKGROUND, PAPER, TEXT, DIM = (24, 24, 27), (39, 39, 42), (244, 244, 245), (161, 161, 170)
BAR, CHOSEN, ENDED = (113, 113, 122), (250, 204, 21), (74, 222, 128)

Colour = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One tile shows this of an episode at one env step."""

    picture: np.ndarray  # uint8[H, W, 3]
    title: str
    return_: float  # unclipped, so far
    env_step: int
    values: np.ndarray | None  # f32[A]; None: unknown, or the episode has ended
    action: int | None  # None: unknown, or not one choice
    spread: float  # the largest distance of a Q-value from their mean, so far
    ended: bool


def grid(tiles: Sequence[np.ndarray]) -> np.ndarray:
    """Joins equal tiles into a picture uint8[H, W, 3], about as wide as high; the rest is dark."""
    columns = math.ceil(math.sqrt(len(tiles)))
    rows = math.ceil(len(tiles) / columns)
    high, wide = tiles[0].shape[:2]
    whole = np.empty((rows * high, columns * wide, 3), np.uint8)
    whole[:] = BACKGROUND
    for i, tile in enumerate(tiles):
        top, left = i // columns * high, i % columns * wide
        whole[top : top + high, left : left + wide] = tile
    return whole


def tile(seen: Seen) -> np.ndarray:
    """Draws one tile, uint8[HEIGHT + PANEL, WIDTH, 3]."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (WIDTH, HEIGHT + PANEL), BACKGROUND)
    picture = _fitted(Image.fromarray(seen.picture))
    image.paste(picture, ((WIDTH - picture.width) // 2, (HEIGHT - picture.height) // 2))
    draw = ImageDraw.Draw(image)
    draw.rectangle((1, HEIGHT, WIDTH - 2, HEIGHT + PANEL - 2), fill=PAPER)
    _lines(draw, seen)
    if seen.values is not None:
        _bars(draw, seen, seen.values)
    edge, width = (ENDED, 2) if seen.ended else (BACKGROUND, 1)
    draw.rectangle((0, 0, WIDTH - 1, HEIGHT + PANEL - 1), outline=edge, width=width)
    return np.asarray(image)


def _fitted(picture: Any) -> Any:
    """The picture scaled to a tile: small ones by whole numbers, so that pixels stay sharp."""
    from PIL import Image

    scale = min(WIDTH / picture.width, HEIGHT / picture.height)
    if scale >= 2:
        return picture.resize(
            (picture.width * int(scale), picture.height * int(scale)), Image.Resampling.NEAREST
        )
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _lines(draw: Any, seen: Seen) -> None:
    top = HEIGHT + EDGE
    _text(draw, (EDGE, top), seen.title, TEXT)
    _text(draw, (WIDTH - EDGE, top), f"return {_number(seen.return_)}", TEXT, "ra")
    _text(draw, (EDGE, top + LINE), f"env step {seen.env_step}", DIM)
    if seen.ended:
        _text(draw, (WIDTH - EDGE, top + LINE), "ended", ENDED, "ra")
    elif seen.values is not None:
        said = f"max Q {_number(seen.values.max())}   bars ±{_number(seen.spread)}"
        _text(draw, (WIDTH - EDGE, top + LINE), said, DIM, "ra")


def _bars(draw: Any, seen: Seen, values: np.ndarray) -> None:
    """Draws a bar per action around the mean of all; the chosen one is yellow."""
    top = HEIGHT + EDGE + 2 * LINE + 2
    middle, half = top + BARS // 2, BARS // 2 - 2
    column = (WIDTH - 2 * EDGE) / len(values)
    draw.line((EDGE, middle, WIDTH - EDGE, middle), fill=DIM)
    for i, (value, above) in enumerate(zip(values, values - values.mean(), strict=True)):
        left = EDGE + i * column
        colour = CHOSEN if i == seen.action else BAR
        share = float(above) / max(seen.spread, 1e-9)
        high = round(half * share) if math.isfinite(share) else 0
        inset = min(column * 0.2, 16)
        across = (left + inset, left + column - inset)
        draw.rectangle((across[0], middle - max(high, 0), across[1], middle - min(high, 0)), colour)
        said = f"{i}: {_number(value)}" if column >= LEAST else str(i)
        place = (left + column / 2, top + BARS)
        size = SMALL if column < NARROW else FONT
        _text(draw, place, said, CHOSEN if i == seen.action else DIM, "ma", size)


def _text(
    draw: Any,
    place: tuple[float, float],
    text: str,
    colour: Colour,
    at: str = "la",
    size: int = FONT,
) -> None:
    draw.text(place, text, fill=colour, font=_font(size), anchor=at)


@functools.cache
def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _number(value: float) -> str:
    """The number with three or four digits."""
    value = float(value)
    return f"{value:.0f}" if value.is_integer() or abs(value) >= 1000 else f"{value:.3g}"
