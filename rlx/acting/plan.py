"""Plans the actors of a pool: a small frozen record that travels to other machines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from rlx import trees
from rlx.acting.actor import Actor
from rlx.acting.policy import Policy
from rlx.envs.per_actor import PerActor
from rlx.interfaces import (
    Agent,
    Asynchronous,
    Device,
    Env,
    EnvFamily,
    Exploration,
    RunContext,
)
from rlx.problems import EnvironmentFailed, Problem
from rlx.seeding import spawn_int
from rlx.types import ArraySpec, Carry, EnvSpec, NetInput, Row


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
    process: tuple[int, int] = (0, 1)  # this learner process, and how many there are

    @property
    def lanes(self) -> int:
        """The number of lanes of all actors together."""
        return self.instances * self.envs_per_actor

    def seeds(self, index: int, chain: int) -> list[int]:
        """The seeds of one actor's life, one for each lane."""
        first = index * self.envs_per_actor
        lanes = range(first, first + self.envs_per_actor)
        return [spawn_int(self.seed, "env", lane, chain) for lane in lanes]

    def family_of(self, index: int) -> EnvFamily:
        """The family of one actor's lanes, by its number among the actors of all processes."""
        if isinstance(self.family, PerActor):
            rank, processes = self.process
            return self.family.of_actor(index * processes + rank, self.envs_per_actor)
        return self.family

    def env(self, index: int, chain: int) -> Env:
        """Makes the lanes of one actor's life; raises EnvironmentFailed if they are of others."""
        seeds = self.seeds(index, chain)
        made = self.family_of(index).make(lanes=self.envs_per_actor, seeds=seeds)
        try:
            self.check_spaces(made.spec)
        except EnvironmentFailed:
            made.close()
            raise
        return made

    def check_spaces(self, spec: EnvSpec) -> None:
        """Raises EnvironmentFailed for lanes that the agent cannot act in."""
        if not same_spaces(spec, self.agent.spec):
            says = "an actor has other observations or actions (env.per_actor) than the run: "
            says += f"{spaces_of(spec)}, not {spaces_of(self.agent.spec)}"
            raise EnvironmentFailed(spec.id, says)

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
            row_spec=row_spec(self.agent.spec, self.agent.acting_spec),
            carry_spec=carry_spec(self.agent),
            first_lane=index * self.envs_per_actor,
            total_lanes=self.lanes,
            chain=chain,
        )

    def compile(self) -> None:
        """Compiles the policy for this many lanes, or takes it from JAX's compilation cache."""
        policy = self.policy(0, 0)
        policy.compile(zero_inputs(self.agent, self.envs_per_actor))
        some = self.family.batch_size if isinstance(self.family, Asynchronous) else None
        if some:  # lanes that answer at a time
            policy.compile(zero_inputs(self.agent, some), np.arange(some, dtype=np.int32))


def spaces_of(spec: EnvSpec) -> tuple[Any, ...]:
    """Lists what lanes must have alike, to be read by one network."""
    return dict(spec.observation), spec.action, spec.action_mask, spec.frames_per_env_step


def same_spaces(first: EnvSpec, second: EnvSpec) -> bool:
    """Says whether one network reads and acts in both."""
    return spaces_of(first) == spaces_of(second)


def make_plan(context: RunContext, *, instances: int, envs_per_actor: int, device: Device) -> Plan:
    """The plan of a run's pool."""
    return Plan(
        family=context.family,
        agent=context.agent,
        exploration=context.exploration,
        seed=context.seed,
        instances=instances,
        envs_per_actor=envs_per_actor,
        device=device,
        process=context.process,
    )


def age_problems(oldest: int | None, every: int | None) -> list[Problem]:
    """Checks that weights of at most `oldest` updates exist if they are published every so many.

    every: None, where weights are published by env steps.
    """
    if oldest is None or (every is not None and oldest >= every):
        return []
    says = f"weights are published every {every} updates (learner.publish_every_updates): "
    says += f"actors would wait for ever; accepted: null or an int >= {every}"
    if every is None:
        says = "weights are published by env steps (learner.publish_every_env_steps), of which "
        says += "actors that wait make none; accepted: null"
    return [Problem(path="acting.max_weight_age_updates", given=str(oldest), says=says)]


def newest_only(given: Mapping[str, Any], accepted: Mapping[str, Any]) -> list[Problem]:
    """The problems of pool settings that let an on-policy agent act with older weights."""
    found = []
    for name, value in accepted.items():
        if given[name] != value:
            says = "an on-policy agent acts with its newest weights only; set it to "
            shown = str(given[name]).lower()
            says += str(value).lower()
            found.append(Problem(path=f"acting.{name}", given=shown, says=says))
    return found


def carry_spec(agent: Agent) -> Carry:
    """The ArraySpecs of one lane's carry."""
    shapes = jax.eval_shape(lambda: agent.initial_carry(1))
    return trees.tree_map(lambda x: ArraySpec(shape=x.shape[1:], dtype=str(x.dtype)), shapes)


def zero_inputs(agent: Agent, lanes: int) -> NetInput:
    """Inputs [lanes, ...] of zeros."""
    inputs = trees.empty(input_spec(agent.spec), lanes)
    return trees.tree_map(np.zeros_like, inputs)


def row_spec(spec: EnvSpec, acting: Any) -> Row:
    """The ArraySpecs of one stored row."""
    return Row(
        inputs=input_spec(spec),
        action=spec.action.array,
        reward=ArraySpec(shape=(), dtype="float32"),
        discount=ArraySpec(shape=(), dtype="float32"),
        valid=ArraySpec(shape=(), dtype="bool"),
        acting=acting,
    )


def input_spec(spec: EnvSpec) -> NetInput:
    """The ArraySpecs of one network input."""

    def scalar(dtype: str) -> ArraySpec:
        return ArraySpec(shape=(), dtype=dtype)

    return NetInput(
        observation=dict(spec.observation),
        prev_action=spec.action.array,
        prev_reward=scalar("float32"),
        time=scalar("int32"),
        first=scalar("bool"),
    )
