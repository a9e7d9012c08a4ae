"""Actors in this process, one after another: sequential, the same bits for the same seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from rlx.acting.actor import Actor
from rlx.acting.plan import make_plan
from rlx.interfaces import Device, RunContext
from rlx.problems import Problem
from rlx.types import OfTheRun, Range, Request, Rollout, Weights


@dataclass(frozen=True, kw_only=True)
class LocalPool:
    """The settings of a pool in this process (interfaces.PoolSettings); conf/acting/local.yaml."""

    instances: Annotated[int, Range(ge=1)]
    envs_per_actor: Annotated[int, Range(ge=1)]
    env_steps_per_request: Annotated[int, Range(ge=1), OfTheRun(over="lanes")]
    device: Device
    takes_turns: ClassVar[bool] = True  # with the learner

    @staticmethod
    def clashes(settings: Mapping[str, Any]) -> Sequence[Problem]:
        """Turns are taken by the replay's ratio."""
        if settings["replay"].get("ratio", "its own") is not None:
            return []
        says = "acting=local takes turns with the learner and needs a ratio; set replay.ratio=0.8"
        return [Problem(path="replay.ratio", given="null", says=says)]

    def open(self, context: RunContext) -> OpenLocalPool:
        """Opens the environments of all actors."""
        return OpenLocalPool(self, context)


class OpenLocalPool:
    """An interfaces.ActingPool; its actors step when `collect` is called, and only then."""

    def __init__(self, settings: LocalPool, context: RunContext) -> None:
        self.chain = context.chain
        self._want_env_steps = settings.env_steps_per_request
        self._plan = make_plan(
            context,
            instances=settings.instances,
            envs_per_actor=settings.envs_per_actor,
            device=settings.device,
        )
        self._round_blocks = context.round_blocks
        self._weights: Weights | None = None
        self._env_steps = context.env_steps
        self._turn = 0
        self._seconds = {"policy_s": 0.0, "env_s": 0.0, "total_s": 0.0}
        self._actors = self._open()

    @property
    def burst_env_steps(self) -> int:
        """Env steps of one full round of requests."""
        return self._plan.instances * self._want_env_steps

    def collect(self, timeout_s: float, updates: int) -> list[Rollout]:
        """The next actor's answer; it is made here and now, so there is nothing to wait for."""
        actor = self._actors[self._turn]
        self._turn = (self._turn + 1) % len(self._actors)
        request = Request(
            weights=self._weights if self._turn_is_stale(actor) else None,
            env_steps=self._env_steps,
            want_env_steps=self._want_env_steps,
            want_blocks=self._round_blocks,
        )
        rollout = actor.collect(request)
        self._env_steps += rollout.env_steps
        for name, seconds in rollout.timings.items():
            self._seconds[name] += seconds
        return [rollout]

    def publish(self, weights: Weights, env_steps: int) -> None:
        """Publishes the weights; every actor's next request brings them."""
        self._weights, self._env_steps = weights, env_steps

    def reopen(self) -> None:
        """Closes the environments and opens them anew as the next chain (exact resume)."""
        self._close_actors()
        self.chain += 1
        self._turn = 0
        self._actors = self._open()

    def stats(self) -> dict[str, float]:
        """Shares of the time spent acting, since the run began."""
        total = max(self._seconds["total_s"], 1e-9)
        return {
            "time/acting_env": self._seconds["env_s"] / total,
            "time/acting_policy": self._seconds["policy_s"] / total,
        }

    def close(self, timeout_s: float) -> None:
        self._close_actors()

    def _turn_is_stale(self, actor: Actor) -> bool:
        return self._weights is not None and actor.weights_version != self._weights.version

    def _close_actors(self) -> None:
        for actor in self._actors:
            actor.close()

    def _open(self) -> list[Actor]:
        return [self._plan.actor(index, self.chain) for index in range(self._plan.instances)]
