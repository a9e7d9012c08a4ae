"""The lanes of both environment families: which wait for an action, episodes, seeds.

Letters as in `rlx.types`: N lanes, n <= N lanes in one answer, `*` the shape of a leaf.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlx.envs.actions import Actions, describe
from rlx.envs.finite import TRIES, cut, make_finite, not_finite
from rlx.envs.true_episodes import ToldEpisodes
from rlx.problems import EnvironmentFailed
from rlx.types import Cut, EnvSpec, Episode


def lane_index(lane: np.ndarray, every: np.ndarray) -> slice | np.ndarray:
    """lane i32[n] as an index: a slice if it is `every` lane in order, else intp.

    NumPy indexes by both several times faster than by int32.
    """
    if len(lane) == len(every) and lane.tobytes() == every.tobytes():  # a tenth of `==`'s time
        return slice(None)
    return lane.astype(np.intp)


class EpisodeCounter:
    """Counts unclipped return and env steps of every lane, under all wrappers."""

    def __init__(self, *, lanes: int, frames_per_env_step: int) -> None:
        self._return = np.zeros(lanes)  # float64: a sum of up to 1e5 rewards
        self._env_steps = np.zeros(lanes, np.int64)
        self._frames_per_env_step = frames_per_env_step
        self._ended: list[Episode] = []

    def restart(self) -> None:
        """Forgets the unfinished episodes of all lanes."""
        self.forget(slice(None))

    def forget(self, lane: slice | np.ndarray) -> None:
        """Forgets the unfinished episodes of these lanes."""
        self._return[lane] = 0
        self._env_steps[lane] = 0

    def env_steps(self, lane: int) -> int:
        """The env steps of the lane's unfinished episode."""
        return int(self._env_steps[lane])

    def add(
        self,
        *,
        index: slice | np.ndarray,
        lane: np.ndarray,
        reward: np.ndarray,
        first: np.ndarray,
        ended: np.ndarray,
    ) -> None:
        """Counts one answer; index of lane i32[n], reward f32[n] raw, first and ended bool[n].

        A reset row (`first`) is no env step.
        """
        self._return[index] += reward
        self._env_steps[index] += ~first
        if np.count_nonzero(ended):
            self.end(lane[ended])

    def end(self, lane: np.ndarray) -> None:
        """Counts the episodes of these lanes as ended."""
        for i in lane.tolist():
            self._end(i)

    def _end(self, lane: int) -> None:
        env_steps = int(self._env_steps[lane])
        self._ended.append(
            Episode(
                return_=float(self._return[lane]),
                env_steps=env_steps,
                frames=env_steps * self._frames_per_env_step,
                lane=lane,
            )
        )
        self._return[lane] = 0
        self._env_steps[lane] = 0

    def take(self) -> list[Episode]:
        """The episodes that ended since the last call."""
        ended, self._ended = self._ended, []
        return ended


class LaneTracker:
    """Tracks the lanes of one environment: which wait for an action, whose episode ended, returns.

    The answer after an ended one is `first`. This follows from the lane's previous answer alone;
    EnvPool's elapsed_step goes on counting over the resets of `episodic_life`.
    """

    def __init__(
        self,
        *,
        lanes: int,
        spec: EnvSpec,
        actions: Actions,
        least_in_flight: int = 1,
        told: ToldEpisodes | None = None,
    ) -> None:
        """told: what is told of episodes, where answers do not show the true ones."""
        self.lanes = lanes
        self._least_in_flight = least_in_flight  # fewer would never make an answer
        self._actions = actions
        self._all = np.arange(lanes, dtype=np.int32)
        self._answered: np.ndarray | None = None  # the very array of the last answer's lanes
        self._index_answered: slice | np.ndarray = slice(None)  # the same as an index
        self._waiting = np.zeros(lanes, bool)
        self._n_waiting = 0
        self._done = np.ones(lanes, bool)  # so that the very first answers are `first`
        self._counter: EpisodeCounter | ToldEpisodes = told or EpisodeCounter(
            lanes=lanes, frames_per_env_step=spec.frames_per_env_step
        )
        self._uncounted: dict[str, Any] | None = None  # of the last answer, for the counter
        self._cuts: list[Cut] = []
        self._ending: set[int] = set()  # lanes whose next answer is to be `first`
        self._later: set[int] = set()  # the same, from the answer after this one on
        self._in_a_row: Counter[int] = Counter()  # first observations that were not finite
        self._env_id = spec.id

    @property
    def in_flight(self) -> int:
        """The number of lanes that were sent an action (or a reset) and have not answered."""
        return self.lanes - self._n_waiting

    def restart(self) -> None:
        """Notes that all lanes are being reset: none waits, each answers with `first` next."""
        self._waiting[:] = False
        self._n_waiting = 0
        self._done[:] = True
        self.count()
        self._counter.restart()

    def claim(self, action: np.ndarray, lane: np.ndarray) -> None:
        """Checks an action and marks its lanes as acted; raises ValueError and changes nothing.

        The check is here because EnvPool aborts the process, or corrupts a lane silently.
        """
        if not isinstance(lane, np.ndarray) or lane.dtype != np.int32 or lane.ndim != 1:
            raise ValueError(f"lane is {describe(lane)}; give numpy int32[n] of lane numbers")
        self._actions.check(action)
        n = len(lane)
        if n == 0 or len(action) != n:
            raise ValueError(
                f"{len(action)} actions for {n} lanes; give one each, and at least one"
            )
        if self.in_flight + n < self._least_in_flight:
            raise ValueError(
                f"{n} lanes acted in, {self.in_flight} busy: an answer takes "
                f"{self._least_in_flight}, this would wait for ever; act in more lanes at once"
            )
        if lane is self._answered:  # the lanes of the last answer, all of them: nothing to check
            self._answered = None
            self._waiting[self._index_answered] = False
            self._n_waiting -= n
            return
        self._answered = None
        # Seen as uint32 a negative lane is huge: one reduction checks both ends.
        if np.maximum.reduce(lane.view(np.uint32)) >= self.lanes:
            raise ValueError(
                f"lane has {lane.min()} .. {lane.max()}; accepted: 0 .. {self.lanes - 1}"
            )
        index = lane.astype(np.intp)  # NumPy indexes by intp several times faster than by int32
        if not self._waiting[index].all():
            busy = lane[~self._waiting[index]].tolist()
            raise ValueError(
                f"lanes {busy} wait for no action; reset first, then act once per answer"
            )
        self._waiting[index] = False
        if np.count_nonzero(self._waiting) != self._n_waiting - n:
            self._waiting[index] = True
            raise ValueError(f"lane names a lane twice: {lane.tolist()}; act once per answer")
        self._n_waiting -= n

    def is_waiting(self, lane: int) -> bool:
        """Says whether this lane has answered and waits for an action."""
        return bool(self._waiting[lane])

    def answered(
        self, *, lane: np.ndarray, reward: np.ndarray, done: np.ndarray, ended: np.ndarray
    ) -> np.ndarray:
        """bool[n]: which of the lanes i32[n] that have answered begin an episode with it.

        done: bool[n], terminated or truncated; ended: bool[n], where the game truly ended.
        """
        index = lane_index(lane, self._all)
        first = self._done[index].copy()
        self._done[index] = done
        self._waiting[index] = True
        self._n_waiting += len(lane)
        self._answered, self._index_answered = lane, index
        if self._later:
            self._ending |= self._later
            self._later.clear()
        self.count()
        self._uncounted = {
            "index": index,
            "lane": lane,
            "reward": reward,
            "first": first,
            "ended": ended,
        }
        return first

    def begin_anew(
        self, lane: np.ndarray, observation: dict[str, np.ndarray], reward: np.ndarray
    ) -> np.ndarray | None:
        """bool[n]: the lanes i32[n] of an answer that are to be reset, and answer `first` then.

        They are those that `end` named, and those whose answer is not finite, which is noted as a
        cut. None: there are none, and the answer is good. Where a first observation is not finite
        its wrong numbers become 0, and the lane begins once more with its next answer.
        """
        bad = not_finite(observation, reward)
        if bad is None and not self._ending:
            self._in_a_row.clear()
            return None
        self.count()
        bad = np.zeros(len(lane), bool) if bad is None else bad
        for at in np.flatnonzero(bad).tolist():
            own = int(lane[at])
            env_step = 0 if self._done[own] else self._counter.env_steps(own) + 1
            self._cuts.append(cut(own, env_step, observation, reward, at))
        again = bad & self._done[lane]
        if again.any():
            self._begin_once_more(lane[again])
            make_finite(observation, again)
        ending = np.isin(lane, list(self._ending))
        anew: np.ndarray = (ending | bad) & ~again
        self._ending.difference_update(lane[ending].tolist())
        self._done[lane[anew]] = True
        self._counter.forget(lane[anew])
        return anew if anew.any() else None

    def _begin_once_more(self, lane: np.ndarray) -> None:
        self._in_a_row.update(lane.tolist())
        if max(self._in_a_row.values()) > TRIES:
            says = f"its first observations were not finite {TRIES} times in a row"
            raise EnvironmentFailed(self._env_id, says, int(lane[0]))
        self._later.update(lane.tolist())

    def reopened(self, lane: np.ndarray, says: Sequence[str]) -> None:
        """Notes lanes intp[n] whose environments failed, and answer as the first of an episode."""
        self.count()
        for own, text in zip(lane.tolist(), says, strict=True):
            env_step = 0 if self._done[own] else self._counter.env_steps(own) + 1
            cut_ = Cut(lane=own, env_step=env_step, says=text, answer={}, reopened=True)
            self._cuts.append(cut_)
        self._done[lane] = True
        self._counter.forget(lane)

    def end(self, lane: np.ndarray) -> None:
        """Ends the episodes of lanes i32[n] that wait: they count as they are."""
        self.count()
        self._counter.end(lane)
        self._ending.update(lane.tolist())

    def cuts(self) -> list[Cut]:
        """The episodes that were cut since the last call."""
        cuts, self._cuts = self._cuts, []
        return cuts

    def count(self) -> None:
        """Counts the last answer's episodes once; call it while the lanes are busy."""
        if self._uncounted is not None:
            self._counter.add(**self._uncounted)
            self._uncounted = None

    def episodes(self) -> list[Episode]:
        """The episodes that ended since the last call."""
        self.count()
        return self._counter.take()


class OneThread:
    """A `with` block that raises if two threads are in it at once."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(f"two threads are in {self._what} at once; give each its own lanes")

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def check_lane(lane: int, lanes: int) -> None:
    """Raises ValueError unless 0 <= lane < lanes."""
    if not 0 <= lane < lanes:
        raise ValueError(f"lane={lane} does not exist; accepted: 0 .. {lanes - 1}")


def check_lanes_and_seeds(lanes: int, seeds: Sequence[int]) -> list[int]:
    """The seeds as a list of int; raises ValueError unless there is one int32 per lane."""
    found = [int(seed) for seed in seeds]
    if lanes < 1 or len(found) != lanes:
        raise ValueError(f"{len(found)} seeds for lanes={lanes}; give one per lane, and lanes >= 1")
    if any(not -(2**31) <= seed < 2**31 for seed in found):
        raise ValueError(f"seeds must be int32, got {found}; use rlx.seeding.spawn_int")
    return found
