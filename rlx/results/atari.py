"""Published scores on the 57 Atari games, at the end and on the way, and scores normalised by them.

`atari_scores.csv` and `atari_curves.csv`, beside this file, name where each column was read.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Published:
    """An agent's final scores: a column of atari_scores.csv."""

    title: str  # as a table calls it, with the emulator frames of a game's training
    conditions: str  # under which the scores were reached


@dataclass(frozen=True, kw_only=True)
class Point:
    """A point of a published learning curve: a row of atari_curves.csv."""

    frames: float  # emulator frames
    score: float  # mean return
    runs: int  # that the mean is over


PUBLISHED: Mapping[str, Published] = {
    "r2d2": Published(
        title="R2D2 (about 30,000M frames)",
        conditions="Kapturowski et al. 2019, mean of 3 seeds, final scores; 256 actors, five days",
    ),
    "apex": Published(
        title="Ape-X (22,800M frames)",
        conditions="Horgan et al. 2018, the best score of a training",
    ),
    "recurrent_iqn": Published(
        title="recurrent IQN (200M frames)", conditions="rltime, one run, 55 of the games"
    ),
    "rainbow": Published(
        title="Rainbow (200M frames)",
        conditions="Hessel et al. 2018, 54 of the games in the source",
    ),
}
EQUAL = 0.1  # frames that differ by less than this share count as equally many
_ID = re.compile(r"(?:ALE/)?([A-Za-z]+?)(?:NoFrameskip)?-v\d+")


@cache
def scores() -> dict[str, dict[str, float]]:
    """game -> {random, human, r2d2, apex, ...}, without those that were not published."""
    rows = _rows("atari_scores.csv")
    return {row.pop("game"): {k: float(v) for k, v in row.items() if v} for row in rows}


@cache
def curves() -> dict[str, dict[str, list[Point]]]:
    """game -> agent -> the points of its published learning curve, of the games that have one."""
    found: dict[str, dict[str, list[Point]]] = {}
    for row in _rows("atari_curves.csv"):
        point = Point(
            frames=float(row["frames"]), score=float(row["return"]), runs=int(row["runs"])
        )
        found.setdefault(row["game"], {}).setdefault(row["agent"], []).append(point)
    return found


def _rows(name: str) -> list[dict[str, str]]:
    text = resources.files("rlx.results").joinpath(name).read_text()
    return list(csv.DictReader(line for line in text.splitlines() if not line.startswith("#")))


def at_equal_frames(name: str, least: float, most: float) -> dict[str, Point]:
    """agent -> the nearest point of its published curve, where it has one at equally many frames.

    least, most: the emulator frames of the runs that it is to stand beside; a point counts only
    if both lie within a tenth of it (EQUAL). Nothing is interpolated.
    """
    found = {}
    for agent, points in curves().get(name, {}).items():
        nearest = min(points, key=lambda point: abs(point.frames - (least + most) / 2))
        if all(abs(frames - nearest.frames) <= EQUAL * nearest.frames for frames in (least, most)):
            found[agent] = nearest
    return found


def game(env_id: str) -> str | None:
    """The game of an environment's id ("Pong-v5", "ALE/Pong-v5"); None if it is not of the 57."""
    found = _ID.fullmatch(env_id)
    return found[1] if found and found[1] in scores() else None


def human_normalized(name: str, score: Any) -> Any:
    """One score, or an array of them, where random play is 0 and the human tester is 1."""
    known = scores()[name]
    return (score - known["random"]) / (known["human"] - known["random"])
