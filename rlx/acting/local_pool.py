"""Actors in the process, one after another: exactly sequential, the same bits for the same seed."""

from __future__ import annotations

from typing import Annotated

import jax

from rlx import trees
from rlx.acting.actor import Actor
from rlx.acting.policy import Policy
from rlx.interfaces import Agent, Device, EnvFamily, Exploration
from rlx.seeding import spawn_int
from rlx.types import ArraySpec, Carry, Range, Request, Rollout, Runtime, Weights


class LocalPool:
    """An interfaces.ActingPool; its actors step when `collect` is called, and only then."""

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
    ) -> None:
        """`chain`: how many lives the lanes have had; `env_steps`: made by the run so far."""
        self.lanes = instances * envs_per_actor
        self.env_steps_per_request = env_steps_per_request
        self.chain = chain
        self._instances, self._envs_per_actor, self._device = instances, envs_per_actor, device
        self._family, self._agent, self._exploration = family, agent, exploration
        self._seed = seed
        self._weights: Weights | None = None
        self._env_steps = env_steps
        self._turn = 0
        self._seconds = {"policy_s": 0.0, "env_s": 0.0, "total_s": 0.0}
        self._actors = self._open()

    @property
    def burst_env_steps(self) -> int:
        """Env steps of one full round of requests."""
        return self._instances * self.env_steps_per_request

    def collect(self, want_env_steps: int, timeout_s: float) -> list[Rollout]:
        """The next actor's answer; `timeout_s` is not needed: nobody else is waited for."""
        actor = self._actors[self._turn]
        self._turn = (self._turn + 1) % len(self._actors)
        request = Request(
            weights=self._weights if self._turn_is_stale(actor) else None,
            env_steps=self._env_steps,
            want_env_steps=want_env_steps,
        )
        rollout = actor.collect(request)
        self._env_steps += rollout.env_steps
        for name, seconds in rollout.timings.items():
            self._seconds[name] += seconds
        return [rollout]

    def publish(self, weights: Weights, env_steps: int) -> None:
        """Every actor's next request brings these."""
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
        return [self._actor(index) for index in range(self._instances)]

    def _actor(self, index: int) -> Actor:
        lanes, chain = self._envs_per_actor, self.chain
        first_lane = index * lanes
        seeds = [spawn_int(self._seed, "env", first_lane + i, chain) for i in range(lanes)]
        policy = Policy(
            agent=self._agent,
            lanes=lanes,
            seed=self._seed,
            path=("policy", index, chain),
            device=self._device,
        )
        return Actor(
            env=self._family.make(lanes=lanes, seeds=seeds),
            policy=policy,
            exploration=self._exploration,
            sequence=self._agent.sequence,
            acting_spec=self._agent.acting_spec,
            carry_spec=carry_spec(self._agent),
            first_lane=first_lane,
            total_lanes=self.lanes,
            chain=chain,
        )


def carry_spec(agent: Agent) -> Carry:
    """The ArraySpecs of one lane's carry."""
    shapes = jax.eval_shape(lambda: agent.initial_carry(1))
    return trees.tree_map(lambda x: ArraySpec(shape=x.shape[1:], dtype=str(x.dtype)), shapes)
