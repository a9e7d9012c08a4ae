"""Actors in threads of the learner's process, their policies on its device (as in Sebulba).

EnvPool steps on threads of its own and the device computes without Python, so acting and learning
overlap in one process; nothing travels. Each thread has two groups of lanes in turn: one group's
environments step while the device acts for the other.
"""

from __future__ import annotations

import queue
from functools import partial
from typing import Annotated

from rlx.acting.acting_thread import ActingThread, Arrived, Orders, Threads
from rlx.acting.actor import Actor
from rlx.acting.plan import Plan
from rlx.interfaces import Agent, Device, EnvFamily, Exploration
from rlx.problems import refuse
from rlx.types import Range, Rollout, Runtime, Weights

GROUPS = 2  # of lanes, of each thread


class ThreadPool:
    """An interfaces.ActingPool whose actors run in threads of this process."""

    def __init__(
        self,
        *,
        instances: Annotated[int, Range(ge=1)],
        envs_per_actor: Annotated[int, Range(ge=2)],
        env_steps_per_request: Annotated[int, Range(ge=1)],
        requests_per_actor: Annotated[int, Range(ge=1)],
        device: Device,
        realtime: bool,
        max_pending: Annotated[int, Range(ge=1)],
        max_weight_age_updates: Annotated[int, Range(ge=1)] | None,
        request_timeout_s: Annotated[float, Range(gt=0)],
        family: Runtime[EnvFamily],
        agent: Runtime[Agent],
        exploration: Runtime[Exploration],
        seed: Runtime[int],
        chain: Runtime[int],
        env_steps: Runtime[int],
        round_blocks: Runtime[int | None],
    ) -> None:
        """Settings: conf/acting/threads.yaml. What the run supplies: as in LocalPool."""
        if envs_per_actor % GROUPS:
            says = f"each thread acts for {GROUPS} groups of lanes in turn; give an even number"
            raise refuse("acting.envs_per_actor", says, given=str(envs_per_actor))
        find = getattr(family, "problems", None)  # no part of every family
        if problems := find(lanes=envs_per_actor // GROUPS) if find else []:
            raise refuse("env", f"{problems[0]}; each group has half of acting.envs_per_actor")
        self.env_steps_per_request = env_steps_per_request
        self._ahead = max_pending if realtime else requests_per_actor
        self._first_chain = chain
        plan = Plan(
            family=family,
            agent=agent,
            exploration=exploration,
            seed=seed,
            instances=instances * GROUPS,
            envs_per_actor=envs_per_actor // GROUPS,
            device=device,
        )
        orders = Orders(env_steps)
        arrived: Arrived = queue.SimpleQueue()
        self._orders = orders
        self._threads = Threads(
            [
                ActingThread(
                    name=f"acting thread {index}",
                    make_actors=partial(_actors, plan, index, chain),
                    orders=orders,
                    arrived=arrived,
                    want_env_steps=env_steps_per_request,
                    want_blocks=round_blocks,
                    ahead=self._ahead,
                    realtime=realtime,
                    max_age=max_weight_age_updates,
                )
                for index in range(instances)
            ],
            orders=orders,
            arrived=arrived,
            limit_s=request_timeout_s,
        )

    @property
    def burst_env_steps(self) -> int:
        """Env steps of one full round of requests."""
        return len(self._threads.threads) * self._ahead * self.env_steps_per_request

    @property
    def chain(self) -> int:
        """The newest chain of any lane."""
        return max(self._first_chain, *(thread.chain for thread in self._threads.threads))

    def collect(self, want_env_steps: int, timeout_s: float, updates: int) -> list[Rollout]:
        """The rollouts that have arrived, or the first to arrive within `timeout_s`."""
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
