"""Published scores on the 57 Atari games, and scores normalised by them.

`atari_scores.csv`, beside this file, names the source of each column.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

# column of the file -> what a table calls it, and under which conditions it was reached
PUBLISHED: Mapping[str, tuple[str, str]] = {
    "r2d2": ("R2D2", "Kapturowski et al. 2019, mean of 3 seeds, final scores"),
    "apex": ("Ape-X", "Horgan et al. 2018, the best score of a training"),
    "recurrent_iqn": ("recurrent IQN", "rltime, one run, 200M frames, 55 of the games"),
    "rainbow": ("Rainbow", "Hessel et al. 2018, 54 of the games in the source"),
}
_ID = re.compile(r"(?:ALE/)?([A-Za-z]+?)(?:NoFrameskip)?-v\d+")


@cache
def scores() -> dict[str, dict[str, float]]:
    """game -> {random, human, r2d2, apex, ...}, without those that were not published."""
    text = resources.files("rlx.results").joinpath("atari_scores.csv").read_text()
    rows = csv.DictReader(line for line in text.splitlines() if not line.startswith("#"))
    return {row.pop("game"): {k: float(v) for k, v in row.items() if v} for row in rows}


def game(env_id: str) -> str | None:
    """The game of an environment's id ("Pong-v5", "ALE/Pong-v5"); None if it is not of the 57."""
    found = _ID.fullmatch(env_id)
    return found[1] if found and found[1] in scores() else None


def human_normalized(name: str, score: Any) -> Any:
    """One score, or an array of them, where random play is 0 and the human tester is 1."""
    known = scores()[name]
    return (score - known["random"]) / (known["human"] - known["random"])
