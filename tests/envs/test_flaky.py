"""Environments that fail now and then: opened anew within their actors, as often as allowed."""

from __future__ import annotations

import uuid
from typing import Any

import numpy as np
import pytest

import rlx
from rlx.acting.local_pool import LocalPool
from rlx.envs.gymnasium import Gymnasium
from rlx.problems import ConfigError, EnvironmentFailed, RunFailed
from rlx.runs.folders import read_rows
from tests.acting.test_actor import make_agent, weights_of
from tests.acting.test_keystone import context
from tests.envs.test_envpool import family as pooled
from tests.envs.test_gymnasium import family
from tests.envs.test_odd import played
from tests.training.test_run import TINY

ENV_ID = "tests.worlds:rlx-test/Flaky-v0"


def flaky(fails: list[int | None], *, restarts: int = 2, lanes: int = 1, **settings: Any) -> Any:
    kwargs = {"key": uuid.uuid4().hex, "fails": fails}
    made = family(ENV_ID, kwargs=kwargs, restarts=restarts, **settings)
    return made.make(lanes=lanes, seeds=list(range(lanes)))


@pytest.mark.parametrize("vector", ["sync", "async"])
def test_a_lane_that_fails_begins_a_new_episode_and_the_others_go_on(vector):
    # Each process of `async` counts its own, so that there both lanes fail.
    env = flaky([3], lanes=2, vector=vector)
    answers = played(env, 9)
    number, time = (np.array([a.observation["observation"][:, i] for a in answers]) for i in (0, 1))
    assert time[:4, 0].tolist() == [0, 1, 2, 0]
    assert [a.first[0] for a in answers[:5]] == [True, False, False, True, False]
    assert [a.reward[0] for a in answers[:5]] == [0, 1, 1, 0, 1]
    assert not any((a.terminated | a.truncated)[0] for a in answers[:8])
    assert answers[8].terminated[0]  # five env steps after the new beginning
    others = [time[:6, 1].tolist(), number[:6, 1].tolist()]
    if vector == "sync":
        assert others == [[0, 1, 2, 3, 4, 5], [2] * 6]
        assert number[:, 0].tolist() == [1] * 3 + [3] * 7
    cuts = env.cuts()
    assert [(cut.lane, cut.env_step, cut.reopened) for cut in cuts][:1] == [(0, 3, True)]
    assert "step() raised RuntimeError: simulator 1 has crashed" in str(cuts[0])
    assert [e.env_steps for e in env.episodes() if e.lane == 0] == [5]  # the cut one is not counted
    env.close()


def test_failures_in_a_row_are_counted_and_an_episode_s_end_forgives_them():
    env = flaky([1, 1, 1], restarts=2)
    env.reset()
    step = np.zeros(1, np.int32), np.zeros(1, np.int32)
    env.step(*step)
    env.step(*step)
    with pytest.raises(EnvironmentFailed, match="simulator 3 has crashed"):
        env.step(*step)
    forgiven = flaky([7, 7, 7], restarts=1)  # each ends an episode of five env steps before
    played(forgiven, 26)
    assert [cut.env_step for cut in forgiven.cuts()] == [2, 2, 2]


@pytest.mark.parametrize("restarts", [0, 3])
def test_one_that_fails_at_its_first_reset_is_tried_again(restarts):
    env = flaky([0, 0], restarts=restarts)
    if not restarts:
        with pytest.raises(EnvironmentFailed, match=r"reset\(\) raised .* simulator 1"):
            env.reset()
        return
    first = env.reset()
    assert first.first.all()
    assert first.observation["observation"].tolist() == [[3, 0]]
    assert [cut.env_step for cut in env.cuts()] == [0]
    assert [e.env_steps for e in env.episodes()] == []


@pytest.mark.parametrize("restarts", [1, 2])
def test_one_that_cannot_be_opened_anew_is_tried_again_as_often_as_allowed(restarts):
    kwargs = {"key": uuid.uuid4().hex, "fails": [3], "refuses": [3]}
    env = family(ENV_ID, kwargs=kwargs, restarts=restarts).make(lanes=1, seeds=[1])
    if restarts == 1:
        with pytest.raises(EnvironmentFailed, match=r"open\(\) raised OSError: the port is still"):
            played(env, 6)
        return
    assert [a.first[0] for a in played(env, 6)][:5] == [True, False, False, True, False]


def test_wrappers_are_put_around_the_new_one_too():
    clip = {
        "_target_": "gymnasium.wrappers.ClipReward", "min_reward": 0.0, "max_reward": 0.5
    }  # fmt: skip
    env = flaky([3], wrappers=[clip])
    answers = played(env, 9)
    assert [a.reward[0] for a in answers[:6]] == [0, 0.5, 0.5, 0, 0.5, 0.5]
    assert [(e.return_, e.env_steps) for e in env.episodes()] == [(5.0, 5)]


def test_no_row_is_spliced_over_a_failure():
    """The actor's rows are those of an episode that was cut: its last row is not valid."""
    kwargs = {"key": uuid.uuid4().hex, "fails": [3]}
    envs: Gymnasium = family(ENV_ID, kwargs=kwargs, restarts=1)
    agent = make_agent(envs)
    pool = LocalPool(instances=1, envs_per_actor=1, env_steps_per_request=12, device="cpu").open(
        context(envs, agent)
    )
    pool.publish(weights_of(agent), 0)
    (rollout,) = pool.collect(60.0, 0)
    rows = rollout.rows
    valid = np.concatenate(list(rows.valid))
    first = np.concatenate(list(rows.inputs.first))
    reward = np.concatenate(list(rows.reward))
    assert valid[:8].tolist() == [True, True, False, True, True, True, True, True]
    assert first[:4].tolist() == [True, False, False, True]
    assert reward[:3].tolist() == [1, 1, 0]
    assert [cut.reopened for cut in rollout.cuts] == [True]
    pool.close(10.0)


def test_a_run_goes_on_and_counts_them(tmp_path, caplog):
    key = uuid.uuid4().hex
    given = ["env=gymnasium", f"env.id={ENV_ID}", f"+env.kwargs.key={key}", "env.restarts=2"]
    settings = rlx.compose([*TINY, *given, "+env.kwargs.fails=[9,12,7]", "total_env_steps=400"])
    summary = rlx.run(settings, tmp_path)
    assert summary["state"] == "finished"
    assert read_rows(tmp_path / "metrics.jsonl")[-1]["acting/env_restarts"] == 3
    assert "an environment was opened anew: lane" in caplog.text
    assert not (tmp_path / "nonfinite").exists()


def test_without_restarts_the_run_fails_as_before(tmp_path):
    key = uuid.uuid4().hex
    given = ["env=gymnasium", f"env.id={ENV_ID}", f"+env.kwargs.key={key}"]
    with pytest.raises(RunFailed, match="simulator 1 has crashed"):
        rlx.run(rlx.compose([*TINY, *given, "+env.kwargs.fails=[9]"]), tmp_path)


# --- env.per_actor -------------------------------------------------------------------------------


def test_each_actor_has_its_own_settings_in_turn():
    envs = family("tests.worlds:rlx-test/Sized-v0", per_actor={"length": [3, 5]})
    assert [envs.of_actor(i, 4).kwargs["length"] for i in range(4)] == [3, 5, 3, 5]
    assert envs.of_actor(1, 4).per_actor == {}
    assert envs.kwargs == {}


# tests/training/test_learner_group.py has the local pool, in test_actors_of_both_have_settings...
@pytest.mark.parametrize("pool", [pytest.param("local", marks=pytest.mark.slow), "threads"])
def test_actors_of_a_run_play_their_own_environments(pool, tmp_path):
    given = ["env=gymnasium", "env.id=tests.worlds:rlx-test/Sized-v0", f"acting={pool}"]
    given += ["acting.instances=2", "+env.per_actor.length=[3,6]", "acting.envs_per_actor=4"]
    tiny = [setting for setting in TINY if not setting.startswith("acting.")]
    settings = rlx.compose([*tiny, *given, "acting.env_steps_per_request=8"])
    rlx.run(settings, tmp_path)
    last = read_rows(tmp_path / "metrics.jsonl")[-1]
    assert (last["train/length_min"], last["train/length_max"]) == (3, 6)


def test_an_actor_with_other_spaces_is_named(tmp_path):
    given = ["env=gymnasium", "env.id=tests.worlds:rlx-test/Sized-v0", "acting.instances=2"]
    with pytest.raises((ConfigError, RunFailed), match=r"an actor has other observations"):
        rlx.run(rlx.compose([*TINY, *given, "+env.per_actor.size=[2,3]"]), tmp_path)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("+env.per_actor.length=[]", r"env.per_actor.length=\[\] has no element"),
        ("+env.per_actor.render_mode=[a,b]", "env.per_actor.render_mode is not set here"),
        ("+env.per_actor.length=3", "env.per_actor.length=3"),
    ],
)
def test_lists_that_make_no_sense_are_refused(given, says, tmp_path):
    env = ["env=gymnasium", "env.id=tests.worlds:rlx-test/Sized-v0"]
    with pytest.raises(ConfigError, match=says):
        rlx.run(rlx.compose([*TINY, *env, given]), tmp_path)


def test_options_of_envpool_may_differ_too():
    settings = {"height": 10, "width": 5}
    envs = pooled("Catch-v0", options=settings, per_actor={"width": [5, 7]})
    assert envs.problems(lanes=2) == []
    assert [envs.of_actor(i, 2).options["width"] for i in range(3)] == [5, 7, 5]
    (wrong,) = pooled("Catch-v0", options=settings, per_actor={"widht": [5]}).problems(lanes=2)
    assert "widht" in wrong
