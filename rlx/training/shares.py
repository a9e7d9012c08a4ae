"""Gives each of several learner processes its part of a run's lanes, replay and batch.

Settings say what all of them have together, so that `learner.processes=2` changes where a run is
computed and not what is computed.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlx.config.build import build
from rlx.config.marks import marked
from rlx.interfaces import Exploration, Peers, PerEpisode, Served
from rlx.problems import ConfigError, Problem, refuse
from rlx.seeding import spawn_int
from rlx.training.checkpoint import Checkpoint
from rlx.types import AloneOnly, OfTheRun

FOLDER = "learners"  # of the run's folder: what is each process's own


def share_of(settings: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The settings of one of `count` processes; raises ConfigError for what cannot be divided."""
    own: dict[str, Any] = copy.deepcopy(dict(settings))
    _refuse_alone_only(settings, count)
    pool, acting = build(own["acting"], "acting"), own["acting"]
    whole = "instances" if acting["instances"] % count == 0 else "envs_per_actor"
    acting[whole] = _divided(acting[whole], f"acting.{whole}", count)
    divided = {"run", "actors" if whole == "instances" else "lanes"}
    if isinstance(pool, Served) and pool.is_served:
        divided.add("lanes")  # a request is of all actors
    for setting in marked(own, OfTheRun):
        value, of = setting.node[setting.name], setting.marker
        if of.exactly:
            setting.node[setting.name] = _divided(value, setting.path, count)
        elif of.over in divided and value:
            setting.node[setting.name] = -(-value // count)
    own["logging"]["console"] = "off"  # the watcher shows what there is to see
    return own


def _divided(value: int, path: str, count: int) -> int:
    if value % count:
        says = f"does not divide over {count} processes (learner.processes); "
        nearest = max(count, value - value % count)
        says += f"nearest that do: {nearest}, {value - value % count + count}"
        raise refuse(path, says, given=str(value))
    return value // count


def _refuse_alone_only(settings: Mapping[str, Any], count: int) -> None:
    """Raises ConfigError for what only a run in one process can have."""
    found = {s.path: s.node[s.name] for s in marked(settings, AloneOnly)}
    problems = [
        Problem(path=key, says=f"needs learner.processes=1 (it is {count})")
        for key, value in found.items()
        if value not in (None, False, {})
    ]
    if problems:
        raise ConfigError(problems)


def share_folder(run: Path, rank: int) -> Path:
    """Names the folder of process `rank`; the first one writes where a run alone does."""
    return run if rank == 0 else run / FOLDER / str(rank)


def log_file(run: Path, rank: int) -> Path:
    """Names the file into which process `rank` logs, if it is one of several."""
    return run / FOLDER / f"{rank}.log"


def share_seed(seed: int, peers: Peers) -> int:
    """The seed of a process's environments, exploration and draws; the first has the run's own."""
    return seed if peers.rank == 0 else spawn_int(seed, "learner process", peers.rank)


def share_checkpoint(checkpoint: Checkpoint, peers: Peers) -> Checkpoint:
    """Others than the first process keep older ones, whose newest the first may not have got."""
    if peers.rank == 0:
        return checkpoint
    return dataclasses.replace(checkpoint, keep=max(3, checkpoint.keep))


def share_exploration(exploration: Exploration, peers: Peers) -> Exploration:
    """Lane l of process r explores as lane l * count + r of all."""
    if peers.count == 1:
        return exploration
    every = _Every(exploration=exploration, rank=peers.rank, count=peers.count)
    if isinstance(exploration, PerEpisode):
        return _EveryPerEpisode(every=every, exploration=exploration)
    return every


@dataclass(frozen=True, kw_only=True)
class _Every:
    """An interfaces.Exploration of every count-th lane."""

    exploration: Exploration
    rank: int
    count: int

    def amount(self, lane: np.ndarray, lanes: int, env_steps: int) -> np.ndarray:
        return self.exploration.amount(self.number(lane), lanes * self.count, env_steps)

    def number(self, lane: np.ndarray) -> np.ndarray:
        """The numbers of lanes among those of all processes."""
        return lane * self.count + self.rank


@dataclass(frozen=True, kw_only=True)
class _EveryPerEpisode:
    """An interfaces.PerEpisode of every count-th lane."""

    every: _Every
    exploration: PerEpisode

    def amount(self, lane: np.ndarray, lanes: int, env_steps: int) -> np.ndarray:
        return self.every.amount(lane, lanes, env_steps)

    def episode_amount(
        self, lane: np.ndarray, lanes: int, env_steps: int, chain: np.ndarray, episode: np.ndarray
    ) -> np.ndarray:
        number, all_lanes = self.every.number(lane), lanes * self.every.count
        return self.exploration.episode_amount(number, all_lanes, env_steps, chain, episode)
