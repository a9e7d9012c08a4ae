"""Normalised observations and rewards: which rows count, over blocks, devices and batches."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlx import trees
from rlx.agents import normalizing
from rlx.agents import policy_gradient as pg
from rlx.agents.a2c import A2C
from rlx.agents.running import Moments
from rlx.types import ArraySpec, Batch
from tests import parts
from tests.agents import actor_critics as small


def made(**changes: Any) -> Any:
    net = parts.network(parts.MASKED, "none")
    scaled = {"normalize_observation": True, "normalize_reward": True}
    return small.made(A2C, net, **scaled | changes)


def read(agent: Any, state: Any, batch: Batch, axis_name: str | None = None) -> Any:
    """(the inputs that are learnt from, the rewards, the statistics after the batch)."""
    found, after = pg.read(agent, state, batch, axis_name)
    return found.inputs, found.reward, after.statistics


def loop_returns(agent: Any, batch: Batch, before: np.ndarray) -> np.ndarray:
    """The discounted sum of an episode's rewards after each input, f64[B, L + 1]."""
    inputs, found = parts.all_inputs(batch), np.zeros(batch.rows.valid.shape + np.array([0, 1]))
    for b in range(len(found)):
        so_far = float(before[b])
        for t in range(found.shape[1]):
            reward = float(inputs.prev_reward[b, t])
            reward = min(1, max(-1, reward)) if agent.reward == "clip" else reward
            so_far = 0.0 if inputs.first[b, t] else agent.discount * so_far + reward
            found[b, t] = so_far
    return found


def with_rewards(batch: Batch) -> Batch:
    """The batch, whose inputs have the rewards of the rows before them."""
    rows, inputs = batch.rows, parts.all_inputs(batch)
    previous = inputs.prev_reward.copy()
    previous[:, 1:] = np.where(inputs.first[:, 1:], 0, rows.reward)
    inputs = dataclasses.replace(inputs, prev_reward=previous)
    own = trees.tree_map(lambda x: x[:, :-1], inputs)
    return dataclasses.replace(
        batch,
        rows=dataclasses.replace(rows, inputs=own),
        next=trees.tree_map(lambda x: x[:, -1], inputs),
    )


def assert_moments(moments: Moments, x: np.ndarray) -> None:
    assert moments.count == len(x)
    np.testing.assert_allclose(moments.mean, x.mean(axis=0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(moments.spread, len(x) * x.var(axis=0), rtol=1e-4)


@pytest.mark.parametrize("devices", [1, 2])
def test_valid_trained_rows_are_observed_by_all_devices(devices):
    agent = made(reward="clip")
    batch = with_rewards(small.batch(agent, 8))
    state, valid = parts.random_state(agent), batch.rows.valid[:, agent.burn_in :]
    if devices == 1:
        _, _, after = jax.jit(partial(read, agent))(state, batch)
    else:
        shares = jax.tree.map(lambda x: x.reshape(2, 4, *x.shape[1:]), batch)
        own = partial(read, agent, axis_name="devices")
        run = jax.vmap(own, in_axes=(None, 0), axis_name="devices")
        after = jax.tree.map(lambda x: x[1], jax.jit(run)(state, shares)[2])
    seen = batch.rows.inputs.observation["observation"][:, agent.burn_in :][valid]
    assert list(after[normalizing.OBSERVATION]) == ["observation"]  # not the mask
    assert_moments(after[normalizing.OBSERVATION]["observation"], seen.astype(float))
    returns = loop_returns(agent, batch, batch.carry.core[normalizing.RETURN])
    returns = returns[:, agent.burn_in + 1 :][valid]
    assert_moments(after[normalizing.RETURN], returns)


def test_running_returns_go_on_over_the_borders_of_blocks():
    """Acting on two blocks, a row at a time, carries what the learner reads the second one from."""
    agent = made(burn_in=0)
    long = with_rewards(small.batch(dataclasses.replace(agent, unroll=10), 4))
    state = parts.random_state(agent)
    params, act = agent.acting_params(state), jax.jit(agent.act)
    carry = agent.initial_carry(4)
    np.testing.assert_array_equal(carry.core[normalizing.RETURN], 0)
    returns = loop_returns(agent, long, np.zeros(4))
    for t in range(10):
        if t == 5:
            border = carry
        row = trees.tree_map(lambda x, t=t: x[:, t], long.rows.inputs)
        _, _, carry = act(params, row, carry, jax.random.PRNGKey(t), np.ones(4, np.float32))
        np.testing.assert_allclose(carry.core[normalizing.RETURN], returns[:, t], rtol=1e-5)
    second = dataclasses.replace(
        long, rows=trees.tree_map(lambda x: x[:, 5:], long.rows), carry=border
    )
    _, _, after = jax.jit(partial(read, agent))(state, second)
    valid = second.rows.valid
    assert_moments(after[normalizing.RETURN], returns[:, 6:][valid])


def test_a_batch_is_read_by_the_statistics_of_before_it():
    agent = made()
    state, batch = parts.random_state(agent), with_rewards(small.batch(agent, 8))
    before = {
        normalizing.OBSERVATION: {
            "observation": moments(np.asarray([1.0, -2.0, 0.5]), np.asarray([4.0, 9.0, 0.25]))
        },
        normalizing.RETURN: moments(np.asarray(7.0), np.asarray(16.0)),
    }
    state = dataclasses.replace(state, statistics=before)
    assert set(agent.acting_params(state)["statistics"]) == set(before)
    learnt, reward, after = jax.jit(partial(read, agent))(state, batch)
    inputs = parts.all_inputs(batch)
    x = inputs.observation["observation"]
    scaled = (x - np.asarray([1, -2, 0.5])) / np.asarray([2, 3, 0.5])
    got = np.swapaxes(learnt.observation["observation"], 0, 1)
    np.testing.assert_allclose(got, np.clip(scaled, -10, 10), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(
        np.swapaxes(learnt.observation["mask"], 0, 1), inputs.observation["mask"]
    )
    np.testing.assert_allclose(learnt.prev_reward.T, inputs.prev_reward / 4, rtol=1e-5)
    # A reward that is learnt is scaled by all returns so far, as in gym; its mean stays.
    now = after[normalizing.RETURN]
    deviation = np.sqrt(float(now.spread) / float(now.count))
    own = batch.rows.reward[:, agent.burn_in :].T
    np.testing.assert_allclose(reward, np.clip(own / deviation, -10, 10), rtol=1e-4)


def moments(mean: np.ndarray, variance: np.ndarray) -> Moments:
    """The moments of 1000 rows."""
    return Moments(
        count=jnp.float32(1000), mean=jnp.float32(mean), spread=jnp.float32(1000 * variance)
    )


def test_nothing_is_kept_where_nothing_is_normalised():
    agent = made(normalize_observation=False, normalize_reward=False)
    state, batch = parts.random_state(agent), small.batch(agent, 4)
    assert state.statistics == {}
    assert agent.initial_carry(4).core == ()
    _, reward, after = read(agent, state, batch)
    assert after == {}
    np.testing.assert_array_equal(reward, batch.rows.reward[:, agent.burn_in :].T)


def test_images_and_whole_numbers_are_not_normalised():
    leaves = {
        "image": ArraySpec(shape=(1, 84, 84), dtype="float32"),
        "count": ArraySpec(shape=(), dtype="int32"),
        "real": ArraySpec(shape=(2,), dtype="float32"),
        "mask": ArraySpec(shape=(4,), dtype="float32"),
    }
    spec = dataclasses.replace(parts.MASKED, observation=leaves)
    assert normalizing.real_leaves(spec) == ["real"]
