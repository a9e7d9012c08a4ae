"""Everything that a run is made of, and how far it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from rlx.config.changing import Schedule
from rlx.evaluation.playing import Evaluation
from rlx.interfaces import ActingPool, Agent, EnvFamily, Evaluator, Peers, Replay
from rlx.runs.metrics import Logging
from rlx.training.checkpoint import Checkpoint
from rlx.training.checkpoint_files import Restored
from rlx.training.hooks import close_hook
from rlx.training.learner import OpenLearner
from rlx.training.quota import Quota
from rlx.types import Batch

T = TypeVar("T")

CLOSE_TIMEOUT_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Everything that a run is made of, built and checked."""

    output_dir: Path
    seed: int
    total_env_steps: int
    stop_after_s: float | None
    stop_after_updates: int | None
    family: EnvFamily
    agent: Agent
    pool: ActingPool
    takes_turns: bool  # the pool, with the learner: then the same seed gives the same bits
    replay: Replay
    quota: Quota
    learner: OpenLearner
    evaluation: Evaluation
    evaluated: Mapping[str, EnvFamily]  # the environments of each evaluation, by its name
    evaluator: Evaluator | None  # beside the training; None: evaluations interrupt it
    checkpoint: Checkpoint
    logging: Logging
    hooks: Sequence[Any]  # objects with some of the methods of hooks.Points
    schedules: Sequence[Schedule]
    peers: Peers
    resumed: Restored | None  # applied to learner, replay, quota and pool already

    def __enter__(self) -> Parts:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the evaluator, the actors, whose cluster it may be in, the replay and the hooks."""
        with ExitStack() as ends:  # all of them, the last one first, whatever one may raise
            for number, hook in enumerate(self.hooks):
                ends.callback(close_hook, number, hook)
            ends.callback(self.replay.close)
            ends.callback(self.pool.close, CLOSE_TIMEOUT_S)
            if self.evaluator is not None:
                ends.callback(self.evaluator.close)


@dataclass(kw_only=True)
class Counters:
    """These counts say how far the run is."""

    env_steps: int = 0
    frames: int = 0
    wall_s: float = 0.0  # before this process


@dataclass(frozen=True, kw_only=True)
class InFlight:
    """An update that was started; asking what became of it waits for its end."""

    keys: np.ndarray  # i64[B] of its sequences
    priorities: Callable[[], np.ndarray | None]  # None: the agent keeps none
    is_finite: Callable[[], bool]
    has_ended: Callable[[], bool]  # never waits
    batch: Batch | None  # None: of a run before this process


class Alone:
    """The interfaces.Peers of a run with one learner process."""

    rank, count, restarts = 0, 1, 0

    def exchange(self, mine: T) -> Sequence[T]:
        return [mine]
