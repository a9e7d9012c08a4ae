"""`network.time`: the number of env steps since the episode began, at acting time and replayed."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from flax import traverse_util

import rlx
from rlx import trees
from rlx.envs.gymnasium import Gymnasium
from rlx.types import Weights
from tests import parts
from tests.acting.test_keystone import (
    change_inputs,
    difference,
    make_pool,
    make_replay,
    shifted,
)
from tests.conftest import SMALL
from tests.envs.test_gymnasium import family
from tests.test_load import evaluated, play, player

# Episodes of 3, 4, 5, 3, ... env steps in blocks of four rows: resets come at every row. It shows
# (the episode's number, env steps in it), which is the oracle.
ENDS = family("tests.worlds:rlx-test/Ends-v0")
SCALE = 0.25
CORES = [("lstm", 4), ("gru", 8), ("none", 4), ("none", 1)]


def sampled(core: str, stride: int, observed: Gymnasium = ENDS) -> tuple[Any, Any, Any]:
    """(agent, params, batch) after a ring has wrapped around and lanes have begun new chains."""
    spec = observed.spec()
    torso = parts.mlp(8)
    net = parts.network(spec, core, torso=torso, time=True, time_scale=SCALE)
    agent = parts.agent(net, burn_in=4, unroll=6, n_step=3, stride=stride, block_rows=4)
    params = jax.tree.map(np.asarray, agent.init(jax.random.PRNGKey(0)).params)
    pool, replay = make_pool(observed, agent), make_replay(agent, 3)
    for turn in range(14):
        if turn in (0, 5, 9):
            if turn:
                pool.reopen()
            pool.publish(Weights(version=0, params=params), 0)
        for rollout in pool.collect(60.0, 0):
            replay.add(rollout)
    pool.close(10.0)
    assert replay.env_steps > replay.rows  # wrapped around
    return agent, params, replay.sample(128).batch


@pytest.mark.parametrize(("core", "stride"), CORES)
def test_time_is_the_env_step_of_the_episode_in_every_row(core, stride):
    agent, params, batch = sampled(core, stride)
    inputs = trees.tree_map(np.asarray, batch.rows.inputs)
    np.testing.assert_array_equal(inputs.time, inputs.observation["observation"][..., 1])
    following = trees.tree_map(np.asarray, batch.next)
    np.testing.assert_array_equal(following.time, following.observation["observation"][..., 1])
    assert inputs.first.any(axis=0).all()  # a reset at every position of a sequence
    assert set(inputs.time[:, 0].tolist()) >= {0, 1, 2, 3}  # starts within episodes
    assert difference(agent, params, batch) < 1e-4  # what the learner reads is what acting read
    wrong = change_inputs(time=shifted)(batch)
    assert difference(agent, params, wrong) > 1e-3


def test_the_core_reads_the_scaled_time_and_without_it_the_same_bits():
    spec = ENDS.spec()
    timed = parts.network(spec, "none", time=True, time_scale=SCALE)
    plain = parts.network(spec, "none")
    inputs = parts.inputs(spec, 1, 5, rng=np.random.default_rng(0))
    inputs = dataclasses.replace(inputs, time=np.array([[0, 1, 2, 40, 7]], np.int32))
    params = parts.init(timed, jax.random.PRNGKey(1))
    flat = traverse_util.flatten_dict(params)
    kernel = next(name for name in flat if name[0] == "core" and name[-1] == "kernel")
    last, bias = np.asarray(flat[kernel])[-1], (*kernel[:-1], "bias")
    features, _ = timed.apply(params, inputs, timed.initial_carry(5))
    for lane, time in enumerate([0, 1, 2, 40, 7]):
        # A dense layer reads a number by adding so many times the weights' last row to its bias.
        changed = flat | {
            kernel: flat[kernel][:-1],
            bias: np.asarray(flat[bias]) + np.float32(time * SCALE) * last,
        }
        same, _ = plain.apply(traverse_util.unflatten_dict(changed), inputs, plain.initial_carry(5))
        np.testing.assert_allclose(features[0, lane], same[0, lane], rtol=1e-5, atol=1e-6)
    later = dataclasses.replace(inputs, time=inputs.time + 3)
    params = parts.init(plain, jax.random.PRNGKey(1))
    a, b = (plain.apply(params, x, plain.initial_carry(5))[0] for x in (inputs, later))
    np.testing.assert_array_equal(a, b)


def test_a_player_and_an_evaluation_count_alike():
    cartpole = family("CartPole-v1", max_episode_steps=60)
    act = player(cartpole, time=True, time_scale=SCALE)
    env = cartpole.open()
    seeds = [rlx.seeding.spawn_int(3, "evaluation", lane) for lane in range(2)]
    mine = [play(lambda o, s, reward: act.act(o, s, reward=reward), env, s) for s in seeds]
    assert mine == evaluated(act, cartpole, lanes=2)
    other = player(cartpole, time=True, time_scale=1e-9)
    assert mine != evaluated(other, cartpole, lanes=2)


@pytest.mark.parametrize(
    "more",
    [
        # Without a core, time takes the same way into the network.
        pytest.param(["agent=dqn", "network=mlp", "replay=uniform"], marks=pytest.mark.slow),
        ["network.core.units=8"],
    ],
)
def test_a_run_with_time_is_trained_resumed_and_loaded(tmp_path, more):
    small = [x for x in SMALL if "dqn" not in more[0] or "burn_in" not in x]
    settings = [*more, *small, "network.time=true", "network.time_scale=0.01"]
    rlx.run(rlx.compose(settings), tmp_path)
    again = [*settings, "total_env_steps=700", f"resume={tmp_path}"]
    summary = rlx.run(rlx.compose(again), tmp_path)
    assert summary["state"] == "finished"
    assert rlx.load(tmp_path).evaluate(episodes=1, envs=1)["returns"]
