"""DQN's errors and loss against the equations in float64, with ends and masks everywhere."""

import dataclasses

import jax
import numpy as np
import pytest

from rlx import trees
from rlx.agents import common, q_learning
from rlx.agents.dqn import DQN
from rlx.types import ArraySpec, Batch, TrainState
from tests import parts

MASKED = dataclasses.replace(
    parts.VECTOR,
    observation={**parts.VECTOR.observation, "mask": ArraySpec(shape=(4,), dtype="uint8")},
    action_mask="mask",
)


def dqn(net=None, **changes) -> DQN:
    net = net or parts.network()
    settings = {
        "burn_in": 0,
        "unroll": 6,
        "n_step": 3,
        "stride": None,
        "block_rows": 4,
        "discount": 0.97,
        "double_q": True,
        "reward": "raw",
        "rescale_epsilon": None,
        "stored_state": True,
        "error": "huber",
        "loss_over_time": "mean",
        "munchausen": None,
        "target_period_updates": 10,
        "target_period_env_steps": None,
        "target_rate": None,
        "head": parts.HEAD,
        "optimizer": parts.adam(),
        "network": net,
        "spec": net.spec,
    }
    return DQN(**settings | changes)


def masked_batch(agent: DQN, size: int) -> Batch:
    """Sequences in which about half of the actions are allowed, in a few rows none."""
    batch, rng = parts.batch(agent, size), np.random.default_rng(3)
    if agent.spec.action_mask is None:
        return batch
    for inputs in (batch.rows.inputs, batch.next):
        mask = inputs.observation["mask"]
        mask[...] = rng.random(mask.shape) < 0.5
    return batch


def q_values(agent: DQN, params, batch: Batch) -> np.ndarray:
    """f64[B, L + 1, A] of an unroll from the stored carry."""
    inputs = common.batch_inputs(batch)
    if agent.reward == "clip":
        inputs = dataclasses.replace(inputs, prev_reward=np.clip(inputs.prev_reward, -1, 1))
    q, _ = parts.q_values(agent, params, inputs, batch.carry)
    return np.swapaxes(np.asarray(q, np.float64), 0, 1)


def oracle(agent: DQN, state: TrainState, batch: Batch) -> np.ndarray:
    """f64[B, T]: r + gamma r' + ... + gamma^k Q'(x, argmax over what is allowed there) - Q."""
    online, target = (q_values(agent, p, batch) for p in (state.params, state.target_params))
    inputs = trees.tree_map(lambda x: np.swapaxes(np.asarray(x), 0, 1), common.batch_inputs(batch))
    rows, td = batch.rows, np.full((len(online), agent.unroll), np.nan)
    for b in range(len(online)):
        for i in range(agent.unroll):
            start = agent.burn_in + i
            if not rows.valid[b, start]:
                continue
            total, factor, t = 0.0, 1.0, start
            while t < start + agent.n_step and rows.valid[b, t]:
                reward = float(rows.reward[b, t])
                total += factor * (np.clip(reward, -1, 1) if agent.reward == "clip" else reward)
                factor *= agent.discount * float(rows.discount[b, t])
                t += 1
            choice = (online if agent.double_q else target)[b, t]
            if agent.spec.action_mask and inputs.observation["mask"][b, t].any():
                choice = np.where(inputs.observation["mask"][b, t], choice, -np.inf)
            td[b, i] = total + factor * target[b, t, np.argmax(choice)]
            td[b, i] -= online[b, start, rows.action[b, start]]
    return td


@pytest.mark.parametrize(
    ("spec", "core", "changes"),
    [
        (parts.VECTOR, "none", {}),
        (parts.VECTOR, "lstm", {"burn_in": 4, "n_step": 1}),
        (parts.VECTOR, "none", {"double_q": False, "reward": "clip", "error": "squared"}),
        (MASKED, "none", {}),
        (MASKED, "lstm", {"double_q": False}),
    ],
)
def test_errors_and_loss_equal_the_float64_oracle(spec, core, changes):
    agent = dqn(parts.network(spec, core), block_rows=1 if core == "none" else 4, **changes)
    batch, state = masked_batch(agent, 16), parts.random_state(agent)
    priorities, told_loss = parts.told(agent, state, batch)
    td = oracle(agent, state, batch)
    valid = ~np.isnan(td)
    assert 0.5 < valid.mean() < 1
    np.testing.assert_allclose(priorities, np.where(valid, abs(td), -1), atol=2e-5)
    size = abs(td)
    loss = 0.5 * td**2 if agent.error == "squared" else np.where(size < 1, td**2 / 2, size - 0.5)
    mean = np.where(valid, loss, 0).sum(axis=1) / np.maximum(1, valid.sum(axis=1))
    np.testing.assert_allclose(told_loss, (batch.importance * mean).mean(), rtol=1e-4)


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 1.0])
def test_no_forbidden_action_is_ever_taken(epsilon):
    agent, rng = dqn(parts.network(MASKED, "none"), block_rows=1), np.random.default_rng(0)
    params, inputs = jax.jit(agent.init)(jax.random.PRNGKey(0)).params, None
    inputs = parts.inputs(MASKED, 4000, rng=rng)
    mask = (rng.random((4000, 4)) < 0.5).astype(np.uint8)
    inputs = dataclasses.replace(inputs, observation={**inputs.observation, "mask": mask})
    key, exploration = jax.random.PRNGKey(1), np.full(4000, epsilon, np.float32)
    action, acting, _ = agent.act(params, inputs, agent.initial_carry(4000), key, exploration)
    free = mask.any(axis=1)
    assert mask[np.arange(4000), action][free].all()
    assert len(set(np.asarray(action)[~free].tolist())) > 1  # where none is allowed all are
    assert (acting.q <= acting.q_max).all()
    if epsilon == 0:
        np.testing.assert_array_equal(acting.q, acting.q_max)


def test_it_has_memory_by_the_network_alone():
    plain, recurrent = dqn(parts.network(core="none"), block_rows=1), dqn()
    assert (plain.sequence.stride, recurrent.sequence.stride) == (1, recurrent.block_rows)
    with pytest.raises(ValueError, match="of a recurrent network start where a carry is stored"):
        dqn(stride=1)
    with pytest.raises(ValueError, match="agent dqn acts in discrete action spaces"):
        dqn(parts.network(parts.BOX))


def test_it_acts_by_values_of_its_own(monkeypatch):
    """An agent whose values have another form writes `expected`, and `act` goes by them."""

    def contrary(agent: DQN, outputs):
        return -outputs

    agent = dqn(parts.network(MASKED))
    batch, state = masked_batch(agent, 32), parts.random_state(agent)
    inputs = trees.tree_map(lambda x: x[:, 0], batch.rows.inputs)
    greedy, key = np.zeros(32, np.float32), jax.random.PRNGKey(0)
    usual, acting, _ = agent.act(state.params, inputs, batch.carry, key, greedy)
    monkeypatch.setattr(DQN, "expected", contrary)
    action, own, _ = agent.act(state.params, inputs, batch.carry, key, greedy)
    assert (np.asarray(action) != np.asarray(usual)).any()
    value = -np.asarray(q_learning.values(agent, state.params, inputs, batch.carry)[0])
    allowed = np.asarray(common.allowed(inputs, agent.spec))
    np.testing.assert_array_equal(action, np.where(allowed, -value, -np.inf).argmax(-1))
    np.testing.assert_allclose(own.q, -np.take_along_axis(value, action[:, None], 1)[:, 0])
    assert (np.asarray(own.q_max) >= own.q).all()
    assert (np.asarray(acting.q) == np.asarray(acting.q_max)).all()
