"""On-policy: every update learns, once, from rows that its own weights have made, in every pool."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import rlx
from rlx.acting.actor import Actor
from rlx.acting.local_pool import OpenLocalPool
from rlx.acting.plan import zero_inputs
from rlx.problems import ConfigError
from rlx.training.keeper import Keeper
from rlx.training.learner import OpenLearner
from rlx.training.stages import Stages
from rlx.types import Weights
from tests.acting.test_ray_pool import actor_processes

LANES, ROWS, BLOCKS = 8, 8, 2
BATCH = LANES * BLOCKS
PPO = [
    "agent=ppo",
    f"agent.unroll={ROWS}",
    "agent.epochs=2",
    "agent.minibatches=2",
    "agent.optimizer.learning_rate=3e-2",
]
RUN = [
    "network=mlp_lstm",
    "network.torso.layers=[16]",
    "network.core.units=16",
    f"learner.batch_size={BATCH}",
    "replay.capacity=2000",
    "evaluation.every_env_steps=null",
    "evaluation.final_episodes=4",
    "logging.tensorboard=false",
    "logging.console=off",
    "logging.every_env_steps=200",
    "checkpoint.every_env_steps=1000",
]
POOLS = {
    "local": ["acting=local", "acting.instances=2", "acting.envs_per_actor=4"],
    "threads": ["acting=threads", "acting.instances=2", "acting.envs_per_actor=4"],
    "ray_pool": [
        *("acting=ray_pool", "acting.sync=true", "acting.instances=2", "acting.envs_per_actor=4"),
        *("acting.cpus_per_actor=0.5", "acting.restarts.first_wait_s=0.1"),
    ],
}


class Seen:
    """Counts of what a run's loop and learner have done."""

    def __init__(self) -> None:
        self.ratio_errors: list[float] = []
        self.ages: list[int] = []  # of each sequence: updates made minus its version
        self.rows: list[tuple[int, int, int]] = []  # (lane, chain, number) of blocks added
        self.env_steps = 0
        self.valid_rows = 0


@pytest.fixture
def seen(monkeypatch) -> Seen:
    """Notes of every update of the runs that the test makes."""
    notes, update, begin = Seen(), OpenLearner.update, Keeper.begin

    def noting(learner: OpenLearner, *arguments: Any) -> Any:
        output = update(learner, *arguments)
        notes.ratio_errors.append(float(np.asarray(output.metrics["learner/ratio_error"])[0]))
        return output

    def watch(keeper: Keeper) -> None:
        replay, learner = keeper._parts.replay, keeper._parts.learner
        add, sample = replay.add, replay.sample

        def noting_add(rollout: Any) -> None:
            notes.env_steps += int(rollout.rows.valid.sum())
            ids = (rollout.lane.tolist(), rollout.chain.tolist(), rollout.number.tolist())
            notes.rows += list(zip(*ids, strict=True))
            add(rollout)

        def noting_sample(batch_size: int) -> Any:
            drawn = sample(batch_size)
            notes.ages += (learner.updates - drawn.weights_version).tolist()
            notes.valid_rows += int(drawn.batch.rows.valid.sum())
            return drawn

        replay.add, replay.sample = noting_add, noting_sample
        begin(keeper)

    monkeypatch.setattr(OpenLearner, "update", noting)
    monkeypatch.setattr(Keeper, "begin", watch)
    return notes


def train(folder: Path, *changes: str, env_steps: int = 1500) -> dict[str, Any]:
    agent = [] if "agent=dqn" in changes else PPO
    cfg = rlx.compose([*agent, *RUN, f"total_env_steps={env_steps}", *changes])
    return rlx.run(cfg, folder)


def assert_on_policy(seen: Seen, summary: dict[str, Any]) -> None:
    """Ratio 1 before every first gradient step; each row trained once."""
    assert summary["updates"] == len(seen.ratio_errors) > 5
    assert max(seen.ratio_errors) < 1e-5
    assert set(seen.ages) == {0}
    assert len(set(seen.rows)) == len(seen.rows) == BATCH * summary["updates"]
    assert seen.valid_rows == seen.env_steps


@pytest.mark.parametrize("pool", list(POOLS))
def test_the_ratio_is_1_and_each_row_is_trained_once(tmp_path, seen, pool):
    summary = train(tmp_path / "run", *POOLS[pool])
    assert_on_policy(seen, summary)


def test_a_killed_actor_s_part_of_a_round_is_made_again_with_the_same_weights(
    tmp_path, seen, monkeypatch
):
    """One is stopped before a round and killed when the other's part of it is there."""
    update, begin, stopped = OpenLearner.update, Keeper.begin, []

    def stop_one(learner: OpenLearner, *arguments: Any) -> Any:
        output = update(learner, *arguments)
        if learner.updates == 3:
            os.kill(pid := actor_processes()[0].pid, signal.SIGSTOP)
            stopped.append(pid)
        return output

    def watch(keeper: Keeper) -> None:
        begin(keeper)
        add = keeper._parts.replay.add

        def kill_it(rollout: Any) -> None:
            add(rollout)
            if stopped and len(stopped) == 1:
                os.kill(stopped[0], signal.SIGKILL)
                stopped.append(-1)

        keeper._parts.replay.add = kill_it

    monkeypatch.setattr(OpenLearner, "update", stop_one)
    monkeypatch.setattr(Keeper, "begin", watch)
    summary = train(tmp_path / "run", *POOLS["ray_pool"])
    assert len(stopped) == 2
    assert max(chain for _, chain, _ in seen.rows) == 1
    assert_on_policy(seen, summary)


def older_weights(patch: pytest.MonkeyPatch) -> None:
    """Acting goes on with the version before the newest."""
    publish, kept = OpenLocalPool.publish, []

    def late(pool: OpenLocalPool, weights: Weights, env_steps: int) -> None:
        kept.append(weights)
        publish(pool, kept[max(0, len(kept) - 2)], env_steps)

    patch.setattr(OpenLocalPool, "publish", late)


def a_leaked_row(patch: pytest.MonkeyPatch) -> None:
    """The first row of the next block is acted before its weights are there."""

    def rests(actor: Actor) -> bool:
        assert actor._request is not None
        begins = actor.weights_version == 0  # without the row of the request before
        return actor._begun >= (actor._request.want_blocks or 0) + begins

    patch.setattr(Actor, "_is_last", lambda actor, answered: False)
    patch.setattr(Actor, "rests", property(rests))


@pytest.mark.parametrize("plant", [older_weights, a_leaked_row])
def test_stale_weights_break_the_ratio(tmp_path, seen, monkeypatch, plant):
    plant(monkeypatch)
    train(tmp_path / "run", *POOLS["local"], env_steps=800)
    assert seen.ratio_errors[0] < 1e-5
    assert max(seen.ratio_errors) > 1e-2
    assert set(seen.ages) == {0, 1}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["learner.batch_size=12"], "learner.batch_size=12: an update takes one or more blocks of "
         "each of the 8 lanes (acting.instances * acting.envs_per_actor); accepted: its multiples, "
         "nearest 8 or 16"),
        (["replay.min_sequences=32"], "replay.min_sequences=32: the replay of an on-policy agent "
         "holds one batch; accepted: 16 (learner.batch_size)"),
        (["env.batch_size=2"], "env.batch_size=2: an on-policy agent's lanes answer together; "),
        (["replay=uniform", "replay.min_sequences=16"], "replay: an on-policy agent trains once "
         "on each row; choose replay=online"),
        ([*POOLS["ray_pool"], "acting.sync=false"], "acting.sync=false: an on-policy agent acts "
         "with its newest weights only; set it to true"),
        ([*POOLS["ray_pool"], "acting.inference=server"], "acting.inference=server: an on-policy "),
        ([*POOLS["ray_pool"], "acting.weights_dtype=bfloat16"], "acting.weights_dtype=bfloat16: "),
        ([*POOLS["threads"], "acting.realtime=true"], "acting.realtime=true: an on-policy "),
        (["agent=dqn", "acting=ray_pool", "acting.sync=true"], "acting.sync=true: is for "
         "on-policy agents"),
        (["replay.capacity=160", "replay.min_sequences=32", "learner.batch_size=32"],
         "replay: replay.min_sequences=32, but a full replay of 160 rows has about "),
    ],
)  # fmt: skip
def test_what_makes_no_rounds_is_refused(tmp_path, changes, says):
    with pytest.raises(ConfigError) as refused:
        train(tmp_path / "run", *POOLS["local"], *changes)
    assert any(line.startswith(says) for line in str(refused.value).splitlines())


def test_weights_of_rounds_are_never_too_old(tmp_path, seen):
    """publish_every_updates is for others: an on-policy agent's weights are published at once."""
    oldest = ("acting.max_weight_age_updates=1", "learner.publish_every_updates=10")
    summary = train(tmp_path / "run", *POOLS["threads"], *oldest, env_steps=800)
    assert summary["updates"] > 3
    assert set(seen.ages) == {0}
    with pytest.raises(ConfigError, match=r"weights are published every 10 updates"):
        train(tmp_path / "no", "agent=dqn", *POOLS["threads"], *oldest)


def test_a_run_that_is_stopped_in_a_round_makes_that_round_anew(tmp_path, seen, monkeypatch):
    """Lanes that are gone made what waited in the saved replay; nothing of it is kept."""
    act = Stages.act

    def stop_in_a_round(stages: Stages) -> None:
        act(stages)
        if stages.count.env_steps > 600 and stages.parts.replay.startable == BATCH // 2:
            stages.stop.set()

    local = [*POOLS["local"], "checkpoint.replay=true"]
    with monkeypatch.context() as patch:
        patch.setattr(Stages, "act", stop_in_a_round)
        first = train(tmp_path / "run", *local)
    assert first["state"] == "interrupted"
    before = len(seen.ratio_errors)
    summary = train(tmp_path / "run", *local, f"resume={tmp_path / 'run'}")
    assert summary["state"] == "finished"
    assert len(seen.ratio_errors) > before + 3
    assert max(seen.ratio_errors) < 1e-5
    assert set(seen.ages) == {0}


def test_a_trained_agent_acts_greedily_or_as_it_samples(tmp_path, seen):
    train(tmp_path / "run", *POOLS["local"], env_steps=400)
    run, zeros = rlx.load(tmp_path / "run"), np.zeros((512, 4), np.float32)
    params = run.params()
    begin = {"first": np.ones(1, bool), "prev_action": np.full(1, -1, np.int32)}
    inputs = dataclasses.replace(zero_inputs(run.agent, 1), **begin)
    key, none = jax.random.PRNGKey(0), np.zeros(1, np.float32)
    mode, kept, _ = run.agent.act(params, inputs, run.agent.initial_carry(1), key, none)
    mode, probability = int(mode[0]), float(np.exp(kept.log_probability[0]))

    def chosen(**how: Any) -> float:
        """The share of lanes that took the mode."""
        return float(np.mean(run.act(zeros, seed=1, **how)[0] == mode))

    assert chosen() == chosen(greedy=True) == chosen(epsilon=0) == chosen(greedy=True, epsilon=0)
    assert chosen() == 1.0
    assert probability < 0.8  # else a sample is hardly ever another one
    sampled = chosen(greedy=False)
    assert sampled == chosen(epsilon=1)
    assert abs(sampled - probability) < 0.1  # 4.5 standard deviations
    assert abs(chosen(epsilon=0.5) - (1 + probability) / 2) < 0.1
