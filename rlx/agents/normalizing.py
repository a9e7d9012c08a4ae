"""Observations and rewards in units of their running deviations, as agents normalise them.

The statistics are kept in `TrainState.statistics` and travel with the acting parameters. A batch's
inputs are read by those of before it, which acted; so the learner reads what the actor has read.
Then the batch is observed, and the rewards that are learnt are scaled by the newest statistics.
Evaluations observe nothing, and read by frozen ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlx.agents import running
from rlx.types import Array, Carry, EnvSpec, NetInput

OBSERVATION = "observation"  # moments by leaf
RETURN = "return"  # moments of the running discounted return of each lane

Statistics = Mapping[str, Any]


def begin(spec: EnvSpec, *, observation: bool, reward: bool) -> dict[str, Any]:
    """The statistics before the first batch; {} where nothing is normalised."""
    found: dict[str, Any] = {}
    if observation:
        found[OBSERVATION] = {
            name: running.nothing(spec.observation[name].shape) for name in real_leaves(spec)
        }
    return found | ({RETURN: running.nothing()} if reward else {})


def real_leaves(spec: EnvSpec) -> list[str]:
    """The leaves of real numbers that are no images, and not the mask."""
    return [
        name
        for name, leaf in spec.observation.items()
        if np.dtype(leaf.dtype).kind == "f" and len(leaf.shape) < 3 and name != spec.action_mask
    ]


def scaled_inputs(statistics: Statistics, inputs: NetInput) -> NetInput:
    """The inputs [T, B, ...] as the network reads them by these statistics."""
    observation = dict(inputs.observation)
    for name, moments in statistics.get(OBSERVATION, {}).items():
        observation[name] = running.normalize(moments, observation[name])
    return replace(
        inputs,
        observation=observation,
        prev_reward=scaled_reward(statistics, inputs.prev_reward),
    )


def scaled_reward(statistics: Statistics, reward: Array) -> Array:
    """Rewards over the deviation of the running returns, within +-10; the mean stays."""
    if RETURN not in statistics:
        return reward
    moments = statistics[RETURN]
    centred = replace(moments, mean=jnp.zeros_like(moments.mean))
    return running.normalize(centred, reward)


def observed(
    statistics: Statistics,
    inputs: NetInput,
    returns: Array | None,
    valid: Array,
    axis_name: str | None,
) -> dict[str, Any]:
    """The statistics after a batch of valid rows.

    inputs: [T, B, ...] as the environment gave them; returns: [T, B] after each row's reward,
    None where rewards are not normalised; valid: bool[T, B].
    """
    found = dict(statistics)
    if OBSERVATION in found:
        found[OBSERVATION] = {
            name: running.observe(moments, inputs.observation[name], valid, axis_name)
            for name, moments in found[OBSERVATION].items()
        }
    if RETURN in found:
        assert returns is not None
        found[RETURN] = running.observe(found[RETURN], returns, valid, axis_name)
    return found


def with_returns(carry: Carry, returns: Array) -> Carry:
    """The carry with the running return f32[B] of each lane beside the recurrent state."""
    return replace(carry, core={"body": carry.core, RETURN: returns})


def without_returns(core: Any, kept: bool) -> tuple[Any, Any]:
    """(the recurrent state, the running returns f32[B] or None); kept: whether there are any."""
    return (core["body"], core[RETURN]) if kept else (core, None)


def running_returns(before: Array, inputs: NetInput, gamma: float) -> tuple[Array, Array]:
    """The discounted sum of an episode's rewards so far, at each input [T, B] and after the last.

    before: f32[B], at the input before these. It is gym's NormalizeReward (Baselines' VecNormalize)
    but for the episode's end, where theirs goes on with the next episode's rewards from 0, too.
    """

    def step(so_far: Array, row: tuple[Array, Array]) -> tuple[Array, Array]:
        reward, first = row
        so_far = jnp.where(first, 0.0, gamma * so_far + reward)
        return so_far, so_far

    last, each = jax.lax.scan(step, before, (inputs.prev_reward, inputs.first))
    return each, last
