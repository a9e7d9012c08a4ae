"""Evaluation in a Ray actor beside the training: `evaluation.where=actor`.

It is watched and replaced like an acting actor; an evaluation that is lost with it is not
repeated, the next one follows.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from time import monotonic
from typing import Any

from rlx.cluster.cluster import Cluster
from rlx.cluster.faults import Restarts
from rlx.cluster.fleet import Answered, Deadlines, Fleet, Lost, Ready
from rlx.cluster.pickled import pickled
from rlx.cluster.whereabouts import (
    Whereabouts,
    lower_priority,
    thread_limits,
    whereabouts,
)
from rlx.evaluation.playing import Evaluation, told
from rlx.interfaces import Agent, EnvFamily
from rlx.machine import compiled
from rlx.types import Cut, Evaluated, Weights

POLL_EVERY_S = 0.2
STORE_BYTES = 256 * 1024**2
RESTARTS = Restarts(
    window_s=600.0, max_raised=3, max_fruitless=30, first_wait_s=1.0, longest_wait_s=10.0
)
DEADLINES = Deadlines(prepare_s=300.0, request_s=3600.0, resource_s=float("inf"), grace_s=3600.0)


class RemoteEvaluator:
    """Plays episodes in a process of its own; nothing here knows Ray."""

    def __init__(self, *, made_of: bytes, compile_cache: bool) -> None:
        self._made_of, self._compile_cache = made_of, compile_cache

    def hello(self) -> Whereabouts:
        """Tells where the process runs; its answer says that it lives."""
        return whereabouts()

    def prepare(self, cores: tuple[int, ...] | None) -> None:
        """Builds its parts, which loads JAX."""
        if cores is not None:
            os.sched_setaffinity(0, cores)
        compiled.keep(self._compile_cache)
        self._evaluation, self._families, self._agent, self._seed = pickle.loads(self._made_of)
        lower_priority()

    def evaluate(self, weights: Weights, env_steps: int, name: str) -> Evaluated:
        """Evaluates these weights as the training process would."""
        cuts: list[Cut] = []
        own = self._evaluation
        played = own.play(
            agent=self._agent,
            weights=weights,
            families=self._families,
            name=name,
            episodes=own.others[name].episodes if name else own.episodes,
            seed=self._seed,
            purpose="selection",
            cut=cuts.append,
        )
        version = weights.version
        return told(played, weights_version=version, env_steps=env_steps, name=name, cuts=cuts)


class RayEvaluator:
    """An interfaces.Evaluator; called by one thread."""

    def __init__(
        self,
        *,
        evaluation: Evaluation,
        families: Mapping[str, EnvFamily],
        agent: Agent,
        seed: int,
        address: str | None,
    ) -> None:
        """`address`: the cluster's, as in `acting.address`."""
        made_of = {
            "made_of": pickled((evaluation, families, agent, seed)),
            "compile_cache": compiled.is_kept(),
        }
        self._cluster = Cluster(address=address, store_bytes=STORE_BYTES)
        self._fleet = Fleet(
            check=self._cluster.check,
            cls=RemoteEvaluator,
            arguments=lambda index, life: made_of,
            count=1,
            least=1,
            first_chain=0,
            options={"num_cpus": 0, "runtime_env": {"env_vars": dict(thread_limits(1))}},
            threads=None,
            at_once=1,
            restarts=RESTARTS,
            deadlines=DEADLINES,
        )
        self._is_ready, self._skipped = False, 0
        self._wanted: dict[str, tuple[Weights, int]] = {}  # submitted, and not begun
        self._busy: str | None = None  # the name of the one that is being made
        self._polled_s = 0.0

    def submit(self, weights: Weights, env_steps: int, name: str = "") -> bool:
        """Asks for an evaluation; while another of the name is there it is dropped, and False."""
        if name == self._busy or name in self._wanted:
            self._skipped += 1
            return False
        self._wanted[name] = weights, env_steps
        self._send()
        return True

    def poll(self) -> list[Evaluated]:
        """The evaluations finished since the last call; it looks a few times a second."""
        if monotonic() - self._polled_s < POLL_EVERY_S:
            return []
        self._polled_s = monotonic()
        found: list[Evaluated] = []
        for event in self._fleet.poll(0.0):
            self._handle(event, found)
        self._send()
        return found

    def stats(self) -> dict[str, Any]:
        """The number of evaluations that were dropped."""
        return {"evaluation/skipped": float(self._skipped)}

    def close(self) -> None:
        self._fleet.close()
        self._cluster.close()

    def _handle(self, event: Ready | Answered | Lost, found: list[Evaluated]) -> None:
        if isinstance(event, Ready):
            self._is_ready = True
            return
        if isinstance(event, Answered):
            found.append(event.value)
        else:
            self._is_ready = False
            self._skipped += event.requests
        self._busy = None

    def _send(self) -> None:
        if self._wanted and self._is_ready and self._busy is None:
            name = next(iter(self._wanted))  # the one that has waited longest
            self._fleet.request(0, "evaluate", *self._wanted.pop(name), name)
            self._busy = name
