"""Evaluations in other environments than the training's, several, each on a schedule of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rlx
from rlx.config import targets
from rlx.config.build import plain
from rlx.config.documents import read_json
from rlx.evaluate import main
from rlx.evaluation.playing import run_episodes
from rlx.problems import ConfigError
from rlx.runs.folders import EVALUATION_FILE, OTHER_EVALUATIONS_FILE, read_rows
from rlx.runs.scores import differences
from rlx.seeding import spawn_int
from rlx.training.checkpoint import Checkpointer
from rlx.training.hooks import Run
from rlx.types import Evaluated, Weights
from tests.training.test_run import TINY

SIZED = ["env=gymnasium", "env.id=tests.worlds:rlx-test/Sized-v0"]
OTHER = "{{_target_: rlx.evaluation.playing.Other, env: {env}, every_env_steps: {every}, "
OTHER += "episodes: {episodes}, epsilon: 0.0}}"


def other(env: str, every: int = 400, episodes: int = 3) -> str:
    return OTHER.format(env=env, every=every, episodes=episodes)


def others(**named: str) -> str:
    return "+evaluation.others={" + ", ".join(f"{k}: {v}" for k, v in named.items()) + "}"


class FinishAfterBoth:
    """Finishes the run when each evaluation was made once."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def on_evaluation(self, run: Run, evaluated: Evaluated) -> None:
        self.seen.add(evaluated.name)
        if self.seen == {"", "long"}:
            run.finish()


def run(folder: Any, *overrides: str) -> dict[str, Any]:
    return rlx.run(rlx.compose([*TINY, *SIZED, *overrides]), folder)


def test_the_run_is_evaluated_with_what_is_changed(tmp_path):
    changed = ["+evaluation.env.kwargs.length=9", "+evaluation.env.kwargs.reward=2.0"]
    summary = run(tmp_path, *changed, "evaluation.every_env_steps=600")
    assert summary["evaluation_return"] == 18.0
    last = read_rows(tmp_path / "metrics.jsonl")[-1]
    assert last["evaluation/return_mean"] == 18.0
    assert last["train/return_mean"] == last["train/return_max"] == 4.0
    assert rlx.load(tmp_path).evaluate(episodes=3)["returns"] == [18.0] * 3


def test_others_have_schedules_and_metrics_of_their_own(tmp_path):
    given = others(
        long=other("{kwargs: {length: 8}}"),
        rich=other("{kwargs: {reward: 7.0}}", every=600, episodes=5),
    )
    summary = run(tmp_path, "evaluation.every_env_steps=1000", given)
    rows = read_rows(tmp_path / "metrics.jsonl")

    def told(name: str) -> dict[int, float]:
        return {row["env_steps"]: row[name] for row in rows if row.get(name) is not None}

    assert set(told("evaluation/long/return_mean").values()) == {8.0}
    assert set(told("evaluation/rich/return_mean").values()) == {28.0}
    assert list(told("evaluation/long/return_mean")) == [400, 800, 1200]
    assert list(told("evaluation/rich/return_mean")) == [600, 1200]
    assert list(told("evaluation/return_mean")) == [1000, 1200]
    assert set(told("evaluation/rich/episodes").values()) == {5.0}
    assert told("evaluation/long/of_env_steps")[800] == pytest.approx(800, abs=40)
    assert summary["evaluation_return"] == 4.0
    one_is_made_by_command(tmp_path)


def one_is_made_by_command(folder: Path) -> None:
    """It is no score of the run."""
    main([f"run={folder}", "other=rich", "episodes=6"])
    assert not (folder / EVALUATION_FILE).exists()
    made = read_json(folder / OTHER_EVALUATIONS_FILE)["evaluations"][-1]
    assert made["returns"] == [28.0] * 6
    assert (made["other"], made["epsilon"]) == ("rich", 0.0)
    assert made["differs"] == ["the environment of evaluation.others.rich"]
    assert differences(made, plain(rlx.load(folder).cfg), made["env_steps"]) == made["differs"]
    with pytest.raises(ConfigError, match=r"other=\.\./away: a name of letters, digits and _"):
        rlx.load(folder).evaluate(episodes=1, other="../away")
    with pytest.raises(ConfigError, match="other=ritch: no evaluation of the run; accepted: long"):
        rlx.load(folder).evaluate(episodes=1, other="ritch")


def test_no_checkpoint_becomes_the_best_by_another_evaluation(tmp_path):
    run(tmp_path, others(rich=other("{kwargs: {reward: 7.0}}")), "evaluation.final_episodes=0")
    assert Checkpointer(tmp_path, None).best() is None


def test_they_change_no_bit_of_the_training(tmp_path):
    plain = run(tmp_path / "plain")
    given = others(rich=other("{kwargs: {reward: 7.0}}")), "+evaluation.env.kwargs.length=9"
    assert run(tmp_path / "watched", *given)["params_sha256"] == plain["params_sha256"]


def test_evaluations_of_other_names_and_purposes_share_no_start(tmp_path):
    """CartPole's first observation tells the start: all purposes and names differ."""
    rlx.run(rlx.compose(TINY), tmp_path)
    loaded = rlx.load(tmp_path)
    weights = Weights(version=0, params=loaded.params())
    starts: list[tuple[float, ...]] = []

    def watch(env: Any, timestep: Any, started: Any) -> None:
        for leaf in timestep.observation["observation"][timestep.first]:
            starts.append(tuple(np.round(leaf, 6).tolist()))

    for purpose, name in [("selection", ""), ("final", ""), ("test", ""), ("selection", "hard")]:
        run_episodes(
            agent=loaded.agent, weights=weights, family=loaded.family, episodes=4, lanes=4,
            epsilon=0.0, seed=0, purpose=purpose, name=name, watch=watch,
        )  # fmt: skip
    assert len(set(starts)) == len(starts) >= 16
    of_training = {spawn_int(0, "env", lane, 0) for lane in range(64)}
    of_selection = {spawn_int(0, "evaluation", "selection", lane) for lane in range(64)}
    assert not of_training & of_selection


@pytest.mark.xdist_group("in turn")
def test_an_evaluator_beside_the_training_makes_them_too(tmp_path, monkeypatch):
    given = others(long=other("{kwargs: {length: 8}}", every=300))
    actor = ["evaluation.where=actor", "evaluation.every_env_steps=300", given]
    more = ["replay.ratio=0.2", "total_env_steps=400_000", "logging.every_env_steps=2000"]
    finish = "hooks=[{_target_: tests.evaluation.test_elsewhere.FinishAfterBoth}]"
    monkeypatch.setattr(targets, "_allowed", {"rlx.", "tests."})
    run(tmp_path, *actor, *more, finish, "checkpoint.every_env_steps=1_000_000")
    rows = read_rows(tmp_path / "metrics.jsonl")
    found = {
        row["evaluation/long/return_mean"] for row in rows if "evaluation/long/return_mean" in row
    }
    assert found == {8.0}
    assert {row["evaluation/return_mean"] for row in rows} - {None} == {4.0}
    assert rows[-1]["env_steps"] < 400_000


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["+evaluation.env.kwargs.size=3"], "evaluation.env: the agent cannot act there: it has"),
        (["+evaluation.env.idd=x"], "evaluation.env.idd=x: no such setting; did you mean"),
        (["+evaluation.env.id=Nowhere-v0"], "evaluation.env: env.id='Nowhere-v0' is not regist"),
        ([others(hard=other("{idd: 3}"))], "evaluation.others.hard.env.idd=3: no such setting"),
        (
            [others(hard=other("{}", episodes=0))],
            "evaluation.others.hard.episodes=0 (c",
        ),
        (["+evaluation.others.hard=3"], "evaluation.others.hard=3"),
        (["+evaluation.env.per_actor.size=[2]"], "evaluation.env: an evaluation has no actors (pe"),
        (
            [others(hard=other("{family: {per_actor: {size: [2]}}}"))],
            "evaluation.others.hard.env: an evaluation has no actors",
        ),
        (
            ["+evaluation.others={1: " + other("{}") + "}"],
            "evaluation.others.1=1 (command line): a name is text; put it in quotes",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_refused(given, says, tmp_path):
    with pytest.raises(ConfigError) as caught:
        run(tmp_path, *given)
    assert says in str(caught.value)
    assert not (tmp_path / "env.json").exists()
