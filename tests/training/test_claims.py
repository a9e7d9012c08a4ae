"""A run says of itself what it did: scores, the best parameters, schedules, accounts."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import rlx
from rlx import evaluate, results
from rlx.config.build import plain
from rlx.envs.envpool import EnvPool
from rlx.evaluation.playing import Evaluation
from rlx.problems import ConfigError
from rlx.runs.status import params_sha256
from rlx.training.assemble import assemble
from rlx.training.stages import Stages
from rlx.types import Episode
from tests.training.test_run import EVALUATED, REQUEST, TINY, read, rows, run

Spy = Callable[..., Any]


def spied(monkeypatch: pytest.MonkeyPatch, cls: type, name: str, seen: Spy) -> None:
    """Has `seen` called with the arguments and the answer of a method, which stays as it is."""
    real = getattr(cls, name)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        answer = real(self, *args, **kwargs)
        seen(*args, answer=answer, **kwargs)
        return answer

    monkeypatch.setattr(cls, name, method)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    run(folder, EVALUATED)
    return folder


# --- the best, and the score ---------------------------------------------------------------------


def test_the_best_is_what_was_evaluated(monkeypatch, tmp_path):
    """Evaluations are oftener than checkpoints, and none is made at the env steps of one."""
    found: dict[str, float] = {}  # hash of the acting parameters -> mean return

    def seen(*, weights: Any, answer: list[Episode], **_: Any) -> None:
        returns = [episode.return_ for episode in answer]
        found[params_sha256(weights.params)] = sum(returns) / len(returns)

    spied(monkeypatch, Evaluation, "play", seen)
    run(tmp_path, "evaluation.every_env_steps=110", "checkpoint.every_env_steps=500")
    assert len(found) > 8
    loaded = rlx.load(tmp_path)
    best, restored = params_sha256(loaded.params("best")), loaded.restore("best")
    assert found[best] == max(found.values())
    assert restored.replay_state is None
    assert read(restored.path, "manifest.json")["body"]["score"] == found[best]
    assert len(list((tmp_path / "checkpoints").glob("best-*"))) == 1


def test_a_worse_evaluation_replaces_no_better_one_in_a_resumed_run(monkeypatch, tmp_path):
    scores = iter([-1.0, 0.0, -2.0, -3.0, float("nan"), 0.0])

    def played(*_: Any, **__: Any) -> list[Episode]:
        return [Episode(return_=next(scores), env_steps=1, frames=1, lane=0)]

    monkeypatch.setattr(Evaluation, "play", played)
    clocks = ("evaluation.every_env_steps=200", "evaluation.final_episodes=0")
    run(tmp_path, *clocks, "total_env_steps=600")
    assert rlx.load(tmp_path).restore("best").env_steps // 200 == 2
    run(None, *clocks, f"resume={tmp_path}", "total_env_steps=1000")
    assert rlx.load(tmp_path).restore("best").env_steps // 200 == 2
    run(None, *clocks, f"resume={tmp_path}", "total_env_steps=1200")  # as good, and newer
    assert rlx.load(tmp_path).restore("best").env_steps // 200 == 6


@pytest.mark.parametrize(
    "other", [["epsilon=0.5"], ["episodes=2"], ["which=older"]], ids=["epsilon", "few", "older"]
)
def test_only_evaluations_by_the_runs_own_protocol_are_its_score(evaluated, tmp_path, other):
    folder = Path(shutil.copytree(evaluated, tmp_path / "run"))
    own = results.runs(folder).loc[0]
    older = sorted((folder / "checkpoints").glob("[0-9]*"))[0]
    other = [f"which={older}" if option == "which=older" else option for option in other]
    evaluate.main([f"run={folder}", "episodes=4", *other])
    assert results.runs(folder).loc[0].equals(own)
    assert not (folder / "evaluation.json").exists()
    (kept,) = read(folder, "other_evaluations.json")["evaluations"]
    assert len(kept["differs"]) == 1
    evaluate.main([f"run={folder}", "episodes=5"])
    (score,) = read(folder, "evaluation.json")["evaluations"]
    assert results.runs(folder).loc[0, "evaluation.json"] == score["mean"]
    evaluate.main([f"run={folder}", "episodes=4", *other, f"output={folder / 'evaluation.json'}"])
    assert results.runs(folder).loc[0, "evaluation.json"] == score["mean"]


def test_an_evaluation_of_a_run_that_went_on_is_no_score_of_it_any_more(evaluated, tmp_path):
    folder = Path(shutil.copytree(evaluated, tmp_path / "run"))
    evaluate.main([f"run={folder}", "episodes=4"])
    assert results.runs(folder).loc[0, "evaluation.json"] is not None
    run(None, f"resume={folder}", "total_env_steps=1300")
    assert results.runs(folder).loc[0, "evaluation.json"] is None


def test_training_selection_final_and_test_start_differently(monkeypatch, tmp_path):
    made: list[tuple[int, ...]] = []
    spied(monkeypatch, EnvPool, "make", lambda *, seeds, **_: made.append(tuple(seeds)))
    run(tmp_path, EVALUATED, "total_env_steps=700")
    evaluate.main([f"run={tmp_path}", "episodes=4"])
    training, selection, again, final, test = made
    assert selection == again
    seeds = [*training, *selection, *final, *test]
    assert len(set(seeds)) == len(seeds)


# --- resumed runs --------------------------------------------------------------------------------


ANNEALED = (
    "replay.importance_exponent=0.2",
    "replay.importance_exponent_final=1.0",
    "replay.anneal_env_steps=1000",
    "checkpoint.replay=false",
)


def exponents(folder: Path) -> list[tuple[int, float]]:
    return [(row["env_steps"], row["replay/importance_exponent"]) for row in rows(folder)]


def test_importance_is_annealed_by_the_runs_env_steps_without_its_replay(tmp_path):
    run(tmp_path, *ANNEALED, "total_env_steps=600")
    run(None, *ANNEALED, f"resume={tmp_path}", "total_env_steps=800")
    saved = ("checkpoint.replay=true",)  # and with it from now on
    run(None, *ANNEALED, *saved, f"resume={tmp_path}", "total_env_steps=900")
    run(None, *ANNEALED, *saved, f"resume={tmp_path}", "total_env_steps=1200")
    for env_steps, exponent in exponents(tmp_path):
        assert exponent == pytest.approx(min(1.0, 0.2 + 0.8 * env_steps / 1000), abs=0.04)


def test_importance_of_recorded_experience_is_annealed_so_too(tmp_path):
    run(tmp_path / "acting", f"replay.record={tmp_path / 'experience'}")
    fitting = [s for s in TINY if not s.startswith("replay.capacity")]
    offline = ("replay=dataset", f"replay.path={tmp_path / 'experience'}", *ANNEALED)
    learning = tmp_path / "learning"
    rlx.run(rlx.compose([*fitting, *offline, "total_env_steps=600"]), learning)
    rlx.run(rlx.compose([*fitting, *offline, f"resume={learning}", "total_env_steps=800"]))
    for env_steps, exponent in exponents(learning):
        assert exponent == pytest.approx(min(1.0, 0.2 + 0.8 * env_steps / 1000), abs=0.04)


@pytest.mark.parametrize("ratio", ["0.1", "4.0"])
def test_another_ratio_counts_from_now_on(ratio, caplog, tmp_path):
    before = run(tmp_path, "total_env_steps=800")
    caplog.clear()
    after = run(None, f"resume={tmp_path}", f"replay.ratio={ratio}")
    assert f"replay.ratio={ratio.removesuffix('.0')}, 0.8 before: a new account" in caplog.text
    more = after["env_steps"] - before["env_steps"]
    expected, burst = float(ratio) * more / 16, float(ratio) * 2 * REQUEST / 16
    assert 1 <= after["updates"] - before["updates"] == pytest.approx(expected, abs=2 + burst)
    caplog.clear()
    run(None, f"resume={tmp_path}", f"replay.ratio={ratio}", "total_env_steps=1300")
    assert "new account" not in caplog.text


def test_a_clock_that_rings_when_the_run_is_stopped_is_heard_when_it_goes_on(monkeypatch, tmp_path):
    learn = Stages.learn

    def learn_and_stop(stages: Stages) -> None:
        learn(stages)
        if stages.count.env_steps >= 300:
            stages.stop.set()

    monkeypatch.setattr(Stages, "learn", learn_and_stop)
    stopped = run(tmp_path, EVALUATED)
    assert (stopped["state"], stopped["evaluation_return"]) == ("interrupted", None)
    monkeypatch.undo()
    run(None, EVALUATED, f"resume={tmp_path}", "total_env_steps=500")
    whole = [row for row in rows(tmp_path) if row["evaluation/return_mean"] is not None]
    assert len(whole) == 2  # the one that was due, and the final one
    assert whole[0]["evaluation/weights_version"] == stopped["updates"]


def test_a_total_below_what_was_made_is_refused(evaluated, tmp_path):
    folder = Path(shutil.copytree(evaluated, tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"total_env_steps=100: the run has made 1,20\d env step"):
        run(None, f"resume={folder}", "total_env_steps=100")
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    assert run(None, f"resume={folder}", "total_env_steps=1200")["state"] == "finished"


# --- weights and priorities ----------------------------------------------------------------------


@pytest.mark.parametrize(("acting", "early"), [("threads", True), ("local", False)])
def test_an_update_is_settled_as_soon_as_it_is_done(acting, early, tmp_path):
    """The seed promises its place in the order of a turn with `acting=local`."""
    settings = plain(rlx.compose([*TINY, f"acting={acting}", "learner.publish_every_updates=1"]))
    with assemble(settings, tmp_path, resume=False) as parts:
        stages = Stages(parts)
        stages.publish()
        while stages._in_flight is None:
            stages.act()
            stages.agree()
            stages.learn()
        while parts.learner.is_busy:
            time.sleep(0.01)
        stages.act()
        assert (stages._in_flight is None) is early
        assert (stages._acting_version == parts.learner.updates) is early
        stages.metrics.close()


class Arrived:
    """A pool whose answers come 16 at a time, as those of many actors do after a long update."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def collect(self, timeout_s: float, updates: int) -> list[Any]:
        return [row for _ in range(16) for row in self._pool.collect(timeout_s, updates)]


def test_what_comes_at_once_waits_for_the_learner_and_none_of_it_is_dropped(tmp_path):
    given = ["agent=impala", "network=mlp", "env=cartpole", "agent.unroll=8", "replay.max_delay=96"]
    given += ["acting.envs_per_actor=4", "acting.env_steps_per_request=32", "learner.batch_size=4"]
    settings = plain(rlx.compose([*given, "logging.console=off", "replay.capacity=2048"]))
    with assemble(settings, tmp_path, resume=False) as parts:
        stages = Stages(dataclasses.replace(parts, pool=Arrived(parts.pool)))
        stages.publish()
        while parts.learner.updates < 20:
            stages.act()
            stages.agree()
            stages.learn()
            assert stages.count.env_steps <= 32 * (parts.learner.updates + 3)
        assert parts.replay.stats()["replay/dropped_sequences"] == 0
        stages.metrics.close()
