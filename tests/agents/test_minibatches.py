"""Epochs of minibatches: each row once, sequences whole with their state, and the early stop."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlx import trees
from rlx.agents import minibatches
from rlx.agents.ppo import PPO
from rlx.types import TrainState, record
from tests import parts
from tests.agents import actor_critics as small

pytestmark = pytest.mark.usefixtures("quickly_compiled")

ROWS, SIZE = 3, 8  # T, B
BASE = 16  # above the minibatches of an epoch


@record
class Given:
    """Rows of the toy problem."""

    number: Any  # i32[T, B]


trees.register()


def toy(count: int) -> Any:
    """A loss by whose gradient each row writes down in which minibatch of each epoch it was.

    Epoch e adds (1 + its place) * BASE^e to the row's own number; `steps` grows by 1 a step.
    """

    def loss(params: Any, rows: Given, core: Any, key: Any) -> Any:
        step = jax.lax.stop_gradient(params["steps"])
        epoch, place = jnp.floor(step / count), step % count
        own = params["places"].reshape(-1)[rows.number.reshape(-1)]
        total = -((1 + place) * BASE**epoch) * own.sum() - params["steps"]
        draw = jax.random.uniform(key)
        told = {minibatches.KL: step, "draw": draw, "squared": draw**2}
        if core:
            own = core["block"][None]
            told["foreign"] = jnp.abs(rows.number // ROWS - own).sum().astype(jnp.float32)
            total -= params["blocks"][core["block"]].sum()
        return total, told

    return loss


def state() -> TrainState:
    params = {
        "places": jnp.zeros(ROWS * SIZE),
        "steps": jnp.zeros(()),
        "blocks": jnp.zeros(SIZE),
    }
    return TrainState(
        params=params,
        target_params=(),
        opt_state=small.Plainly().build().init(params),
        statistics={},
        updates=jnp.zeros((), jnp.int32),
        gradient_steps=jnp.zeros((), jnp.int32),
        key=jax.random.PRNGKey(3),
    )


def learn(epochs: int, count: int, numbers: Any, core: Any = (), **further: Any) -> Any:
    rows, recurrent = Given(number=jnp.asarray(numbers)), core != ()
    settings = {"epochs": epochs, "minibatches": count, "is_recurrent": recurrent, **further}
    return minibatches.learn(toy(count), small.Plainly(), state(), rows, core, **settings)


def orders(after: TrainState, epochs: int, numbers: np.ndarray) -> np.ndarray:
    """The minibatch of each row, from 1, in each epoch: i[epochs, T, B]; 0: in none."""
    written = np.asarray(after.params["places"])[numbers].astype(np.int64)
    return np.stack([written // BASE**e % BASE for e in range(epochs)])


@pytest.mark.parametrize("count", [1, 4, 12])
def test_each_row_is_in_one_minibatch_of_each_epoch(count):
    numbers = np.arange(ROWS * SIZE).reshape(ROWS, SIZE)
    after, output = learn(3, count, numbers)
    found = orders(after, 3, numbers)
    for epoch in found:
        counts = np.bincount(epoch.ravel(), minlength=count + 1)
        assert counts.tolist() == [0] + [ROWS * SIZE // count] * count
    if count > 1:
        assert not np.array_equal(found[0], found[1])
        assert not np.array_equal(found[1], found[2])
        assert len(set(found[0][:, 0].tolist())) + len(set(found[0][0].tolist())) > 2
    assert float(after.params["steps"]) == int(after.gradient_steps) == 3 * count
    assert int(after.updates) == 1
    assert output.metrics["learner/steps_of_update"] == 3 * count
    assert output.metrics[minibatches.KL] == pytest.approx((3 * count - 1) / 2)  # their mean
    assert not np.array_equal(after.key, state().key)
    spread = output.metrics["squared"] - output.metrics["draw"] ** 2
    assert spread > 1e-3  # each has a key of its own


@pytest.mark.parametrize("count", [1, 4])
def test_sequences_of_a_recurrent_network_stay_whole_and_with_their_state(count):
    numbers = ROWS * np.arange(SIZE)[None] + np.arange(ROWS)[:, None]
    after, output = learn(2, count, numbers, core={"block": jnp.arange(SIZE)})
    found = orders(after, 2, numbers)
    assert (found == found[:, :1]).all()
    for epoch in found[:, 0]:
        assert np.bincount(epoch).tolist() == [0] + [SIZE // count] * count
    assert output.metrics["foreign"] == 0
    np.testing.assert_array_equal(after.params["blocks"], 2)


def test_epochs_stop_at_the_first_minibatch_that_is_too_far():
    """Its KL is 0, 1, 2, ...: three are made, the fourth is only computed."""
    numbers = np.arange(ROWS * SIZE).reshape(ROWS, SIZE)
    whole, _ = learn(3, 4, numbers)
    after, output = learn(3, 4, numbers, most_kl=2.5)
    assert float(after.params["steps"]) == int(after.gradient_steps) == 3
    assert output.metrics["learner/steps_of_update"] == 3
    assert output.metrics[minibatches.KL] == pytest.approx(1.5)  # of the four that were computed
    assert after.opt_state[1].count == 3
    found = orders(after, 3, numbers)
    first = orders(whole, 3, numbers)[0]
    np.testing.assert_array_equal(found[0], np.where(first <= 3, first, 0))
    assert not found[1:].any()
    never, output = learn(3, 4, numbers, most_kl=11.0)
    assert float(never.params["steps"]) == int(never.gradient_steps) == 12
    np.testing.assert_array_equal(never.params["places"], whole.params["places"])


def test_each_device_shuffles_its_own_share_and_all_step_together():
    numbers = np.arange(ROWS * SIZE).reshape(ROWS, SIZE)

    def run(numbers: Any) -> Any:
        after, _ = learn(1, 4, numbers, axis_name="devices")
        return after

    halves = jnp.asarray(np.stack([numbers[:, :4], numbers[:, 4:]]))
    after = jax.vmap(run, axis_name="devices")(halves)
    for leaf in jax.tree.leaves(after.params):
        np.testing.assert_array_equal(leaf[0], leaf[1])
    found = 2 * np.asarray(after.params["places"][0])[numbers]  # a mean over the two
    assert sorted(found[:, :4].ravel()) == sorted(found[:, 4:].ravel()) == sorted([1, 2, 3, 4] * 3)
    assert not np.array_equal(found[:, :4], found[:, 4:])


def test_ppo_makes_as_many_steps_as_it_is_set_to_and_stops_by_its_own_kl():
    """A network without memory shuffles rows, whose burn-in it does not need."""
    settings = {
        "epochs": 2,
        "minibatches": 4,
        "unroll": 6,
        "optimizer": parts.adam(learning_rate=0.1),
    }
    agent = small.made(PPO, parts.network(parts.MASKED, "none"), **settings)
    batch, before = small.batch(agent, 8), parts.random_state(agent)
    batch = small.with_acting(batch, np.full(batch.rows.valid.shape, -1.0))
    after, output = jax.jit(agent.update)(before, batch)
    assert int(after.gradient_steps) == 8
    assert output.metrics["learner/steps_of_update"] == 8
    assert output.metrics[minibatches.KL] > 0.02
    stopping = dataclasses.replace(agent, most_kl=0.02)
    after, output = jax.jit(stopping.update)(before, batch)
    assert int(after.gradient_steps) == output.metrics["learner/steps_of_update"] == 0
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)


def test_minibatches_must_divide_what_a_device_has():
    settings = {"epochs": 1, "minibatches": 4, "unroll": 6}
    agent = small.made(PPO, parts.network(core="none"), **settings)
    agent.check_share(2)  # 12 rows
    with pytest.raises(ValueError, match="does not divide the 6 rows"):
        agent.check_share(1)
    recurrent = small.made(PPO, **settings)
    recurrent.check_share(4)
    with pytest.raises(ValueError, match="does not divide the 2 blocks"):
        recurrent.check_share(2)
    with pytest.raises(ValueError, match="one gradient step only"):
        small.made(PPO, most_kl=0.01)
