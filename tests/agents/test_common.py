"""Tests of what agents share, each function by itself."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlx.agents import common, targets
from rlx.types import ArraySpec, MultiDiscreteSpec
from tests import parts

N = 20_000


def spread(p: float) -> float:
    """Five standard deviations of a share of N draws."""
    return 5 * np.sqrt(p * (1 - p) / N)


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_epsilon_greedy_takes_random_actions_as_often_as_asked(epsilon):
    q = jnp.tile(jnp.asarray([0.0, 2.0, 1.0, -1.0]), (N, 1))
    action = common.epsilon_greedy(jax.random.PRNGKey(0), q, jnp.full(N, epsilon))
    assert action.dtype == jnp.int32
    found = np.bincount(action, minlength=4) / N
    expected = np.full(4, epsilon / 4) + np.eye(4)[1] * (1 - epsilon)
    for share, want in zip(found, expected, strict=True):
        assert abs(share - want) <= spread(want)


def test_epsilon_is_each_lanes_own():
    q, epsilon = jnp.tile(jnp.asarray([0.0, 1.0]), (N, 1)), jnp.arange(N) % 2 * 1.0
    action = np.asarray(common.epsilon_greedy(jax.random.PRNGKey(0), q, epsilon))
    assert (action[::2] == 1).all()
    assert abs(action[1::2].mean() - 0.5) < 2 * spread(0.5)


def test_random_actions_are_drawn_evenly_from_those_allowed():
    q = jnp.tile(jnp.asarray([0.0, 2.0, 1.0, -1.0]), (N, 1))
    mask = jnp.tile(jnp.asarray([True, False, True, False]), (N, 1))
    action = common.epsilon_greedy(jax.random.PRNGKey(0), q, jnp.ones(N), mask)
    found = np.bincount(action, minlength=4) / N
    assert found[[1, 3]].sum() == 0
    assert abs(found[0] - 0.5) < spread(0.5)
    greedy = common.epsilon_greedy(jax.random.PRNGKey(0), q, jnp.zeros(N), mask)
    assert (np.asarray(greedy) == 2).all()


def test_each_choice_of_which_a_mask_allows_nothing_is_allowed_as_a_whole():
    spec = dataclasses.replace(
        parts.VECTOR, action=MultiDiscreteSpec(counts=(2, 3)), action_mask="can"
    )
    can = jnp.asarray([[1, 0, 0, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0], [0, 1, 1, 0, 1]])
    inputs = dataclasses.replace(
        parts.inputs(parts.VECTOR, 4, rng=np.random.default_rng(0)), observation={"can": can}
    )
    known = [[1, 0, 1, 1, 1], [1, 1, 0, 1, 0], [1, 1, 1, 1, 1], [0, 1, 1, 0, 1]]
    np.testing.assert_array_equal(common.allowed(inputs, spec), np.asarray(known, bool))


def test_where_a_mask_allows_nothing_all_is_allowed():
    spec = dataclasses.replace(
        parts.VECTOR,
        observation={**parts.VECTOR.observation, "can": ArraySpec(shape=(4,), dtype="int8")},
        action_mask="can",
    )
    inputs = parts.inputs(spec, 2, rng=np.random.default_rng(0))
    can = np.asarray([[0, 1, 0, 1], [0, 0, 0, 0]], np.int8)
    inputs = dataclasses.replace(inputs, observation={**inputs.observation, "can": can})
    mask = common.allowed(inputs, spec)
    np.testing.assert_array_equal(mask, [[False, True, False, True], [True] * 4])
    assert common.allowed(inputs, parts.VECTOR) is None


def test_masked_values_are_the_least_that_there_are():
    q = jnp.asarray([[1.0, -3.0]])
    assert common.masked(q, None) is q
    masked = common.masked(q, jnp.asarray([[False, True]]))
    np.testing.assert_array_equal(masked, [[jnp.finfo(jnp.float32).min, -3.0]])


def test_batch_inputs_end_with_the_input_after_the_last_row():
    agent = parts.agent()
    batch = parts.batch(agent, 5)
    inputs = common.batch_inputs(batch)
    assert inputs.first.shape == (agent.sequence.length + 1, 5)
    np.testing.assert_array_equal(inputs.prev_action[-1], batch.next.prev_action)
    np.testing.assert_array_equal(inputs.prev_reward[:-1], batch.rows.inputs.prev_reward.T)


def test_a_soft_target_goes_its_rate_of_the_way():
    params, target = {"a": jnp.ones(3), "b": jnp.zeros(2)}, {"a": jnp.zeros(3), "b": jnp.ones(2)}
    moved = common.soft_target(params, target, 0.25)
    np.testing.assert_allclose(moved["a"], 0.25)
    np.testing.assert_allclose(moved["b"], 0.75)
    np.testing.assert_array_equal(common.soft_target(params, target, 1.0)["a"], params["a"])


def test_a_hard_target_is_a_copy_where_it_is_due_and_stays_else():
    params, target = {"a": jnp.ones(3)}, {"a": jnp.zeros(3)}
    seen = [common.hard_target(params, target, jnp.asarray(due))["a"][0] for due in (True, False)]
    assert seen == [1, 0]


def quadratic(params):
    return jnp.square(params["w"] - 3.0).sum(), (None, {"learner/mean": params["w"].mean()})


def test_a_gradient_step_counts_itself_and_leaves_the_target():
    optimizer = optax.sgd(0.25)
    params = {"w": jnp.zeros(2)}
    state = common.new_state(params, optimizer, jax.random.PRNGKey(0), target_params=params)
    after, output = common.gradient_step(quadratic, optimizer, state, None)
    np.testing.assert_allclose(after.params["w"], 1.5)  # 0 - 0.25 * 2 (0 - 3)
    assert (int(after.updates), int(after.gradient_steps)) == (1, 1)
    np.testing.assert_array_equal(after.target_params["w"], 0)
    assert output.priorities is None
    assert float(output.metrics["learner/loss"]) == 18
    np.testing.assert_allclose(output.metrics["learner/grad_norm"], np.sqrt(72))


def test_gradients_are_those_of_all_devices_together():
    data = jnp.asarray([[1.0, 2.0], [3.0, 6.0]])

    def grads(x):
        def loss(w):
            return jnp.mean(w * x), ()

        return common.gradients(loss, jnp.ones(()), "devices")

    gradient, value, _ = jax.vmap(grads, axis_name="devices")(data)
    np.testing.assert_allclose(gradient, [3.0, 3.0])
    np.testing.assert_allclose(value, [3.0, 3.0])


def test_a_state_without_targets_or_statistics_has_none():
    state = common.new_state({"w": jnp.zeros(2)}, optax.sgd(1.0), jax.random.PRNGKey(0))
    assert state.target_params == ()
    assert state.statistics == {}


def test_losses_of_a_sequence_are_of_its_valid_rows():
    losses = jnp.asarray([[1.0, 2.0], [3.0, 100.0], [5.0, 100.0]])  # [T, B]
    valid = jnp.asarray([[True, True], [True, False], [True, False]])
    np.testing.assert_allclose(targets.per_sequence(losses, valid, "mean"), [3.0, 2.0])
    np.testing.assert_allclose(targets.per_sequence(losses, valid, "sum"), [9.0, 2.0])
    nothing = jnp.zeros((3, 2), bool)
    np.testing.assert_array_equal(targets.per_sequence(losses, nothing, "mean"), [0.0, 0.0])


def test_row_priorities_are_absolute_and_minus_one_where_not_valid():
    td = jnp.asarray([[-2.0, 1.0], [0.5, 7.0]])
    valid = jnp.asarray([[True, True], [True, False]])
    np.testing.assert_array_equal(targets.row_priorities(td, valid), [[2.0, 0.5], [1.0, -1.0]])


def test_drift_counts_only_first_rows_that_are_valid():
    rows = common.time_major(parts.batch(parts.agent(), 3).rows)
    valid = rows.valid.at[0].set(jnp.asarray([True, False, False]))
    rows = dataclasses.replace(rows, valid=valid)
    taken = jnp.asarray(rows.acting.q) + jnp.asarray([2.0, 30.0, 400.0])[None]
    metrics = targets.value_metrics(taken, jnp.zeros_like(taken), rows)
    assert metrics["learner/td_mean"] == 0
    np.testing.assert_allclose(metrics["learner/q_drift"], 2.0, rtol=1e-5)


def test_means_of_an_update_are_of_its_valid_rows():
    rows = common.time_major(parts.batch(parts.agent(), 2).rows)
    rows = dataclasses.replace(rows, valid=jnp.asarray([[True, True], [True, False]]))
    q, td = jnp.asarray([[1.0, 2.0], [6.0, 500.0]]), jnp.asarray([[-2.0, 3.0], [4.0, -700.0]])
    metrics = targets.value_metrics(q, td, rows)
    np.testing.assert_allclose(metrics["learner/q_mean"], 3.0)
    np.testing.assert_allclose(metrics["learner/td_mean"], 3.0)
