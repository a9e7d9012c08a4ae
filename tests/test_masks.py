"""Masks of actions: no forbidden one is taken, kept as a maximum, or bootstrapped from."""

from __future__ import annotations

import dataclasses
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import rlx
from rlx import export, trees
from rlx.acting.exploration import Constant
from rlx.acting.local_pool import LocalPool
from rlx.agents.r2d2 import R2D2
from rlx.envs.envpool import EnvPool
from rlx.envs.gymnasium import Gymnasium
from rlx.evaluation.playing import run_episodes
from rlx.types import Batch, QActing, TrainState, Weights
from tests import parts, worlds
from tests.acting.test_keystone import context
from tests.agents.test_r2d2 import h, h_inverse, q_values, scalars_of

pytestmark = pytest.mark.usefixtures("quickly_compiled")

ENV_ID = "tests.worlds:rlx-test/Masked-v0"
MASKED = Gymnasium(
    id=ENV_ID,
    kwargs={},
    vector="sync",
    observe=None,
    components=None,
    scale=None,
    action_mask="action_mask",
    image="auto",
    wrappers=[],
    frames_per_env_step=None,
    max_episode_steps=None,
    restarts=0,
    per_actor={},
)
SNAKE = EnvPool(
    id="Snake-v1",
    observe="step_count",
    components=None,
    scale=None,
    action_mask="action_mask",
    image="auto",
    max_episode_steps=None,
    batch_size=2,
    threads=1,
    options={},
    per_actor={},
)


def make_agent(spec: Any = parts.MASKED, core: str = "lstm", **changes: Any) -> R2D2:
    return parts.agent(parts.network(spec, core), **changes)


def allowed(mask: np.ndarray) -> np.ndarray:
    """bool[..., A]; all where none is, as of an episode's last observation."""
    return (mask != 0) | (mask == 0).all(-1, keepdims=True)


def mask_of(batch: Batch) -> np.ndarray:
    """bool[B, L + 1, A]."""
    return allowed(parts.all_inputs(batch).observation["mask"])


# --- the agent's functions -----------------------------------------------------------------------


def oracle_td(agent: R2D2, state: TrainState, batch: Batch) -> np.ndarray:
    """f64[B, T] absolute TD errors, -1 where not valid, in plain Python."""
    online = q_values(agent, state.params, batch)
    target = q_values(agent, state.target_params, batch)
    rows, mask, td = batch.rows, mask_of(batch), np.full((len(online), agent.unroll), -1.0)
    for b, i in np.ndindex(td.shape):
        t = agent.burn_in + i
        if not rows.valid[b, t]:
            continue
        total, factor, k = 0.0, 1.0, 0
        while k < agent.n_step and rows.valid[b, t + k]:
            total += factor * float(rows.reward[b, t + k])
            factor *= agent.discount * float(rows.discount[b, t + k])
            k += 1
        chooser = (online if agent.double_q else target)[b, t + k]
        best = max(np.flatnonzero(mask[b, t + k]), key=chooser.__getitem__)
        value = h(total + factor * h_inverse(target[b, t + k, best]))
        td[b, i] = abs(value - online[b, t, rows.action[b, t]])
    return td


@pytest.mark.parametrize("double_q", [True, False])
@pytest.mark.parametrize("core", ["lstm", "none"])
def test_targets_never_bootstrap_from_a_forbidden_action(core, double_q):
    agent = make_agent(core=core, double_q=double_q)
    batch, state = parts.batch(agent, 16), parts.random_state(agent)
    assert (batch.rows.inputs.observation["mask"] == 0).all(-1).any()
    greedy = q_values(agent, state.params, batch).argmax(-1)
    assert not np.take_along_axis(mask_of(batch), greedy[..., None], -1).all()
    priorities, _ = parts.told(agent, state, batch)
    np.testing.assert_allclose(priorities, oracle_td(agent, state, batch), atol=2e-5)


def test_initial_priorities_are_the_learners_when_all_networks_are_one():
    agent = make_agent()
    batch, state = parts.batch(agent, 16), jax.jit(agent.init)(jax.random.PRNGKey(0))
    q = q_values(agent, state.params, batch)
    taken = np.take_along_axis(q[:, :-1], batch.rows.action[..., None], axis=-1)[..., 0]
    best = np.where(mask_of(batch), q, -np.inf).max(-1).astype(np.float32)
    assert (best < q.max(-1)).any()
    kept = QActing(q=taken.astype(np.float32), q_max=best[:, :-1])
    rows = dataclasses.replace(batch.rows, acting=kept)
    priorities, _ = parts.told(agent, state, dataclasses.replace(batch, rows=rows))
    first = agent.initial_priorities(scalars_of(rows, best[:, -1]))
    np.testing.assert_allclose(first, priorities, atol=2e-5)


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 1.0])
def test_no_forbidden_action_is_taken_and_the_largest_q_is_an_allowed_ones(epsilon):
    agent, n = make_agent(), 6000
    params = jax.jit(agent.init)(jax.random.PRNGKey(0)).params
    inputs = parts.inputs(parts.MASKED, n, rng=np.random.default_rng(0))
    mask, carry = allowed(inputs.observation["mask"]), agent.initial_carry(n)
    one_row = trees.tree_map(lambda x: x[None], inputs)
    q = np.asarray(parts.q_values(agent, params, one_row, carry)[0][0])
    best = np.where(mask, q, -np.inf)
    action, kept, _ = jax.jit(agent.act)(
        params, inputs, carry, jax.random.PRNGKey(1), jnp.full(n, epsilon)
    )
    assert mask[np.arange(n), action].all()
    np.testing.assert_allclose(kept.q_max, best.max(-1), rtol=1e-5)
    np.testing.assert_allclose(kept.q, q[np.arange(n), action], rtol=1e-5)
    if epsilon == 0:
        np.testing.assert_array_equal(action, best.argmax(-1))
    if epsilon == 1:  # each allowed one with the same chance
        expected = (mask / mask.sum(-1, keepdims=True)).sum(0)
        assert (abs(np.bincount(action, minlength=4) - expected) < 5 * np.sqrt(n / 4)).all()


def test_the_network_does_not_read_the_mask():
    net = parts.network(parts.MASKED)
    params = parts.init(net, jax.random.PRNGKey(0))
    inputs = parts.inputs(parts.MASKED, 3, 2, rng=np.random.default_rng(0))
    without, _ = net.apply(params, inputs, net.initial_carry(2))
    observation = dict(inputs.observation) | {"mask": 1 - inputs.observation["mask"]}
    other = dataclasses.replace(inputs, observation=observation)
    found, _ = net.apply(params, other, net.initial_carry(2))
    np.testing.assert_array_equal(found, without)


# --- acting, in environments that refuse forbidden actions ---------------------------------------


def random_params(agent: R2D2) -> Any:
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(agent.init, jax.random.PRNGKey(0)).params
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), shapes)


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("family", [MASKED, SNAKE], ids=["gymnasium", "envpool"])
def test_rows_hold_the_mask_and_an_allowed_action(family, epsilon):
    agent = make_agent(family.spec())
    pool = LocalPool(
        instances=1,
        envs_per_actor=4,
        env_steps_per_request=100,
        device="cpu",
    ).open(context(family, agent, exploration=Constant(value=epsilon)))
    pool.publish(Weights(version=0, params=random_params(agent)), 0)
    rollouts = [rollout for _ in range(4) for rollout in pool.collect(60.0, 0)]
    pool.close(10.0)
    rows = trees.tree_map(lambda *x: np.concatenate(x), *[r.rows for r in rollouts])
    mask, action = rows.inputs.observation["action_mask"], rows.action
    assert (mask == 0).any()
    assert np.take_along_axis(allowed(mask), action[..., None], axis=-1).all()
    assert len(np.unique(action)) > 1


@pytest.mark.parametrize("epsilon", [0.0, 1.0])
def test_evaluations_take_no_forbidden_action(epsilon):
    agent = make_agent(MASKED.spec())
    found = run_episodes(  # the environment raises for a forbidden one
        agent=agent,
        weights=Weights(version=0, params=random_params(agent)),
        family=MASKED,
        episodes=6,
        lanes=3,
        epsilon=epsilon,
        seed=0,
        purpose="selection",
    )
    assert [episode.env_steps for episode in found] == [9] * 6


# --- a whole run ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "masked"
    settings = [
        *("env=gymnasium", f"env.id={ENV_ID}", "env.action_mask=action_mask"),
        *("agent=r2d2_small", "network.torso.layers=[32]", "network.core.units=16"),
        *("agent.burn_in=0", "agent.unroll=10", "agent.stride=5", "agent.block_rows=5"),
        *("replay.min_sequences=32", "replay.capacity=10000", "replay.ratio=32"),
        *("acting.envs_per_actor=8", "acting.env_steps_per_request=64"),
        *("total_env_steps=3000", "evaluation.final_episodes=20", "evaluation.epsilon=0"),
        *("logging.console=off", "logging.tensorboard=false"),
    ]
    rlx.run(rlx.compose(settings), folder)
    return folder


def test_r2d2_learns_with_a_mask(trained):
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["updates"] >= 250
    assert summary["evaluation_return"] > 7  # of 9; about 4 at random


def play(act: Any, epsilon: float) -> None:
    env, state, reward = worlds.Masked(), None, None
    observation, _ = env.reset(seed=3)
    for _ in range(9):
        action, state = act(observation, state, reward=reward, epsilon=epsilon)
        observation, reward, *_ = env.step(action)  # raises for a forbidden one


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 1.0])
def test_a_loaded_run_takes_no_forbidden_action(trained, epsilon):
    play(rlx.load(trained).act, epsilon)


def test_an_exported_agent_takes_no_forbidden_action(trained):
    with zipfile.ZipFile(io.BytesIO(export.export(rlx.load(trained)))) as file:
        about = json.loads(file.read("agent.json"))
        function = jax.export.deserialize(bytearray(file.read("act.jax_export")))
    assert about["outputs"]["action"]["low"] == 2
    n, rng = 500, np.random.default_rng(0)
    leaves = about["inputs"]["state"].items()
    state = {name: np.zeros((n, *x["shape"][1:]), x["dtype"]) for name, x in leaves}
    mask = (rng.random((n, 5)) < 0.5).astype(np.int8)
    sight = rng.normal(size=(n, 5)).astype(np.float32)
    action, _ = function.call(
        {"sight": sight, "action_mask": mask}, np.zeros(n, np.float32), np.ones(n, bool), state
    )
    assert np.take_along_axis(allowed(mask), np.asarray(action)[:, None] - 2, axis=1).all()
    assert not mask.all()
