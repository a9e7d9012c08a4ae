"""Actions of every kind: from the environment to rows, the replay, the network and a file."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import rlx
from rlx import export, trees
from rlx.acting.exploration import Constant
from rlx.acting.local_pool import LocalPool
from rlx.acting.plan import carry_spec, row_spec
from rlx.acting.thread_pool import ThreadPool
from rlx.envs.actions import Actions
from rlx.envs.envpool import EnvPool
from rlx.envs.gymnasium import Gymnasium
from rlx.networks.actions import encode_action, encode_previous
from rlx.problems import ConfigError, RunFailed
from rlx.replay.files.experience import rollouts
from rlx.replay.uniform import Uniform
from rlx.types import BoxSpec, DiscreteSpec, MultiDiscreteSpec, Rollout, Row, Weights
from tests import parts
from tests.acting.test_keystone import context
from tests.agents.random_agent import RandomAgent, Value
from tests.replay.replay_streams import making
from tests.test_export import AFTERWARDS, WITHOUT_RLX, documented

READING: dict[str, Any] = {
    "observe": None,
    "components": None,
    "scale": None,
    "action_mask": None,
    "image": "auto",
    "per_actor": {},
}


def pooled(env_id: str, **settings: Any) -> EnvPool:
    own = {"max_episode_steps": 6, "batch_size": None, "threads": 1, "options": {}}
    return EnvPool(id=env_id, **READING | own | settings)


def registered(env_id: str, **settings: Any) -> Gymnasium:
    own = {"max_episode_steps": 6, "vector": "sync", "kwargs": {}, "frames_per_env_step": None}
    own |= {"wrappers": [], "restarts": 0}
    return Gymnasium(id=env_id, **READING | own | settings)


FAMILIES = {
    "discrete": pooled("CartPole-v1"),
    "box of EnvPool": pooled("Hopper-v5"),
    "asynchronous box": pooled("Pendulum-v1", batch_size=2),
    "box of gymnasium": registered("Pendulum-v1"),
    "choices of EnvPool": pooled("Tetris-v0", observe="grid"),
    "choices of gymnasium": registered("tests.worlds:rlx-test/Choices-v0"),
}


def make_agent(family: Any, core: str = "lstm") -> RandomAgent:
    spec = family.spec()
    net = parts.network(spec, core, torso=parts.mlp(8))
    return RandomAgent(
        unroll=5,
        block_rows=3,
        head=Value(hidden=8),
        optimizer=parts.adam(),
        network=net,
        spec=spec,
    )


def make_pool(kind: str, family: Any, agent: RandomAgent, exploration: float = 0.7) -> Any:
    settings: dict[str, Any] = {
        "instances": 2,
        "envs_per_actor": 4,
        "env_steps_per_request": 40,
        "device": "cpu",
    }
    told = context(family, agent, exploration=Constant(value=exploration))
    if kind == "local":
        return LocalPool(**settings).open(told)
    threads = ThreadPool(
        **settings,
        requests_per_actor=2,
        realtime=False,
        max_pending=4,
        max_weight_age_updates=None,
        request_timeout_s=60.0,
    )
    return threads.open(told)


def acted(kind: str, family: Any, core: str = "lstm") -> tuple[RandomAgent, Any, list[Rollout]]:
    """(agent, parameters, rollouts of at least 400 env steps, and of every lane)."""
    agent = make_agent(family, core)
    params = jax.tree.map(np.asarray, jax.jit(agent.init)(jax.random.PRNGKey(0)).params)
    pool = make_pool(kind, family, agent)
    pool.publish(Weights(version=0, params=params), 0)
    rollouts: list[Rollout] = []
    lanes: set[int] = set()  # one thread may make them all before the other has begun
    while sum(rollout.env_steps for rollout in rollouts) < 400 or len(lanes) < 8:
        rollouts += pool.collect(60.0, 0)
        lanes = {int(lane) for rollout in rollouts for lane in rollout.lane}
    pool.close(20.0)
    return agent, params, rollouts


def lanes_of(rollouts: list[Rollout], least: int = 8) -> dict[int, Row]:
    """Each lane's rows, end to end."""
    blocks: dict[int, list[tuple[int, Row]]] = {}
    for rollout, m in ((r, m) for r in rollouts for m in range(len(r.lane))):
        rows = trees.tree_map(lambda x, m=m: x[m], rollout.rows)
        blocks.setdefault(int(rollout.lane[m]), []).append((int(rollout.number[m]), rows))
    assert least <= len(blocks) <= 8
    joined = {}
    for lane, found in blocks.items():
        assert [number for number, _ in found] == list(range(len(found)))
        joined[lane] = trees.tree_map(lambda *x: np.concatenate(x), *[rows for _, rows in found])
    return joined


def check_rows(rows: Row, spec: Any) -> None:
    """The previous action is the action of the row before, and none at an episode's first row."""
    action, inputs = rows.action, rows.inputs
    for array in (action, inputs.prev_action):
        assert (array.dtype, array.shape[1:]) == (spec.array.dtype, spec.array.shape)
    follows = ~inputs.first[1:]
    assert follows.any()
    assert not follows.all()
    np.testing.assert_array_equal(inputs.prev_action[1:][follows], action[:-1][follows])
    assert (inputs.prev_action[inputs.first] == spec.none).all()
    assert len(np.unique(action)) > 1


@pytest.mark.parametrize("kind", ["local", "threads"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_previous_action_is_that_of_the_row_before(name, kind):
    agent, _, rollouts = acted(kind, FAMILIES[name])
    for rows in lanes_of(rollouts).values():
        check_rows(rows, agent.spec.action)


def make_replay(agent: RandomAgent, **changes: Any) -> Uniform:
    settings: dict[str, Any] = {
        "capacity": 240,
        "ratio": 1.0,
        "min_sequences": 1,
        "min_env_steps": 0,
        "storage": "memory",
        "folder": None,
        "compress": "none",
        "gather_threads": 1,
        "shards": None,
        "record": None,
        "where": "thread",
        "prefetch": 0,
        "sequence": agent.sequence,
        "row_spec": row_spec(agent.spec, agent.acting_spec),
        "carry_spec": carry_spec(agent),
        "lanes": 8,
        "seed": 0,
        "devices": (),
    }
    return making(Uniform, **settings | changes)


def difference(agent: RandomAgent, params: Any, batch: Any) -> float:
    """The largest relative difference of a replayed value and that of acting time."""
    rows = trees.tree_map(lambda x: np.swapaxes(x, 0, 1), batch.rows)
    value, _ = jax.jit(agent.value)(params, rows.inputs, batch.carry)
    kept = rows.acting.value
    return float((np.abs(value - kept) / np.maximum(1, np.abs(kept))).max())


@pytest.mark.parametrize("core", ["lstm", "none"])
@pytest.mark.parametrize("name", FAMILIES)
def test_replayed_values_equal_those_of_acting_time(name, core):
    agent, params, rollouts = acted("local", FAMILIES[name], core)
    replay = make_replay(agent)
    for rollout in rollouts:
        replay.add(rollout)
    batch = replay.sample(32).batch
    assert difference(agent, params, batch) < 1e-4
    inputs = batch.rows.inputs
    late = np.concatenate([inputs.prev_action[:, :1], inputs.prev_action[:, :-1]], axis=1)
    inputs = dataclasses.replace(inputs, prev_action=late)
    wrong = dataclasses.replace(batch, rows=dataclasses.replace(batch.rows, inputs=inputs))
    assert difference(agent, params, wrong) > 1e-4


# --- as networks read them -----------------------------------------------------------------------

BOX = BoxSpec(
    shape=(2, 2), low=(-2.0, 0.0, -np.inf, 1.0), high=(2.0, 10.0, np.inf, 1.0)
)  # scaled, scaled, without bounds, without width


def test_a_box_is_scaled_by_its_bounds_where_it_has_two():
    action = np.float32([[[1.0, 7.5], [30.0, 1.0]]])
    expected = [[0.5, 0.5, 30.0, 1.0]]
    np.testing.assert_array_equal(encode_action(action, BOX, "float32"), expected)
    none = np.zeros((1, 2, 2), np.float32)
    np.testing.assert_array_equal(encode_action(none, BOX, "float32"), [[0, -1, 0, 0]])
    beyond = np.float32([[[-9.0, 99.0], [-30.0, 1.0]]] * 2)
    first = np.array([False, True])
    found = encode_previous(beyond, first, BOX, "float32")
    np.testing.assert_array_equal(found, [[-1, 1, -30, 1], [0, 0, 0, 0]])
    assert encode_action(action, BOX, "bfloat16").dtype == "bfloat16"


def test_actions_stay_within_bounds_that_float32_has_not():
    spec = BoxSpec(shape=(3,), low=(-0.1, -np.inf, 0.0), high=(0.1, np.inf, 1e-3))
    beyond = np.float32([[-9.0, -9.0, -9.0], [9.0, 9.0, 9.0]])
    for dtype in (None, "float64"):  # of the rows, of the environment
        low, high = Actions(spec, dtype=dtype).outward(beyond).astype(np.float64)
        assert (low >= spec.low).all()
        assert (high <= spec.high).all()
        np.testing.assert_allclose(low, [-0.1, -9.0, 0.0], rtol=1e-6)
        np.testing.assert_allclose(high, [0.1, 9.0, 1e-3], rtol=1e-6)


def test_choices_are_one_hots_side_by_side():
    spec = MultiDiscreteSpec(counts=(3, 2))
    action = np.int32([[2, 0], [0, 1], [-1, -1]])
    expected = [[0, 0, 1, 1, 0], [1, 0, 0, 0, 1], [0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(encode_action(action, spec, "float32"), expected)
    first = np.array([False, False, True])
    np.testing.assert_array_equal(encode_previous(action, first, spec, "float32"), expected)
    one = encode_previous(action[:, 1], first, DiscreteSpec(n=2), "float32")
    np.testing.assert_array_equal(one, [[1, 0], [0, 1], [0, 0]])


@pytest.mark.parametrize("core", ["lstm", "gru", "none"])
@pytest.mark.parametrize("spec", [parts.BOX, parts.CHOICES], ids=lambda s: s.id)
def test_an_unroll_equals_unrolls_of_one_row(spec, core):
    net, rng = parts.network(spec, core), np.random.default_rng(0)
    params = parts.init(net, jax.random.PRNGKey(0), Value(hidden=8))
    inputs, carry = parts.inputs(spec, 9, 3, rng=rng), parts.random_carry(net, 3, rng)
    apply = jax.jit(net.apply)
    whole, _ = apply(params, inputs, carry)
    for t in range(9):
        one, carry = apply(params, trees.tree_map(lambda x, t=t: x[t : t + 1], inputs), carry)
        np.testing.assert_allclose(one[0], whole[t], rtol=1e-5, atol=1e-6)
    moved = dataclasses.replace(inputs, prev_action=inputs.prev_action[::-1])
    other, _ = apply(params, moved, parts.random_carry(net, 3, np.random.default_rng(0)))
    assert np.abs(other - whole).max() > 1e-3


# --- whole runs ----------------------------------------------------------------------------------

AGENT = """
_target_: tests.agents.random_agent.RandomAgent
unroll: 5
block_rows: 3
head:
  _target_: tests.agents.random_agent.Value
  hidden: 8
optimizer:
  _target_: rlx.agents.optimizers.Optimizer
  rule: adam
  learning_rate: 1.0e-3
  b1: 0.9
  b2: 0.999
  epsilon: 1.0e-5
  max_grad_norm: 80.0
  max_grad_norm_ratio: null
  warmup_gradient_steps: 0
  decay_gradient_steps: null
  decay: linear
  final_learning_rate: 0.0
"""
REPLAY = ("replay=uniform", "replay.capacity=2000", "replay.min_sequences=4", "replay.ratio=4.0")
SMALL = [
    *("agent=random", "network.torso.layers=[8]", "network.core.units=8"),
    *("acting.envs_per_actor=4", "acting.env_steps_per_request=8", "total_env_steps=300"),
    *("learner.batch_size=4", "evaluation.final_episodes=4", "checkpoint.every_env_steps=200"),
    *("logging.console=off", "logging.tensorboard=false"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs a family to its end: its folder."""
    rlx.allow("tests.")
    conf = tmp_path_factory.mktemp("conf")
    (conf / "agent").mkdir()
    (conf / "agent" / "random.yaml").write_text(AGENT)

    def run(*overrides: str, replay: Sequence[str] = REPLAY) -> Path:
        folder = tmp_path_factory.mktemp("runs") / "run"
        rlx.run(rlx.compose([*SMALL, *replay, *overrides], extra_dir=conf), folder)
        return folder

    return run


PENDULUM = ("env=gymnasium", "env.id=Pendulum-v1", "env.max_episode_steps=12")
CHOICES = ("env=gymnasium", "env.id=tests.worlds:rlx-test/Choices-v0")
HOPPER = ("env=mujoco", "env.id=Hopper-v5", "env.max_episode_steps=12")


# Hopper has a box as Pendulum has; its environments are played in tests/envs/test_envpool.py.
SLOW = pytest.param(HOPPER, marks=pytest.mark.slow)


@pytest.mark.parametrize("env", [PENDULUM, CHOICES, SLOW], ids=["pendulum", "choices", "hopper"])
def test_a_run_learns_acts_and_is_exported(env, trained, tmp_path):
    folder = trained(*env)
    run = rlx.load(folder)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["updates"] > 20
    (own,) = run.agent.spec.observation.values()
    spec, start = run.agent.spec.action, np.asarray(run.family.raw_spaces().action_start)
    observations = np.random.default_rng(0).normal(size=(20, 3, *own.shape)).astype(own.dtype)
    first = np.random.default_rng(1).random((20, 3)) < 0.2
    first[0] = True
    given = {"observation": observations, "reward": np.ones((20, 3), np.float32), "first": first}
    mine, state = [], None
    for t in range(20):
        told = {"reward": given["reward"][t], "first": first[t]} if state else {}
        action, state = run.act(observations[t], state, **told)
        assert (action.dtype, action.shape) == (spec.array.dtype, (3, *spec.array.shape))
        mine.append(action)
    alone, _ = run.act(observations[0, 0])
    assert (alone.dtype, alone.shape) == (spec.array.dtype, spec.array.shape)
    np.testing.assert_allclose(alone, mine[0][0], rtol=1e-3, atol=1e-3)

    (tmp_path / "agent.zip").write_bytes(export.export(run))
    np.savez(tmp_path / "given.npz", **given)
    code = WITHOUT_RLX + textwrap.dedent(documented()) + AFTERWARDS
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "agent.zip"), str(tmp_path / "given.npz")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    theirs = np.load(tmp_path / "given.npz.actions.npy")
    np.testing.assert_allclose(theirs, mine, rtol=1e-3, atol=1e-3)
    assert len(np.unique(theirs)) > 1
    with zipfile.ZipFile(tmp_path / "agent.zip") as file:
        told = json.loads(file.read("agent.json"))["outputs"]["action"]
    assert told["shape"] == ["batch", *spec.array.shape]
    assert told["dtype"] == spec.array.dtype
    assert (np.asarray(theirs) >= np.asarray(told["low"], np.float32)).all()
    assert (np.asarray(theirs) <= np.asarray(told["high"], np.float32)).all()
    assert (np.asarray(told["low"]) == (start if start.ndim else np.asarray(spec.low))).all()


@pytest.mark.xdist_group("in turn")  # as all tests with Ray
def test_what_actors_on_ray_do_in_a_box_is_recorded_and_learnt_from(trained, tmp_path):
    experience = tmp_path / "experience"
    thin = ("acting=ray_pool", "acting.instances=2", "acting.cpus_per_actor=0.5")
    folder = trained(*PENDULUM, *thin, f"replay.record={experience}")
    agent = rlx.load(folder).agent
    specs = row_spec(agent.spec, agent.acting_spec), carry_spec(agent)
    made = list(rollouts(experience, *specs))
    long = [rows for rows in lanes_of(made, least=4).values() if len(rows.action) >= 20]
    assert len(long) >= 4  # one actor may have done it all
    for rows in long:
        check_rows(rows, agent.spec.action)
    offline = ("replay=dataset", f"replay.path={experience}", "replay.priority_exponent=0")
    small = ("replay.min_sequences=4", "replay.ratio=4.0")
    learnt = trained(*PENDULUM, replay=(*offline, *small))
    summary = json.loads((learnt / "summary.json").read_text())
    assert (summary["state"], summary["updates"] > 20) == ("finished", True)


def test_a_replay_by_priorities_refuses_updates_that_give_none(trained):
    by_priorities = ("replay=prioritized", "replay.initial_priority=max", *REPLAY[1:])
    with pytest.raises(RunFailed, match="updates of RandomAgent do not give; choose"):
        trained(*PENDULUM, replay=by_priorities)
    with pytest.raises(ConfigError, match="no initial_priorities"):
        trained(*PENDULUM, replay=("replay=prioritized", *REPLAY[1:]))
    drawn_evenly = ("replay.priority_exponent=0", "replay.importance_exponent=0")
    trained(*PENDULUM, replay=("replay=prioritized", *REPLAY[1:], *drawn_evenly))
