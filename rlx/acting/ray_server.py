"""Inference in one place for many thin Ray actors (SEED RL's arrangement).

The actors only step environments. Their lanes together look like one asynchronous environment
(`RayLanes`), for which the ordinary acting loop acts in a thread of the learner's process: the
policy, its recurrent state by lane, the blocks, all are the same as anywhere else.
"""

from __future__ import annotations

import math
import queue
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from threading import Event as Flag
from time import monotonic
from typing import Any

import numpy as np

from rlx import trees
from rlx.acting.acting_thread import ActingThread, Arrived, Orders, Threads
from rlx.acting.actor import Actor
from rlx.acting.plan import Plan, carry_spec, row_spec
from rlx.acting.policy import Policy
from rlx.acting.remote_env import Step
from rlx.cluster.fleet import Answered, Fleet, Lost, Ready
from rlx.types import Cut, EnvSpec, Episode, Rollout, Timestep, Weights

POLL_S = 0.2


class Closed(Exception):
    """Raised in the thread when the pool closes while it waits for environments."""


class RayLanes:
    """The lanes of all actors of a fleet of `rlx.acting.remote_env.RemoteEnv`; an interfaces.Env.

    `recv` returns what has arrived after at most `max_wait_s`, about `max_batch` lanes at most. A
    lane whose actor was lost answers again, with `first`, when its replacement is ready; before
    that `on_restart` is called with the lane's number.
    """

    def __init__(
        self, *, fleet: Fleet, spec: EnvSpec, envs_per_actor: int, max_batch: int, max_wait_s: float
    ) -> None:
        self.spec = spec
        self.lanes = len(fleet.slots) * envs_per_actor
        self.on_restart: Callable[[np.ndarray], None] = lambda lane: None
        self._fleet, self._envs_per_actor = fleet, envs_per_actor
        self._max_batch, self._max_wait_s = max_batch, max_wait_s
        self._life = [-1] * len(fleet.slots)  # -1: none
        self._lived = [False] * len(fleet.slots)
        self._waiting: list[tuple[int, Step]] = []  # answers that no `recv` has given yet
        self._given: list[tuple[int, int, int]] = []  # (actor, life, lanes) of the last `recv`
        self._episodes: list[Episode] = []
        self._cuts: list[Cut] = []
        self.closing = Flag()
        self.lost_env_steps = 0  # sent to actors that were lost before they answered

    def reset(self) -> Timestep:
        """The first answers; an actor's lanes start when the actor is ready."""
        return self.recv()

    def step(self, action: np.ndarray, lane: np.ndarray) -> Timestep:
        self.send(action, lane)
        return self.recv()

    def send(self, action: np.ndarray, lane: np.ndarray) -> None:
        """Sends actions for the lanes of the last answer, in its order."""
        at = 0
        for index, life, lanes in self._given:
            part = slice(at, at + lanes)
            if self._life[index] == life:  # else nobody is there to act
                own = lane[part] - np.int32(index * self._envs_per_actor)
                self._fleet.request(index, "step", action[part], own)
            at += lanes
        self._given = []

    def recv(self) -> Timestep:
        """Waits until `max_batch` lanes have answered, or some have and `max_wait_s` is over."""
        deadline: float | None = None
        while True:
            n = sum(len(step.timestep.lane) for _, step in self._waiting)
            if n and deadline is None:
                deadline = monotonic() + self._max_wait_s
            left = POLL_S if deadline is None else deadline - monotonic()
            if n >= self._max_batch or (n and (left <= 0 or not self._any_stepping())):
                return self._give()
            if self.closing.is_set():
                raise Closed
            for event in self._fleet.poll(max(0.0, left)):
                self._handle(event)

    def attend(self) -> None:
        """Notes what happened to the actors while nobody steps them."""
        for event in self._fleet.poll(0.0):
            self._handle(event)

    def episodes(self) -> list[Episode]:
        """The episodes that ended since the last call."""
        ended, self._episodes = self._episodes, []
        return ended

    def cuts(self) -> list[Cut]:
        """The episodes that were cut since the last call."""
        cuts, self._cuts = self._cuts, []
        return cuts

    def close(self) -> None:
        with suppress(Exception):  # the cluster may be gone
            self._fleet.close()

    def _any_stepping(self) -> bool:
        return any(slot.requests and slot.state == "ready" for slot in self._fleet.slots)

    def _handle(self, event: Ready | Answered | Lost) -> None:
        index = event.index
        if isinstance(event, Answered):
            self._waiting.append((index, event.value))
            return
        self._waiting = [(i, step) for i, step in self._waiting if i != index]
        if isinstance(event, Lost):
            self._life[index] = -1
            self.lost_env_steps += event.requests * self._envs_per_actor
            return
        if self._lived[index]:
            first = index * self._envs_per_actor
            self.on_restart(np.arange(first, first + self._envs_per_actor))
        self._life[index], self._lived[index] = event.chain, True
        self._fleet.request(index, "reset")

    def _give(self) -> Timestep:
        """Joins the waiting answers, oldest first, into one."""
        taken, lanes = 0, 0
        while taken < len(self._waiting) and lanes < self._max_batch:
            lanes += len(self._waiting[taken][1].timestep.lane)
            taken += 1
        given, self._waiting = self._waiting[:taken], self._waiting[taken:]
        self._given = [(i, self._life[i], len(step.timestep.lane)) for i, step in given]
        for index, step in given:
            for episode in step.episodes:
                episode.lane += index * self._envs_per_actor
                self._episodes.append(episode)
            first = index * self._envs_per_actor
            self._cuts += [replace(cut, lane=cut.lane + first) for cut in step.cuts]
        return stack([self._as_global(i, step.timestep) for i, step in given])

    def _as_global(self, index: int, timestep: Timestep) -> Timestep:
        parts: dict[str, Any] = {name: getattr(timestep, name) for name in TIMESTEP}
        lane = parts["lane"] + np.int32(index * self._envs_per_actor)
        return Timestep(**parts | {"lane": lane})


TIMESTEP = ("observation", "reward", "terminated", "truncated", "first", "lane")


def stack(timesteps: Sequence[Timestep]) -> Timestep:
    """Joins several actors' answers into one."""
    if len(timesteps) == 1:
        return timesteps[0]
    first, *rest = timesteps
    return trees.tree_map(lambda *parts: np.concatenate(parts), first, *rest)


class RayServer:
    """Collects rollouts of a fleet of thin actors; a thread of this process acts for all lanes."""

    def __init__(
        self,
        *,
        fleet: Fleet,
        plan: Plan,
        want_env_steps: int,
        ahead: int,
        max_batch: int,
        max_wait_s: float,
        max_age: int | None,
        chain: int,
        env_steps: int,
    ) -> None:
        """`want_env_steps`: env steps of one request, which is for all lanes together."""
        self._fleet, self._first_chain = fleet, chain
        self._want, self._ahead = want_env_steps, ahead
        self._lanes = RayLanes(
            fleet=fleet,
            spec=plan.agent.spec,
            envs_per_actor=plan.envs_per_actor,
            max_batch=max_batch,
            max_wait_s=max_wait_s,
        )
        self._orders = Orders(env_steps)
        arrived: Arrived = queue.SimpleQueue()
        self._thread = ActingThread(
            name="inference server",
            make_actors=lambda: [self._actor(plan, max_batch)],
            orders=self._orders,
            arrived=arrived,
            want_env_steps=want_env_steps,
            ahead=ahead,
            max_age=max_age,
            while_waiting=self._lanes.attend,
        )
        no_limit = math.inf  # the fleet has its deadlines
        self._threads = Threads(
            [self._thread], orders=self._orders, arrived=arrived, limit_s=no_limit
        )

    @property
    def burst_env_steps(self) -> int:
        return self._ahead * self._want

    @property
    def chain(self) -> int:
        return max(self._first_chain, self._thread.chain)

    def collect(self, timeout_s: float, updates: int) -> list[Rollout]:
        return self._threads.collect(timeout_s, updates)

    def publish(self, weights: Weights, env_steps: int) -> None:
        self._orders.publish(weights, env_steps)

    def stats(self) -> dict[str, float]:
        lost = float(self._lanes.lost_env_steps)
        return {**self._threads.stats(), "acting/lost_env_steps_at_most": lost}

    def close(self, timeout_s: float) -> None:
        self._lanes.closing.set()
        self._threads.close(timeout_s)

    def _actor(self, plan: Plan, max_batch: int) -> Actor:
        lanes = self._lanes.lanes
        policy = Policy(
            agent=plan.agent,
            lanes=lanes,
            seed=plan.seed,
            path=("policy", "server", self._first_chain),
            device=plan.device,
            pad=True,
        )
        actor = Actor(
            env=self._lanes,
            policy=policy,
            exploration=plan.exploration,
            sequence=plan.agent.sequence,
            row_spec=row_spec(plan.agent.spec, plan.agent.acting_spec),
            carry_spec=carry_spec(plan.agent),
            first_lane=0,
            total_lanes=lanes,
            chain=self._first_chain,
        )
        self._lanes.on_restart = actor.restart
        return actor
