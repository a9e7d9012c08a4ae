"""What each actor of a pool is made from: a small frozen record that travels to other machines."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np

from rlx import trees
from rlx.acting.actor import Actor
from rlx.acting.policy import Policy
from rlx.acting.writer import empty, input_spec
from rlx.interfaces import Agent, Device, Env, EnvFamily, Exploration
from rlx.seeding import spawn_int
from rlx.types import ArraySpec, Carry, NetInput


@dataclass(frozen=True, kw_only=True)
class Plan:
    """`instances` actors of `envs_per_actor` lanes each; actor i has the lanes from i * that on."""

    family: EnvFamily
    agent: Agent
    exploration: Exploration
    seed: int
    instances: int
    envs_per_actor: int
    device: Device

    @property
    def lanes(self) -> int:
        """The number of lanes of all actors together."""
        return self.instances * self.envs_per_actor

    def seeds(self, index: int, chain: int) -> list[int]:
        """The seeds of one actor's life, one per lane."""
        first = index * self.envs_per_actor
        lanes = range(first, first + self.envs_per_actor)
        return [spawn_int(self.seed, "env", lane, chain) for lane in lanes]

    def env(self, index: int, chain: int) -> Env:
        """Makes the lanes of one actor's life."""
        return self.family.make(lanes=self.envs_per_actor, seeds=self.seeds(index, chain))

    def policy(self, index: int, chain: int) -> Policy:
        return Policy(
            agent=self.agent,
            lanes=self.envs_per_actor,
            seed=self.seed,
            path=("policy", index, chain),
            device=self.device,
        )

    def actor(self, index: int, chain: int) -> Actor:
        """Makes actor `index` for its life number `chain`."""
        return Actor(
            env=self.env(index, chain),
            policy=self.policy(index, chain),
            exploration=self.exploration,
            sequence=self.agent.sequence,
            acting_spec=self.agent.acting_spec,
            carry_spec=carry_spec(self.agent),
            first_lane=index * self.envs_per_actor,
            total_lanes=self.lanes,
            chain=chain,
        )

    def compile(self) -> None:
        """Compiles the policy for this many lanes, or takes it from JAX's compilation cache."""
        policy = self.policy(0, 0)
        policy.compile(zero_inputs(self.agent, self.envs_per_actor))
        if some := getattr(self.family, "batch_size", None):  # lanes that answer at a time
            policy.compile(zero_inputs(self.agent, some), np.arange(some, dtype=np.int32))


def carry_spec(agent: Agent) -> Carry:
    """The ArraySpecs of one lane's carry."""
    shapes = jax.eval_shape(lambda: agent.initial_carry(1))
    return trees.tree_map(lambda x: ArraySpec(shape=x.shape[1:], dtype=str(x.dtype)), shapes)


def zero_inputs(agent: Agent, lanes: int) -> NetInput:
    """Inputs [lanes, ...] of zeros."""
    inputs = empty(input_spec(agent.spec), lanes)
    return trees.tree_map(np.zeros_like, inputs)
