"""Actors in this process, one after another: sequential, the same bits for the same seed."""

from __future__ import annotations

from typing import Annotated

from rlx.acting.actor import Actor
from rlx.acting.plan import Plan
from rlx.interfaces import Agent, Device, EnvFamily, Exploration
from rlx.types import Range, Request, Rollout, Runtime, Weights


class LocalPool:
    """An interfaces.ActingPool; its actors step when `collect` is called, and only then."""

    takes_turns = True  # with the learner

    def __init__(
        self,
        *,
        instances: Annotated[int, Range(ge=1)],
        envs_per_actor: Annotated[int, Range(ge=1)],
        env_steps_per_request: Annotated[int, Range(ge=1)],
        device: Device,
        family: Runtime[EnvFamily],
        agent: Runtime[Agent],
        exploration: Runtime[Exploration],
        seed: Runtime[int],
        chain: Runtime[int],
        env_steps: Runtime[int],
        round_blocks: Runtime[int | None],
    ) -> None:
        """`chain`: how many lives the lanes have had; `env_steps`: made by the run so far.

        `round_blocks`: blocks of each lane in a request (`rlx.training.rounds`); None: env steps.
        """
        self.env_steps_per_request = env_steps_per_request
        self.chain = chain
        self._plan = Plan(
            family=family,
            agent=agent,
            exploration=exploration,
            seed=seed,
            instances=instances,
            envs_per_actor=envs_per_actor,
            device=device,
        )
        self._round_blocks = round_blocks
        self._weights: Weights | None = None
        self._env_steps = env_steps
        self._turn = 0
        self._seconds = {"policy_s": 0.0, "env_s": 0.0, "total_s": 0.0}
        self._actors = self._open()

    @property
    def burst_env_steps(self) -> int:
        """Env steps of one full round of requests."""
        return self._plan.instances * self.env_steps_per_request

    def collect(self, want_env_steps: int, timeout_s: float, updates: int) -> list[Rollout]:
        """Makes and returns the next actor's rollout; it never waits."""
        actor = self._actors[self._turn]
        self._turn = (self._turn + 1) % len(self._actors)
        request = Request(
            weights=self._weights if self._turn_is_stale(actor) else None,
            env_steps=self._env_steps,
            want_env_steps=want_env_steps,
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
