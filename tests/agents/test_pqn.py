"""PQN's targets, loss and gradients equal float64 loops over the rows, ends and masks included."""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlx import trees
from rlx.agents import common
from rlx.agents.normalizing import OBSERVATION
from rlx.agents.pqn import PQN
from rlx.agents.running import Moments
from rlx.networks.heads import Dueling, Plain
from rlx.types import Batch
from tests import parts
from tests.agents import actor_critics as small

pytestmark = pytest.mark.usefixtures("quickly_compiled")


def made(net: Any, **changes: Any) -> PQN:
    settings: dict[str, Any] = {
        "burn_in": 3,
        "unroll": 5,
        "epochs": 2,
        "minibatches": 4,
        "discount": 0.9,
        "return_lambda": 0.65,
        "rescale_epsilon": None,
        "reward": "raw",
        "normalize_observation": False,
        "head": Plain(hidden=None, noise=None),
        "optimizer": small.Plainly(),
        "network": net,
        "spec": net.spec,
    }
    return PQN(**settings | changes)


def whole(agent: PQN, state: Any, batch: Batch, params: Any) -> Any:
    """((loss, metrics), gradients, targets) of epochs that have come to these parameters."""
    inputs, core = common.stacked_inputs(
        agent.network, batch, reward=agent.reward, stored_state=True
    )
    learnt, told = agent.learnt(state.params, inputs, core, batch, None)

    def loss(params: Any) -> Any:
        total, metrics = agent.loss(params, learnt, core, None)
        return total, {**told, **metrics}

    return *jax.value_and_grad(loss, has_aux=True)(params), learnt.target


def taken(agent: PQN, params: Any, batch: Batch, weights: Any) -> Any:
    """(the sum of the taken actions' Q so weighted, every Q [T + 1, B, A]), in JAX."""
    inputs = common.transform_inputs(common.batch_inputs(batch), agent.reward)
    _, carry = agent.network.apply(
        jax.lax.stop_gradient(params), common.window(inputs, 0, agent.burn_in), batch.carry
    )
    after = common.window(inputs, agent.burn_in, None)
    q = agent.network.read(params, "head", agent.head, agent.network.apply(params, after, carry)[0])
    action = batch.rows.action.T[agent.burn_in :]
    return (weights[..., None] * jax.nn.one_hot(action, q.shape[-1]) * q[:-1]).sum(), q


def targets(agent: PQN, q: np.ndarray, batch: Batch) -> np.ndarray:
    """Lambda returns of the greedy values by their definition, f64[T, B]."""
    rows, inputs = batch.rows, parts.all_inputs(batch)
    valid, discount, reward = (
        np.asarray(x.T[agent.burn_in :], float) for x in (rows.valid, rows.discount, rows.reward)
    )
    mask = common.allowed(inputs, agent.spec)
    if mask is not None:
        q = np.where(np.swapaxes(np.asarray(mask), 0, 1)[agent.burn_in :], q, -np.inf)
    value = np.vectorize(partial(small.inverse, epsilon=agent.rescale_epsilon))(q.max(axis=-1))
    found, length = value[:-1].copy(), len(valid)
    for t, b in itertools.product(range(length), range(valid.shape[1])):
        k, factor = t, 1.0
        while k < length and valid[k, b]:
            r = np.clip(reward[k, b], -1, 1) if agent.reward == "clip" else reward[k, b]
            follows = agent.discount * discount[k, b]
            found[t, b] += factor * (r + follows * value[k + 1, b] - value[k, b])
            factor *= agent.return_lambda * follows
            k += 1
    return np.vectorize(partial(small.h, epsilon=agent.rescale_epsilon))(found)


@pytest.mark.parametrize(
    ("spec", "core", "changes"),
    [
        (parts.MASKED, "lstm", {}),
        (parts.VECTOR, "none", {"rescale_epsilon": 1e-2, "reward": "clip"}),
    ],
)
def test_loss_and_gradients_equal_the_float64_oracle(spec, core, changes):
    agent = made(parts.network(spec, core), **changes)
    state, batch = parts.random_state(agent), small.batch(agent, 8)
    params = small.other_state(agent).params
    (loss, told), grads, target = jax.jit(partial(whole, agent))(state, batch, params)
    chained = jax.jit(jax.grad(partial(taken, agent), has_aux=True))
    nothing = jnp.zeros((agent.unroll, 8))
    first, now = (np.asarray(chained(p, batch, nothing)[1], float) for p in (state.params, params))
    known, valid = targets(agent, first, batch), batch.rows.valid.T[agent.burn_in :]
    np.testing.assert_allclose(np.asarray(target)[valid], known[valid], rtol=1e-4, atol=1e-4)
    action = batch.rows.action.T[agent.burn_in :]
    error = np.take_along_axis(now[:-1], action[..., None], -1)[..., 0] - known
    assert 0.5 < valid.mean() < 1
    assert loss == pytest.approx(np.square(error[valid]).mean() / 2, rel=1e-4)
    assert told["learner/td_mean"] == pytest.approx(np.abs(error[valid]).mean(), rel=1e-4)
    drift = np.abs(np.take_along_axis(first[0], action[0][:, None], -1)[:, 0])[valid[0]]
    assert told["learner/q_drift"] == pytest.approx(drift.mean(), rel=1e-4)
    weights = jnp.asarray(np.where(valid, error, 0) / valid.sum(), jnp.float32)
    by_chain = chained(params, batch, weights)[0]
    scale = small.norm(by_chain)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=3e-4 * scale), grads, by_chain
    )


def test_nothing_of_the_next_episode_reaches_a_return():
    agent = made(parts.network(core="none"), burn_in=0)
    state, batch = parts.random_state(agent), small.batch(agent, 8)
    rows = batch.rows
    valid, first = np.ones((2, 8, 5), bool)
    valid[:, 2], first[:] = False, np.arange(5) == 3
    discount = np.where(valid, 1, 0).astype(np.float32)
    discount[:4, 1] = 0  # terminated; the others are truncated
    inputs = dataclasses.replace(rows.inputs, first=first)
    rows = dataclasses.replace(rows, inputs=inputs, valid=valid, discount=discount)
    batch, told = dataclasses.replace(batch, rows=rows), jax.jit(partial(whole, agent))

    def moved(t: int) -> Any:
        """The targets where the observation of row t is another one."""
        leaf = inputs.observation["observation"].copy()
        leaf[:, t] += 3
        other = dataclasses.replace(inputs, observation={"observation": leaf})
        changed = dataclasses.replace(batch, rows=dataclasses.replace(rows, inputs=other))
        return np.asarray(told(state, changed, state.params)[2])

    before, later, last = moved(4), moved(3), moved(2)
    np.testing.assert_array_equal(before[:2], later[:2])
    np.testing.assert_array_equal(before[:2, :4], last[:2, :4])  # terminated
    assert (before[:2, 4:] != last[:2, 4:]).all()


@pytest.mark.parametrize("devices", [1, 2])
def test_learner_and_actor_read_observations_by_the_statistics_of_before(devices):
    """Another agent normalises nothing and is given observations that are scaled by hand."""
    net = parts.network(parts.MASKED, "none")
    agent = made(net, normalize_observation=True, epochs=1, minibatches=1)
    plain = dataclasses.replace(agent, normalize_observation=False)
    mean, deviation = np.float32([1.0, -2.0, 0.5]), np.float32([2.0, 3.0, 0.5])
    moments = Moments(
        count=jnp.float32(1000), mean=mean, spread=np.float32(1000 * deviation.astype(float) ** 2)
    )
    state, batch = parts.random_state(plain), small.batch(agent, 8)
    scaling = dataclasses.replace(state, statistics={OBSERVATION: {"observation": moments}})

    def by_hand(inputs: Any) -> Any:
        seen = inputs.observation
        x = np.clip((seen["observation"] - mean) / deviation, -10, 10).astype(np.float32)
        return dataclasses.replace(inputs, observation={**seen, "observation": x})

    scaled = dataclasses.replace(
        batch,
        rows=dataclasses.replace(batch.rows, inputs=by_hand(batch.rows.inputs)),
        next=by_hand(batch.next),
    )
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    known, _ = jax.jit(plain.update)(state, scaled)
    if devices == 1:
        found, _ = jax.jit(agent.update)(scaling, batch)
    else:
        shares = jax.tree.map(lambda x: x.reshape(2, 4, *x.shape[1:]), batch)
        update = partial(agent.update, axis_name="devices")
        run = jax.vmap(update, in_axes=(None, 0), axis_name="devices")
        found = jax.tree.map(lambda x: x[1], jax.jit(run)(scaling, shares)[0])
    jax.tree.map(close, found.params, known.params)
    after = found.statistics[OBSERVATION]["observation"]
    rows = batch.rows.inputs.observation["observation"][:, agent.burn_in :]
    rows = rows[batch.rows.valid[:, agent.burn_in :]]
    assert after.count == 1000 + len(rows)
    close(after.mean, (1000 * mean + rows.sum(axis=0)) / (1000 + len(rows)))
    inputs = trees.tree_map(lambda x: x[:, 0], batch.rows.inputs)
    rest = (agent.initial_carry(8), jax.random.PRNGKey(3), np.zeros(8, np.float32))
    acted = jax.jit(agent.act)(agent.acting_params(scaling), inputs, *rest)
    expected = jax.jit(plain.act)(plain.acting_params(state), by_hand(inputs), *rest)
    jax.tree.map(close, acted, expected)
    valued = agent.values(agent.acting_params(scaling), inputs, rest[0])
    jax.tree.map(close, valued, plain.values(plain.acting_params(state), by_hand(inputs), rest[0]))


def test_epochs_of_minibatches_are_made():
    agent = made(parts.network(parts.MASKED, "none"), unroll=6)
    agent.check_share(2)
    state, batch = parts.random_state(agent), small.batch(agent, 4)
    after, output = jax.jit(agent.update)(state, batch)
    assert int(after.gradient_steps) == output.metrics["learner/steps_of_update"] == 8
    assert output.priorities is None
    with pytest.raises(ValueError, match="explores by epsilon"):
        made(parts.network(), head=Dueling(hidden=8, noise=0.5))
    with pytest.raises(ValueError, match="discrete action spaces"):
        made(parts.network(parts.BOX))
