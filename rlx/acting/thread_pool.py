"""Actors in threads of the learner's process, their policies on its device (as in Sebulba).

EnvPool steps on threads of its own and the device computes without Python, so acting and learning
overlap in one process; nothing travels. Each thread has two groups of lanes in turn: one group's
environments step while the device acts for the other.
"""

from __future__ import annotations

import queue
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

from rlx.acting.acting_thread import ActingThread, Arrived, Orders, Threads
from rlx.acting.actor import Actor
from rlx.acting.plan import Plan, age_problems, make_plan, newest_only
from rlx.interfaces import CheckedFamily, Device, RunContext
from rlx.problems import Problem, refuse
from rlx.types import OfTheRun, Range, Rollout, Weights

GROUPS = 2  # of lanes, of each thread


@dataclass(frozen=True, kw_only=True)
class ThreadPool:
    """The settings of a pool in threads (an interfaces.PoolSettings); conf/acting/threads.yaml."""

    instances: Annotated[int, Range(ge=1)]
    envs_per_actor: Annotated[int, Range(ge=2)]
    env_steps_per_request: Annotated[int, Range(ge=1), OfTheRun(over="lanes")]
    requests_per_actor: Annotated[int, Range(ge=1)]
    device: Device
    realtime: bool
    max_pending: Annotated[int, Range(ge=1)]
    max_weight_age_updates: Annotated[int, Range(ge=1)] | None
    request_timeout_s: Annotated[float, Range(gt=0)]

    @property
    def ahead(self) -> int:
        """Requests that may wait for the loop, of each thread."""
        return self.max_pending if self.realtime else self.requests_per_actor

    def round_problems(
        self, *, on_policy: bool, publish_every_updates: int | None
    ) -> Sequence[Problem]:
        """An on-policy agent's environments wait for its newest weights."""
        if on_policy:
            return newest_only({"realtime": self.realtime}, {"realtime": False})
        return age_problems(self.max_weight_age_updates, publish_every_updates)

    def open(self, context: RunContext) -> OpenThreadPool:
        """Starts the threads; raises ConfigError for lanes that do not fit two groups."""
        if self.envs_per_actor % GROUPS:
            says = f"each thread acts for {GROUPS} groups of lanes in turn; give an even number"
            raise refuse("acting.envs_per_actor", says, given=str(self.envs_per_actor))
        family, lanes = context.family, self.envs_per_actor // GROUPS
        problems = family.problems(lanes=lanes) if isinstance(family, CheckedFamily) else ()
        if problems:
            raise refuse("env", f"{problems[0]}; each group has half of acting.envs_per_actor")
        return OpenThreadPool(self, context)


class OpenThreadPool:
    """An interfaces.ActingPool."""

    def __init__(self, settings: ThreadPool, context: RunContext) -> None:
        self._want_env_steps, self._ahead = settings.env_steps_per_request, settings.ahead
        self._first_chain = context.chain
        plan = make_plan(
            context,
            instances=settings.instances * GROUPS,
            envs_per_actor=settings.envs_per_actor // GROUPS,
            device=settings.device,
        )
        self._orders = orders = Orders(context.env_steps)
        arrived: Arrived = queue.SimpleQueue()
        threads = [
            ActingThread(
                name=f"acting thread {index}",
                make_actors=partial(_actors, plan, index, context.chain),
                orders=orders,
                arrived=arrived,
                want_env_steps=settings.env_steps_per_request,
                want_blocks=context.round_blocks,
                ahead=settings.ahead,
                realtime=settings.realtime,
                max_age=settings.max_weight_age_updates,
            )
            for index in range(settings.instances)
        ]
        limit_s = settings.request_timeout_s
        self._threads = Threads(threads, orders=orders, arrived=arrived, limit_s=limit_s)

    @property
    def burst_env_steps(self) -> int:
        """Env steps of one full round of requests."""
        return len(self._threads.threads) * self._ahead * self._want_env_steps

    @property
    def chain(self) -> int:
        """The newest chain of any lane."""
        return max(self._first_chain, *(thread.chain for thread in self._threads.threads))

    def collect(self, timeout_s: float, updates: int) -> list[Rollout]:
        """Returns what has arrived, or the first thing that does within `timeout_s`."""
        return self._threads.collect(timeout_s, updates)

    def publish(self, weights: Weights, env_steps: int) -> None:
        """Publishes the weights; the next requests bring them."""
        self._orders.publish(weights, env_steps)

    def reopen(self) -> None:
        raise RuntimeError("checkpoint.exact needs acting=local")

    def stats(self) -> dict[str, float]:
        """Shares of the time spent acting, and what was dropped, since the run began."""
        dropped = sum(thread.dropped_env_steps for thread in self._threads.threads)
        return {**self._threads.stats(), "acting/dropped_env_steps": float(dropped)}

    def close(self, timeout_s: float) -> None:
        self._threads.close(timeout_s)


def _actors(plan: Plan, thread: int, chain: int) -> list[Actor]:
    return [plan.actor(GROUPS * thread + group, chain) for group in range(GROUPS)]
