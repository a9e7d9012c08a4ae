"""The environments of a few lanes in a process of their own, without a policy and without JAX.

With `acting.inference=server` an actor is only this: it steps with the actions it receives.
"""

from __future__ import annotations

import os
import pickle
import sys
from dataclasses import dataclass

import numpy as np

from rlx.cluster.whereabouts import Whereabouts, lower_priority, whereabouts
from rlx.envs.finite import Cutting
from rlx.interfaces import Env
from rlx.problems import or_run_failed
from rlx.types import Cut, Episode, Timestep


@dataclass(frozen=True, kw_only=True)
class Step:
    """The answer of some lanes; lane numbers are the actor's own, 0 .. N-1."""

    timestep: Timestep
    episodes: list[Episode]
    cuts: list[Cut]


class RemoteEnv:
    """One life of one actor's environments.

    family: a pickled EnvFamily; seeds: one per lane; without_jax: hides JAX from it.
    """

    def __init__(self, *, family: bytes, seeds: list[int], without_jax: bool) -> None:
        self._family, self._seeds, self._without_jax = family, seeds, without_jax
        self._env: Env | None = None

    def hello(self) -> Whereabouts:
        """Tells where the process runs; its answer says that it lives."""
        return whereabouts()

    def prepare(self, cores: tuple[int, ...] | None) -> None:
        """Opens the environments. cores: the CPU cores that all threads of this process share."""
        if cores is not None:
            os.sched_setaffinity(0, cores)
        if self._without_jax:
            # EnvPool loads JAX where there is one, for a way of stepping that is not used here.
            sys.modules.setdefault("jax", None)  # type: ignore[arg-type]
        family = pickle.loads(self._family)
        with or_run_failed():
            self._env = family.make(lanes=len(self._seeds), seeds=self._seeds)
        lower_priority()

    def reset(self) -> Step:
        """Starts every lane."""
        assert self._env is not None
        return self._answer(self._env.reset())

    def step(self, action: np.ndarray, lane: np.ndarray) -> Step:
        """Acts in these lanes: action [n, *] as the spec says, lane i32[n]."""
        assert self._env is not None
        # The object store's arrays are read-only, which EnvPool refuses.
        return self._answer(self._env.step(action, np.array(lane)))

    def _answer(self, timestep: Timestep) -> Step:
        assert self._env is not None
        cuts = self._env.cuts() if isinstance(self._env, Cutting) else []
        return Step(timestep=timestep, episodes=self._env.episodes(), cuts=cuts)
