"""Shares what the tests of every pool ask of amounts that are drawn for each episode."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from rlx.acting.exploration import Redrawn
from rlx.types import Episode

DRAWN = Redrawn(highest=1.0, lowest=0.01, count=256, seed=7)


def drawn(lane: int, chain: int, number: int) -> float:
    """Returns the amount that a lane draws for episode `number` of its chain."""
    where = (np.array([n]) for n in (chain, number))
    return float(DRAWN.episode_amount(np.array([lane]), 6, 0, *where)[0])


def assert_drawn(episodes: Iterable[Episode]) -> int:
    """Checks that each lane's episodes have what it drew, in order; the most of one chain."""
    of: dict[tuple[int, int], list[float]] = defaultdict(list)
    for episode in episodes:
        of[episode.lane, episode.chain].append(episode.epsilon)
    for (lane, chain), found in of.items():
        assert found == [drawn(lane, chain, i) for i in range(len(found))]
    return max(map(len, of.values()))
