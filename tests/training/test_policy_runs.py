"""Agents with a policy in whole runs: trained, saved with their statistics, resumed, exported."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np
import pytest

import rlx
from rlx import export, trees
from rlx.runs.folders import read_rows
from rlx.runs.names import meaning

SMALL = [
    "evaluation.every_env_steps=null",
    "evaluation.final_episodes=2",
    "logging.tensorboard=false",
    "logging.console=off",
    "checkpoint.every_env_steps=100000",
    "acting.envs_per_actor=4",
    "network.torso.layers=[8]",
    "network.core.units=8",
]
PENDULUM = ["env=cartpole", "env.id=Pendulum-v1"]
RUNS = {
    "ppo": [
        *("agent=ppo", "agent.unroll=16", "agent.normalize_observation=true"),
        *("agent.normalize_reward=true", "agent.separate_critic=true", "learner.batch_size=8"),
        *("network=mlp_gru", *PENDULUM),
    ],
    "sac": [
        *("agent=sac", "agent.burn_in=4", "agent.unroll=8", "agent.stride=4", "agent.block_rows=4"),
        *("agent.normalize_observation=true", "agent.policy.layers=[8]", "agent.critic.layers=[8]"),
        *(
            "replay=prioritized",
            "replay.min_sequences=16",
            "replay.ratio=8",
            "learner.batch_size=8",
        ),
        *("network=mlp_gru", *PENDULUM),
    ],
}


def settings(name: str, env_steps: int, *more: str) -> Any:
    return rlx.compose([*RUNS[name], *SMALL, f"total_env_steps={env_steps}", *more])


@pytest.fixture(scope="module", params=list(RUNS))
def run(request, tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp(request.param) / "run"
    assert rlx.run(settings(request.param, 1000), folder)["state"] == "finished"
    return request.param, rlx.load(folder)


def test_every_name_of_a_row_is_explained(run):
    _, loaded = run
    told = {name for row in read_rows(loaded.output_dir / "metrics.jsonl") for name in row}
    assert {"learner/loss", "learner/gradient_steps"} < told
    assert {name for name in told if meaning(name) is None} == set()


def seen(steps: int, lanes: int) -> dict[str, np.ndarray]:
    """Made-up observations of Pendulum in which episodes end."""
    rng = np.random.default_rng(0)
    first = rng.random((steps, lanes)) < 0.2
    first[0] = True
    return {
        "observation": 3 * rng.normal(size=(steps, lanes, 3)).astype(np.float32),
        "reward": rng.normal(size=(steps, lanes)).astype(np.float32),
        "first": first,
    }


def test_an_exported_policy_acts_as_the_run_does(run, tmp_path):
    """Statistics go with it: read by others, observations of this size would give other actions."""
    name, loaded = run
    given = seen(6, 3)
    with zipfile.ZipFile(io.BytesIO(export.export(loaded))) as file:
        exported = jax.export.deserialize(bytearray(file.read(export.FUNCTION)))
        shapes = json.loads(file.read(export.DESCRIPTION))["inputs"]["state"]
    state = {k: np.zeros([3, *s["shape"][1:]], s["dtype"]) for k, s in shapes.items()}
    own: Any = None
    for observation, reward, first in zip(*given.values(), strict=True):
        told = {} if own is None else {"reward": reward, "first": first}
        action, own = loaded.act(observation, own, **told)
        found, state = exported.call({"observation": observation}, reward, first, state)
        np.testing.assert_allclose(found, action, rtol=1e-5, atol=1e-6)
        assert np.abs(action).max() < (2 if name == "sac" else np.inf)


def test_a_resumed_run_has_the_statistics_of_the_one_before(run):
    name, loaded = run
    before = loaded.restore().state
    count = before.statistics["observation"]["observation"].count
    assert count > 0
    summary = rlx.run(settings(name, 1400, f"resume={loaded.output_dir}"), loaded.output_dir)
    assert summary["state"] == "finished"
    after = rlx.load(loaded.output_dir).restore().state
    assert after.statistics["observation"]["observation"].count > count
    assert trees.flatten(after.statistics).keys() == trees.flatten(before.statistics).keys()


def test_evaluations_leave_the_statistics_as_they_are(run):
    _, loaded = run
    before = loaded.restore().state.statistics["observation"]["observation"]
    loaded.evaluate(episodes=2)
    after = loaded.restore().state.statistics["observation"]["observation"]
    np.testing.assert_array_equal(before.mean, after.mean)
    assert before.count == after.count


def test_pqn_is_not_told_to_take_noisy_layers(tmp_path: Path):
    given = ["agent=pqn", "network=mlp", "env=cartpole", "exploration=sample", *SMALL]
    with pytest.raises(rlx.problems.ConfigError, match=r"choose exploration=ladder or linear$"):
        rlx.run(rlx.compose(given), tmp_path / "run")


def test_a_batch_that_does_not_divide_is_refused_at_the_start(tmp_path: Path):
    says = r"agent.minibatches=3 does not divide the 8 blocks of a device's batch; give a divisor"
    with pytest.raises(rlx.problems.ConfigError, match=says):
        rlx.run(settings("ppo", 1000, "agent.minibatches=3"), tmp_path / "run")


@pytest.mark.parametrize(
    "exploration",
    [
        ["exploration=greedy"],
        ["exploration=ladder"],
        # Its one lane draws an amount of 1 for its first episode.
        [
            *("exploration=redrawn", "exploration.highest=1", "exploration.count=2"),
            *("acting.envs_per_actor=1", "seed=0"),
        ],
    ],
    ids=lambda given: given[0],
)
def test_actions_that_are_not_drawn_from_the_policy_are_refused(tmp_path: Path, exploration):
    with pytest.raises(rlx.problems.ConfigError, match="choose exploration=sample"):
        rlx.run(settings("ppo", 1000, *exploration), tmp_path / "run")
