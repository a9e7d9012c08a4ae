"""Tiles of a grid of episodes: what is where, and in which colour."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rlx.evaluation import tiles
from rlx.evaluation.tiles import BAR, CHOSEN, ENDED, HEIGHT, PANEL, WIDTH, Seen, grid, tile

WHITE = np.full((210, 160, 3), 255, np.uint8)


def seen(**changes: Any) -> Seen:
    settings: dict[str, Any] = {
        "picture": WHITE,
        "title": "episode 0",
        "return_": 1.5,
        "env_step": 7,
        "values": np.array([1.0, 3.0], np.float32),
        "action": 1,
        "spread": 1.0,
        "ended": False,
    }
    return Seen(**settings | changes)


def bar(picture: np.ndarray, colour: tuple[int, int, int]) -> tuple[int, int]:
    """(rows above, rows below the middle) of the widest part in this colour."""
    top = HEIGHT + tiles.EDGE + 2 * tiles.LINE + 2
    rows = (picture[top : top + tiles.BARS] == colour).all(-1).sum(1) > 40
    middle = tiles.BARS // 2
    return int(rows[:middle].sum()), int(rows[middle + 1 :].sum())


def test_bars_stand_over_and_under_the_mean_and_the_chosen_one_is_yellow():
    picture = tile(seen())
    assert picture.shape == (HEIGHT + PANEL, WIDTH, 3)
    assert bar(picture, CHOSEN) == (30, 0)
    assert bar(picture, BAR) == (0, 30)
    other = tile(seen(action=0))
    assert (bar(other, CHOSEN), bar(other, BAR)) == ((0, 30), (30, 0))
    assert bar(tile(seen(spread=2.0)), CHOSEN) == (15, 0)  # one scale within an episode


def test_an_ended_episode_has_a_frame_and_no_bars():
    picture = tile(seen(values=None, action=None, ended=True))
    assert (picture[[0, -1]] == ENDED).all()
    assert (picture[:, [0, -1]] == ENDED).all()
    assert bar(picture, CHOSEN) == bar(picture, BAR) == (0, 0)
    assert not (tile(seen()) == ENDED).all(-1).any()


@pytest.mark.parametrize(
    ("size", "drawn"),
    [
        ((210, 160), (240, 183)),
        ((400, 600), (213, 320)),
        ((96, 96), (192, 192)),
        ((7, 7), (238, 238)),
    ],
)
def test_pictures_are_fitted(size, drawn):
    picture = tile(seen(picture=np.full((*size, 3), 255, np.uint8)))[1 : HEIGHT - 1, 1:-1]
    white = (picture == 255).all(-1)
    # What fills a side loses the line of one pixel around the tile.
    assert white.any(1).sum() == min(drawn[0], HEIGHT - 2)
    assert white.any(0).sum() == min(drawn[1], WIDTH - 2)


def test_eighteen_actions_have_a_bar_each():
    picture = tile(seen(values=np.arange(18, dtype=np.float32), action=17, spread=8.5))
    row = picture[HEIGHT + tiles.EDGE + 2 * tiles.LINE + tiles.BARS // 2 + 3]
    starts = np.flatnonzero(np.diff((row == BAR).all(-1).astype(int)) == 1)
    assert len(starts) == 9  # under the mean


@pytest.mark.parametrize(("count", "shape"), [(1, (1, 1)), (3, (2, 2)), (6, (2, 3)), (9, (3, 3))])
def test_a_grid_is_about_as_wide_as_high(count, shape):
    parts = [np.full((4, 5, 3), i + 1, np.uint8) for i in range(count)]
    whole = grid(parts)
    assert whole.shape == (shape[0] * 4, shape[1] * 5, 3)
    last = divmod(count - 1, shape[1])
    assert (whole[last[0] * 4, last[1] * 5] == count).all()


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_have_no_bar(value):
    picture = tile(seen(values=np.array([value, 1.0], np.float32), spread=value))
    assert picture.shape == (HEIGHT + PANEL, WIDTH, 3)
