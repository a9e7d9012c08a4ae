"""Several tasks in one run: which lane plays which, the answers' order, returns of each."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import rlx
from rlx.acting.exploration import Constant
from rlx.acting.plan import Plan
from rlx.config.build import plain
from rlx.envs.tasks import Tasks
from rlx.problems import ConfigError
from rlx.runs.folders import read_rows
from tests import parts
from tests.envs.test_gymnasium import family
from tests.training.test_run import TINY, read

IDS = [f"tests.worlds:rlx-test/{name}-v0" for name in ("Short", "Middle", "Long")]
EVIL = "some_evil_module:Name-v0"
LENGTHS, RETURNS = (3, 4, 7), (3.0, 8.0, 35.0)
TASKS = ["env=tasks", f"env.ids=[{','.join(IDS)}]"]


def tasks(ids: list[str] = IDS) -> Tasks:
    return Tasks(ids=ids, family=family(ids[0]))


def shown(env: Any, answer: Any) -> list[float]:
    """The length that each lane's environment shows, in the order of the lanes."""
    found = np.zeros(env.lanes)
    found[answer.lane] = answer.observation["observation"][:, 0]
    return found.tolist()


@pytest.mark.parametrize("first", [0, 5])
def test_lanes_play_the_tasks_in_turn(first):
    made = tasks().of_actor(first // 5, 5).make(lanes=5, seeds=[1, 2, 3, 4, 5])
    answer = made.reset()
    wanted = [LENGTHS[(first + i) % 3] for i in range(5)]
    assert shown(made, answer) == wanted
    rng = np.random.default_rng(0)
    ended: list[Any] = []
    for _ in range(30):
        lane = rng.permutation(answer.lane).astype(np.int32)
        answer = made.step(np.zeros(5, np.int32), lane)
        assert shown(made, answer) == wanted
        ended += made.episodes()
    for episode in ended:
        number = (first + episode.lane) % 3
        assert episode.task == IDS[number]
        assert episode.return_ == RETURNS[number]
    assert {episode.lane for episode in ended} == set(range(5))
    made.close()


def test_actions_reach_the_lane_that_they_are_for():
    ids = ["CartPole-v1", "CartPole-v0"]
    made = tasks(ids).make(lanes=4, seeds=[7, 7, 7, 7])
    alone = family("CartPole-v1").make(lanes=1, seeds=[7])
    answer, other = made.reset(), alone.reset()
    for t in range(6):
        one = np.array([t % 2], np.int32)
        lane = np.array([3, 1, 0, 2], np.int32)
        action = np.where(lane == 2, t % 2, 1 - t % 2).astype(np.int32)
        answer, other = made.step(action, lane), alone.step(one, np.zeros(1, np.int32))
        at = int(np.flatnonzero(answer.lane == 2)[0])
        np.testing.assert_array_equal(
            answer.observation["observation"][at], other.observation["observation"][0]
        )
    made.close()
    alone.close()


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        (
            [],
            "env.family.id (conf/env/tasks.yaml): it is element 0 of env.ids, which has none; give",
        ),
        ([IDS[0]], "give two or more ids"),
        ([IDS[0], IDS[0]], "each of them once"),
        ([IDS[0], "tests.worlds:rlx-test/Wide-v0"], "observation is observation float32[3] in "),
        ([IDS[0], "tests.worlds:rlx-test/Masked-v0"], "tasks of one run have equal spaces"),
        ([IDS[0], "CartPole-v7"], "env.ids: CartPole-v7: env.id='CartPole-v7'"),
    ],
)
def test_tasks_that_do_not_go_together_are_named(ids, says, tmp_path):
    with pytest.raises(ConfigError) as caught:
        rlx.run(rlx.compose([*TINY, "env=tasks", f"env.ids=[{','.join(ids)}]"]), tmp_path)
    assert says in str(caught.value)


def test_every_task_needs_a_lane(tmp_path):
    with pytest.raises(ConfigError, match=r"env\.ids=3: 2 lanes play 2 of the 3 tasks"):
        rlx.run(rlx.compose([*TINY, *TASKS, "acting.envs_per_actor=2"]), tmp_path)


def test_lanes_of_several_learner_processes_go_on_where_the_others_end():
    """Two processes with two actors of two lanes: lanes 0, 1, 4, 5 and 2, 3, 6, 7 of the run."""
    wanted = {0: [0, 1, 4, 5], 1: [2, 3, 6, 7]}
    for rank, lanes in wanted.items():
        plan = Plan(
            family=tasks(), agent=parts.agent(), exploration=Constant(value=0.0), seed=0,
            instances=2, envs_per_actor=2, device="cpu", process=(rank, 2),
        )  # fmt: skip
        families = [plan.family_of(index) for index in range(2)]
        made = [each.make(lanes=2, seeds=[1, 2]) for each in families]
        found = [length for env in made for length in shown(env, env.reset())]
        assert found == [LENGTHS[lane % 3] for lane in lanes]
        for env in made:
            env.close()
    few = ["learner.processes=2", "acting.envs_per_actor=2"]
    assert not Tasks.clashes(plain(rlx.compose([*TINY, *TASKS, *few])))


@pytest.mark.parametrize("pool", ["local", "threads"])
def test_a_run_tells_the_returns_of_each_task(pool, tmp_path):
    tiny = [setting for setting in TINY if not setting.startswith("acting.")]
    lanes = [f"acting={pool}", "acting.envs_per_actor=6", "acting.env_steps_per_request=12"]
    every = ["evaluation.every_env_steps=600", "evaluation.episodes=7"]
    summary = rlx.run(rlx.compose([*tiny, *TASKS, *lanes, *every]), tmp_path)
    rows = read_rows(tmp_path / "metrics.jsonl")
    for name, length, return_ in zip(IDS, LENGTHS, RETURNS, strict=True):
        assert rows[-1][f"task/{name}/return_mean"] == return_
        assert rows[-1][f"task/{name}/length_mean"] == length
    evaluated = [row for row in rows if row["evaluation/return_mean"] is not None]
    assert [row["evaluation/episodes"] for row in evaluated] == [9.0, 6.0]  # three, two of each
    for row in evaluated:
        found = [row[f"task/{name}/evaluation_return_mean"] for name in IDS]
        assert found == list(RETURNS)
        assert row["evaluation/return_mean"] == pytest.approx(np.mean(RETURNS))
    assert summary["evaluation_return"] == pytest.approx(np.mean(RETURNS))
    again = rlx.load(tmp_path).evaluate(episodes=6)
    assert {name: one["mean"] for name, one in again["tasks"].items()} == dict(
        zip(IDS, RETURNS, strict=True)
    )
    assert again["episodes"] == 6


def test_returns_of_tasks_go_on_in_a_resumed_run(tmp_path):
    settings = [*TINY, *TASKS]
    rlx.run(rlx.compose(settings), tmp_path)
    saved = read(max((tmp_path / "checkpoints").glob("[0-9]*")), "meta.json")["metrics"]["tasks"]
    assert set(saved) == set(IDS)
    more = [*settings, f"resume={tmp_path}", "total_env_steps=1400"]
    rlx.run(rlx.compose(more), tmp_path)
    assert read_rows(tmp_path / "metrics.jsonl")[-1][f"task/{IDS[2]}/return_mean"] == RETURNS[2]


def test_modules_of_all_ids_are_not_imported_for_a_loaded_run_s_sake():
    from rlx.config.marks import refuse_modules

    settings = plain(rlx.compose([*TINY, *TASKS]))
    settings["env"]["ids"][1] = EVIL
    with pytest.raises(ConfigError, match="so some_evil_module is not imported"):
        refuse_modules(settings, "a run")


@pytest.mark.parametrize("where", ["env", "others"])
def test_modules_of_evaluations_are_not_imported_for_a_loaded_run_s_sake_either(where):
    from rlx.config.marks import refuse_modules

    other = {
        "_target_": "rlx.evaluation.playing.Other",
        **{"env": {"id": EVIL}, "every_env_steps": 1, "episodes": 1, "epsilon": 0.0},
    }
    settings = plain(rlx.compose([*TINY, "env=gymnasium"]))
    refuse_modules(settings, "a run")
    settings["evaluation"] |= {"env": {"id": EVIL}} if where == "env" else {"others": {"a": other}}
    settings["evaluation"]["others"]["b"] = 3  # which is refused later, in one line
    path = "evaluation.env.id" if where == "env" else "evaluation.others.a.env.id"
    with pytest.raises(ConfigError, match=f"{path}=.*so some_evil_module is not imported"):
        refuse_modules(settings, "a run")


def test_settings_of_actors_reach_the_tasks():
    given = tasks()
    given = type(given)(ids=IDS, family=family(IDS[0], per_actor={"length": [3, 9]}))
    made = given.of_actor(1, 3).make(lanes=3, seeds=[1, 2, 3])
    assert shown(made, made.reset()) == [9.0, 9.0, 9.0]
    made.close()
