"""IMPALA with actors that go on: what V-trace corrects by is true, whoever dies."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlx
from rlx.acting.ray_pool import OpenRayPool
from rlx.acting.thread_pool import OpenThreadPool
from rlx.agents import common
from rlx.agents import policy_gradient as pg
from rlx.training.keeper import Keeper
from rlx.training.learner import OpenLearner
from rlx.training.stages import Stages
from rlx.types import Weights
from tests.acting.test_ray_pool import actor_processes

BATCH = 8
FEWEST = 10  # updates of a run that are to be looked at
RUN = [
    "agent=impala",
    "agent.unroll=8",
    "agent.optimizer.learning_rate=3e-3",
    "network=mlp_lstm",
    "network.torso.layers=[16]",
    "network.core.units=16",
    f"learner.batch_size={BATCH}",
    "learner.publish_every_updates=1",
    "replay.capacity=2000",
    "evaluation.every_env_steps=null",
    "evaluation.final_episodes=4",
    "logging.tensorboard=false",
    "logging.console=off",
    "checkpoint.every_env_steps=100000",
    "acting.instances=2",
    "acting.envs_per_actor=4",
    "acting.env_steps_per_request=32",
]
RAY = ["acting=ray_pool", "acting.cpus_per_actor=0.5", "acting.restarts.first_wait_s=0.1"]
POOLS = {"threads": (["acting=threads"], OpenThreadPool), "ray_pool": (RAY, OpenRayPool)}


class Seen:
    """Keeps the weights of each version, and checks the batches that are learnt from."""

    def __init__(self) -> None:
        self.weights: dict[int, Any] = {}
        self.errors: list[
            float
        ] = []  # relative, of first rows' log-probabilities by their own weights
        self.ages: list[int] = []  # updates
        self.chains: set[int] = set()
        self.blocks: list[tuple[int, int, int]] = []  # (lane, chain, number), as they were added
        self.odds: Any = None


def log_probability(agent: Any, params: Any, batch: Any) -> jax.Array:
    """f32[B] of each sequence's first row, by these weights."""
    first = jax.tree.map(lambda x: x[:, 0], batch.rows)
    seen = common.transform_inputs(common.add_time(first.inputs), agent.reward)
    stacked, _ = agent.network.stack_frames(seen, batch.carry)
    features, _ = agent.network.unroll(params["network"], stacked, batch.carry.core)
    parameters = agent.network.read(params["network"], pg.POLICY, agent.policy, features)[0]
    policy = agent.policy.distribution(parameters, agent.spec.action, None)
    found: jax.Array = policy.log_probability(first.action)
    return found


def watched(monkeypatch: pytest.MonkeyPatch, pool: type) -> Seen:
    """Notes of the run that the test makes."""
    notes, publish, begin = Seen(), pool.publish, Keeper.begin

    def keep(opened: Any, weights: Weights, env_steps: int) -> None:
        notes.weights[weights.version] = jax.tree.map(np.array, weights.params)
        publish(opened, weights, env_steps)

    def watch(keeper: Keeper) -> None:
        replay, learner = keeper._parts.replay, keeper._parts.learner
        add, sample, agent = replay.add, replay.sample, keeper._parts.agent
        odds = jax.jit(partial(log_probability, agent))

        def note_added(rollout: Any) -> None:
            ids = (rollout.lane.tolist(), rollout.chain.tolist(), rollout.number.tolist())
            notes.blocks += list(zip(*ids, strict=True))
            add(rollout)

        def note_drawn(batch_size: int) -> Any:
            drawn = sample(batch_size)
            for i, version in enumerate(drawn.weights_version.tolist()):
                one = jax.tree.map(lambda x, i=i: jnp.asarray(x[i : i + 1]), drawn.batch)
                found, kept = odds(notes.weights[version], one)[0], one.rows.acting
                kept = float(kept.log_probability[0, 0])
                notes.errors.append(abs(float(found) - kept) / (1 + abs(kept)))
                notes.ages.append(learner.updates - version)
            return drawn

        replay.add, replay.sample = note_added, note_drawn
        begin(keeper)

    monkeypatch.setattr(pool, "publish", keep)
    monkeypatch.setattr(Keeper, "begin", watch)
    return notes


def train(folder: Path, *changes: str, env_steps: int = 2500) -> dict[str, Any]:
    return rlx.run(rlx.compose([*RUN, *changes, f"total_env_steps={env_steps}"]), folder)


def assert_true_and_whole(seen: Seen, summary: dict[str, Any]) -> None:
    """Probabilities are those of the weights that acted; every lane's blocks come in order."""
    assert summary["updates"] > FEWEST
    assert max(seen.errors) < 1e-4  # of the weights of an update earlier it is 1e-2
    assert max(seen.ages) > 0  # else nothing was to be corrected
    numbers: dict[tuple[int, int], list[int]] = {}
    for lane, chain, number in seen.blocks:
        numbers.setdefault((lane, chain), []).append(number)
    assert all(found == list(range(len(found))) for found in numbers.values())


@pytest.mark.parametrize("pool", list(POOLS))
def test_recorded_probabilities_are_those_of_the_weights_that_acted(tmp_path, monkeypatch, pool):
    settings, cls = POOLS[pool]
    seen = watched(monkeypatch, cls)
    summary = train(tmp_path / "run", *settings)
    assert summary["state"] == "finished"
    assert_true_and_whole(seen, summary)


def test_a_killed_actor_changes_nothing_that_is_learnt(tmp_path, monkeypatch):
    """One dies early; the run goes on until another has acted in its place for a while."""
    seen, update, act, killed = (
        watched(monkeypatch, OpenRayPool),
        OpenLearner.update,
        Stages.act,
        [],
    )

    def kill_one(learner: OpenLearner, *arguments: Any) -> Any:
        output = update(learner, *arguments)
        if learner.updates == 4:
            os.kill(pid := actor_processes()[0].pid, signal.SIGKILL)
            killed.append(pid)
        return output

    def stop_at_last(stages: Stages) -> None:
        act(stages)
        acted = sum(chain == 1 for _, chain, _ in seen.blocks) >= 3 * BATCH
        if acted and stages.parts.learner.updates > FEWEST:
            stages.stop.set()

    monkeypatch.setattr(OpenLearner, "update", kill_one)
    monkeypatch.setattr(Stages, "act", stop_at_last)
    summary = train(tmp_path / "run", *RAY, env_steps=2_000_000)
    assert len(killed) == 1
    assert summary["state"] == "interrupted"
    assert_true_and_whole(seen, summary)
    assert {chain for _, chain, _ in seen.blocks} == {0, 1}
