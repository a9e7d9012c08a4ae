"""Callbacks of one's own: the points of whole runs, their order, metrics, state, and failures."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import pytest

import rlx
from rlx import trees
from rlx.cluster.faults import Replaced
from rlx.config import targets
from rlx.problems import ConfigError
from rlx.runs.folders import read_rows
from rlx.runs.metrics import without_wall_clock
from rlx.training.checkpoint_files import CheckpointError
from rlx.training.hooking import HookFailed
from rlx.training.hooks import POINTS, Run, no_hook
from rlx.training.restoring import check_meta
from rlx.types import Episode, Evaluated, Range, Rollout, Runtime
from tests.training.test_learner_group import names, two_loops
from tests.training.test_ray_run import RAY
from tests.training.test_run import TINY, checkpoints, read, run

HERE = "tests.training.test_hooks"
EVALUATED = "evaluation.every_env_steps=300"
TOLD: list[tuple[str, Any]] = []  # by the hooks of one test: (point, what was given)
CALLED: Counter[str] = Counter()
CLOSED: list[str] = []


@pytest.fixture(autouse=True)
def allowed(monkeypatch):
    monkeypatch.setattr(targets, "_allowed", {"rlx.", "tests."})
    TOLD.clear()
    CALLED.clear()
    CLOSED.clear()


def hooks(*nodes: str) -> str:
    return f"hooks=[{','.join(nodes)}]"


@dataclass(frozen=True, kw_only=True)
class Recorder:
    """Notes all that it is told, with the counts of then."""

    name: str

    def note(self, point: str, run: Run, given: Any) -> None:
        TOLD.append((point, (run.env_steps, run.updates, given)))

    def on_begin(self, run: Run) -> None:
        self.note("on_begin", run, run.output_dir)

    def on_rollout(self, run: Run, rollout: Rollout) -> None:
        self.note("on_rollout", run, rollout)

    def on_episodes(self, run: Run, episodes: Sequence[Episode]) -> None:
        self.note("on_episodes", run, episodes)
        for episode in episodes:
            run.record("mine/length", episode.env_steps)

    def on_update(self, run: Run, metrics: Mapping[str, Any]) -> None:
        self.note("on_update", run, set(metrics))
        run.record("mine/twice_the_loss", 2 * metrics["learner/loss"])

    def on_evaluation(self, run: Run, evaluated: Evaluated) -> None:
        self.note("on_evaluation", run, evaluated)

    def on_checkpoint(self, run: Run, path: Path) -> None:
        self.note("on_checkpoint", run, (path, (path / "manifest.json").exists()))

    def on_actor_replaced(self, run: Run, replaced: Replaced) -> None:
        self.note("on_actor_replaced", run, replaced)

    def on_end(self, run: Run, summary: Mapping[str, Any]) -> None:
        self.note("on_end", run, (summary["state"], run.params()))

    def close(self) -> None:
        CLOSED.append(self.name)


RECORDER = f"{{_target_:{HERE}.Recorder,name:recorder}}"


def given(point: str) -> list[Any]:
    return [what for told, what in TOLD if told == point]


def check_told(summary: Mapping[str, Any], folder: Path) -> None:
    """All that happened was told, once, and counts agree with the run's own."""
    assert TOLD[0][0] == "on_begin"
    assert TOLD[-1][0] == "on_end"
    assert given("on_begin")[0][2] == folder
    made = sum(rollout.env_steps for _, _, rollout in given("on_rollout"))
    assert made == summary["env_steps"]
    assert len(given("on_update")) == summary["updates"] > 0
    assert all("learner/loss" in metrics for _, _, metrics in given("on_update"))
    rows = read_rows(folder / "metrics.jsonl")
    episodes = [episode for _, _, found in given("on_episodes") for episode in found]
    assert len(episodes) == rows[-1]["train/episodes"] > 0
    assert all(written for _, _, (_, written) in given("on_checkpoint"))
    assert summary["state"] == given("on_end")[0][2][0] == "finished"
    assert CLOSED == ["recorder"]


def test_every_point_is_told_of_what_the_run_did(tmp_path):
    summary = run(tmp_path, EVALUATED, hooks(RECORDER))
    check_told(summary, tmp_path)
    evaluated = [each for _, _, each in given("on_evaluation")]
    assert [len(each.returns) for each in evaluated] == [4] * len(evaluated)
    rows = read_rows(tmp_path / "metrics.jsonl")
    scores = [row["evaluation/return_mean"] for row in rows]
    assert np.mean(evaluated[-1].returns) == scores[-1]
    assert len(evaluated) == sum(score is not None for score in scores)
    saved = [path.name for _, _, (path, _) in given("on_checkpoint")]
    assert saved == [path.name for path in checkpoints(tmp_path)]
    assert len(saved) == 3
    params = trees.flatten(given("on_end")[0][2][1])
    loaded = trees.flatten(rlx.load(tmp_path).params())
    assert all(np.array_equal(params[name], loaded[name]) for name in loaded)


def test_what_hooks_record_stands_in_the_rows(tmp_path):
    run(tmp_path, hooks(RECORDER))
    first, *_ = read_rows(tmp_path / "metrics.jsonl")
    lengths = [
        episode.env_steps
        for env_steps, _, episodes in given("on_episodes")
        for episode in episodes
        if env_steps <= first["env_steps"]
    ]
    assert first["mine/length"] == pytest.approx(np.mean(lengths))
    with_loss = [r for r in read_rows(tmp_path / "metrics.jsonl") if r["learner/loss"] is not None]
    assert with_loss
    for row in with_loss:
        assert row["mine/twice_the_loss"] == pytest.approx(2 * row["learner/loss"], rel=1e-5)


def test_a_run_with_hooks_that_only_look_is_the_same_bits(tmp_path):
    plain, hooked = (run(tmp_path / n, EVALUATED, *more) for n, more in (
        ("plain", ()), ("hooked", (hooks(RECORDER),))
    ))  # fmt: skip
    assert plain["params_sha256"] == hooked["params_sha256"]
    rows = [read_rows(tmp_path / name / "metrics.jsonl") for name in ("plain", "hooked")]
    for before, after in zip(*rows, strict=True):
        now = {k: v for k, v in without_wall_clock(after).items() if not k.startswith("mine/")}
        assert without_wall_clock(before) == now


def test_threads_tell_hooks_as_the_local_pool_does(tmp_path):
    pool = ["acting=threads", "acting.envs_per_actor=4", "acting.env_steps_per_request=8"]
    tiny = [setting for setting in TINY if not setting.startswith("acting.")]
    summary = rlx.run(rlx.compose([*tiny, *pool, hooks(RECORDER)]), tmp_path)
    check_told(summary, tmp_path)


class KillsOne(Recorder):
    """Kills an actor's process once, and finishes the run when it is back."""

    def on_update(self, run: Run, metrics: Mapping[str, Any]) -> None:
        super().on_update(run, metrics)
        if not KILLED and (there := ACTORS[0]()):
            KILLED.append(there[0][0])
            os.kill(there[0][1], signal.SIGKILL)

    def on_actor_replaced(self, run: Run, replaced: Replaced) -> None:
        super().on_actor_replaced(run, replaced)
        run.finish()


ACTORS: list[Any] = []  # a function that gives (index, process) of those that are there
KILLED: list[int] = []


@pytest.mark.xdist_group("in turn")
def test_a_replaced_ray_actor_is_told(tmp_path, monkeypatch):
    from rlx.acting.ray_pool import OpenRayPool

    collect = OpenRayPool.collect

    def watched(pool: OpenRayPool, *given: Any) -> Any:
        slots = pool._fleet.slots
        ACTORS[:] = [lambda: [(s.index, s.where.pid) for s in slots if s.state == "ready"]]
        return collect(pool, *given)

    monkeypatch.setattr(OpenRayPool, "collect", watched)
    killing = f"{{_target_:{HERE}.KillsOne,name:recorder}}"
    more = ["replay.ratio=null", "total_env_steps=10_000_000", "stop_after_s=120"]
    summary = run(tmp_path, *RAY, *more, "logging.every_env_steps=2000", hooks(killing))
    check_told(summary, tmp_path)
    ((_, _, replaced),) = given("on_actor_replaced")
    assert replaced == Replaced(actor=KILLED[0], chain=1, cause="died")
    assert summary["wall_s"] < 120


# --- state ---------------------------------------------------------------------------------------


class Counting:
    def __init__(self, *, start: Annotated[int, Range(ge=0)], seed: Runtime[int]) -> None:
        self.updates, self.seed = start, seed

    def on_update(self, run: Run, metrics: Mapping[str, Any]) -> None:
        self.updates += 1

    def on_end(self, run: Run, summary: Mapping[str, Any]) -> None:
        TOLD.append(("on_end", (self.updates, self.seed)))

    def state(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.updates = state["updates"]


COUNTING = f"{{_target_:{HERE}.Counting,start:100}}"


def test_a_hook_goes_on_where_the_checkpoint_left_it(tmp_path):
    first = run(tmp_path, hooks(COUNTING), "seed=7")
    assert given("on_end") == [(100 + first["updates"], 7)]
    more = [f"resume={tmp_path}", "total_env_steps=1600", "seed=7"]
    last = run(tmp_path, *more, hooks(COUNTING))
    assert given("on_end")[1:] == [(100 + last["updates"], 7)]
    assert last["updates"] > first["updates"]


def test_another_hook_in_its_place_begins_anew(tmp_path):
    run(tmp_path, hooks(COUNTING))
    TOLD.clear()
    more = [f"resume={tmp_path}", "total_env_steps=1600"]
    run(tmp_path, *more, hooks(RECORDER, COUNTING))
    assert given("on_end")[-1][0] == 100 + len(given("on_update"))


# --- failures ------------------------------------------------------------------------------------


class Odd(Exception):
    def __str__(self) -> str:
        raise KeyError("no words")


@dataclass(frozen=True, kw_only=True)
class Ending:
    """Ends the process, or raises what cannot tell itself, at its third update and in close."""

    how: str

    def on_update(self, run: Run, metrics: Mapping[str, Any]) -> None:
        if run.updates == 3 and self.how != "close":
            raise SystemExit(0) if self.how == "exit" else Odd
        with pytest.raises(TypeError):
            metrics["learner/loss"] = 0  # type: ignore[index]

    def close(self) -> None:
        raise SystemExit(0) if self.how == "exit" else Odd


@pytest.mark.parametrize(("how", "raised"), [("exit", "SystemExit"), ("odd", "Odd")])
def test_what_ends_a_process_or_has_no_words_is_a_failure_of_the_hook(how, raised, tmp_path):
    with pytest.raises(HookFailed, match=rf"Ending\) raised {raised} in on_update: "):
        run(tmp_path, hooks(f"{{_target_:{HERE}.Ending,how:{how}}}"))
    assert names(tmp_path)


def test_what_is_raised_at_the_close_is_told_and_the_run_has_its_summary(tmp_path, caplog):
    done = run(tmp_path, hooks(f"{{_target_:{HERE}.Ending,how:close}}"))
    assert done["state"] == "finished"
    assert f"hooks.0 ({HERE}.Ending) raised Odd in close" in caplog.text


@dataclass(frozen=True, kw_only=True)
class Failing:
    """Raises at this point, the n-th time."""

    at: str
    after: int

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name.startswith("on_") or name == "state":
            CALLED[name] += 1
            if name == self.at and CALLED[name] > self.after:
                raise ZeroDivisionError("no gain\nno pain")
        return found

    def on_begin(self, run: Run) -> None: ...
    def on_rollout(self, run: Run, rollout: Rollout) -> None: ...
    def on_episodes(self, run: Run, episodes: Sequence[Episode]) -> None: ...
    def on_update(self, run: Run, metrics: Mapping[str, Any]) -> None: ...
    def on_evaluation(self, run: Run, evaluated: Evaluated) -> None: ...
    def on_checkpoint(self, run: Run, path: Path) -> None: ...
    def on_end(self, run: Run, summary: Mapping[str, Any]) -> None: ...
    def state(self) -> dict[str, Any]:
        return {}


def failing(at: str, after: int = 1) -> str:
    return f"{{_target_:{HERE}.Failing,at:{at},after:{after}}}"


RAISING = [*(point for point in POINTS if point != "on_actor_replaced"), "state"]


@pytest.mark.parametrize("point", RAISING)
def test_a_hook_that_raises_is_named_and_the_run_ends_with_a_checkpoint(point, tmp_path, caplog):
    after = 0 if point in ("on_begin", "on_end") else 1
    with pytest.raises(HookFailed) as caught:
        run(tmp_path, EVALUATED, hooks(RECORDER, failing(point, after)))
    says = f"hooks.1 ({HERE}.Failing) raised ZeroDivisionError in {point}: no gain"
    assert str(caught.value) == says
    assert "in __getattribute__" in caplog.text  # where it was raised
    assert read(tmp_path, "status.json")["state"] == "failed"
    assert says in read(tmp_path, "status.json")["error"]
    assert names(tmp_path)
    assert CLOSED == ["recorder"]
    if point in ("on_rollout", "on_end"):  # in the middle of a turn, and after all of them
        finished = run(tmp_path, f"resume={tmp_path}", EVALUATED, hooks(RECORDER))
        assert finished["state"] == "finished"


def test_a_run_goes_on_from_where_its_hook_failed(tmp_path):
    with pytest.raises(HookFailed):
        run(tmp_path, hooks(failing("on_update", 9), RECORDER))
    # No hook is told of anything after it, not of the checkpoint either.
    assert len(given("on_update")) == 9
    assert given("on_checkpoint") == given("on_end") == []
    assert read(tmp_path / "checkpoints" / max(names(tmp_path)), "meta.json")["updates"] == 10


@dataclass(frozen=True, kw_only=True)
class Recording:
    metric: str

    def on_update(self, run: Run, metrics: Mapping[str, Any]) -> None:
        run.record(self.metric, 1.0)


@pytest.mark.parametrize("name", ["env_steps", "learner/loss", "time/mine", "mine", "/mine", "my/"])
def test_metrics_of_ones_own_do_not_mix_with_those_of_rlx(name, tmp_path):
    with pytest.raises(HookFailed, match=f"'{name}': a metric of your own is 'group/name'"):
        run(tmp_path, hooks(f"{{_target_:{HERE}.Recording,metric:{name}}}"))


@dataclass(frozen=True, kw_only=True)
class NotJSON:
    big: int

    def on_update(self, run: Run, metrics: Mapping[str, Any]) -> None: ...

    def state(self) -> dict[str, Any]:
        return {"array": np.zeros(self.big)}


def test_a_state_that_cannot_be_saved_is_named(tmp_path):
    with pytest.raises(HookFailed, match=r"hooks\.0 \(.*NotJSON\) raised TypeError in state"):
        run(tmp_path, hooks(f"{{_target_:{HERE}.NotJSON,big:3}}"))
    meta = read(tmp_path / "checkpoints" / max(names(tmp_path)), "meta.json")
    assert meta["hooks"] == [{"hook": f"{HERE}.NotJSON", "state": {}}]


@dataclass(frozen=True, kw_only=True)
class Numbered:
    """Its state has a number as a key, which JSON turns into a string."""

    key: int

    def on_update(self, run: Run, metrics: Mapping[str, Any]) -> None: ...

    def state(self) -> dict[Any, Any]:
        return {self.key: 1}


def test_a_state_that_would_come_back_as_another_is_named(tmp_path):
    with pytest.raises(HookFailed, match=r"raised TypeError in state: state\(\) is not what JSON"):
        run(tmp_path, hooks(f"{{_target_:{HERE}.Numbered,key:3}}"))
    assert names(tmp_path)


def forgets(hook: Any, state: Mapping[str, Any]) -> None:
    raise KeyError("update")


def test_a_hook_that_cannot_take_its_state_leaves_it_in_the_checkpoint(tmp_path):
    run(tmp_path, hooks(COUNTING))
    (before,) = read(checkpoints(tmp_path)[-1], "meta.json")["hooks"]
    saved = {path.name: path.stat().st_mtime_ns for path in checkpoints(tmp_path)}
    meta = checkpoints(tmp_path)[-1] / "meta.json"
    assert before["state"]["updates"] > 100
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Counting, "restore", forgets)
        with pytest.raises(HookFailed, match=r"raised KeyError in restore: 'update'"):
            run(tmp_path, f"resume={tmp_path}", "total_env_steps=1600", hooks(COUNTING))
    assert {path.name: path.stat().st_mtime_ns for path in checkpoints(tmp_path)} == saved
    assert json.loads(meta.read_text())["hooks"] == [before]


@dataclass(frozen=True, kw_only=True)
class Texting:
    text: str

    def on_update(self, run: Run, metrics: Mapping[str, Any]) -> None:
        odd = {"key": jax.random.key(0), "complex": jax.numpy.ones(2) * 1j}
        run.record("mine/text", odd.get(self.text, self.text))


@pytest.mark.parametrize("given", ["high", "key", "complex"])
def test_what_is_no_number_is_not_recorded(given, tmp_path):
    with pytest.raises(HookFailed, match=r"hooks\.0 .* raised ValueError in on_update"):
        run(tmp_path, hooks(f"{{_target_:{HERE}.Texting,text:{given}}}"))


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("hooks", {"hooks": [1]}),
        ("hooks", {"hooks": {"state": {}}}),
        ("hooks", {"hooks": [{"state": [1]}]}),
        ("metrics", {"metrics": {"tasks": []}}),
        ("metrics", {"metrics": {"tasks": {"a": [["x"]]}}}),
        ("metrics", {"metrics": {"actions": None}}),
        ("quota", {"quota": {"changed_at": "x"}}),
        ("quota", {"quota": {"earned_rows": None}}),
    ],
)
def test_a_checkpoint_whose_counts_are_of_another_kind_is_damaged(part, changes, trained):
    restored = rlx.load(trained).restore()
    assert check_meta(restored) is restored
    changed = {k: {**restored.meta[k], **v} if k != "hooks" else v for k, v in changes.items()}
    forged = dataclasses.replace(restored, meta={**restored.meta, **changed})
    with pytest.raises(CheckpointError, match=f"it has no {part} of a run"):
        check_meta(forged)


def test_a_run_is_loaded_without_the_packages_of_its_hooks(tmp_path, monkeypatch):
    run(tmp_path, hooks(COUNTING))
    monkeypatch.setattr(targets, "_allowed", {"rlx."})
    assert len(rlx.load(tmp_path).evaluate(episodes=2)["returns"]) == 2


@pytest.mark.parametrize("point", ["on_update", "on_evaluation", "on_end"])
def test_a_hook_that_fails_in_one_learner_process_ends_all_of_them(point, tmp_path):
    """The hooks of both processes are the same class, and only the first one evaluates."""
    once = f"{{_target_:{HERE}.FailsInTheFirst,at:{point}}}"
    given = [hooks(once), EVALUATED, "total_env_steps=1200"]
    failed, other = two_loops(tmp_path, *given)
    assert isinstance(failed, HookFailed)
    assert other == ("finished" if point == "on_end" else "interrupted")
    assert names(tmp_path) == names(tmp_path / "learners" / "1") != set()


@dataclass(frozen=True, kw_only=True)
class FailsInTheFirst:
    at: str

    def fail(self, point: str, run: Run) -> None:
        if point == self.at and run.rank == 0:
            raise KeyError(point)

    def on_update(self, run: Run, metrics: Mapping[str, Any]) -> None:
        self.fail("on_update", run)

    def on_evaluation(self, run: Run, evaluated: Evaluated) -> None:
        self.fail("on_evaluation", run)

    def on_end(self, run: Run, summary: Mapping[str, Any]) -> None:
        self.fail("on_end", run)


def test_both_learner_processes_hear_of_all_episodes(tmp_path):
    assert two_loops(tmp_path, hooks(RECORDER), "total_env_steps=1200") == ["finished"] * 2
    heard = Counter(len(found) for _, _, found in given("on_episodes"))
    rows = [read_rows(f / "metrics.jsonl") for f in (tmp_path, tmp_path / "learners" / "1")]
    assert sum(number * times for number, times in heard.items()) == sum(
        found[-1]["train/episodes"] for found in rows
    )
    assert rows[0][-1]["train/episodes"] == rows[1][-1]["train/episodes"]


def test_a_run_finishes_at_a_score(tmp_path):
    node = "{_target_:rlx.training.hooks.FinishAtScore,score:1.0}"  # CartPole gives 1 a step
    summary = run(tmp_path, EVALUATED, hooks(node))
    assert summary["state"] == "finished"
    assert 300 <= summary["env_steps"] < 400
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "finished"
    out_of_reach = node.replace("1.0", "501.0")
    assert run(tmp_path / "b", EVALUATED, hooks(out_of_reach))["env_steps"] >= 1200


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("node", "says"),
    [
        ("{_target_:os.System}", "hooks.0._target_=os.System (command line): not allowed"),
        (
            "{_target_:rlx.training.hooks.FinishAtScor,score:1}",
            "did you mean rlx.training.hooks.FinishAtScore?",
        ),
        ("{_target_:rlx.training.hooks.FinishAtScore,scor:1}", "did you mean hooks.0.score?"),
        ("{_target_:rlx.training.hooks.FinishAtScore,score:high}", "hooks.0.score=high"),
        (
            "{_target_:rlx.networks.cores.LSTM,units:8}",
            "LSTM has none of a hook's methods: on_",
        ),
        ("FinishAtScore", "hooks.0=FinishAtScore"),
    ],
)
def test_what_is_wrong_with_a_hook_is_said_before_anything_starts(node, says, tmp_path):
    with pytest.raises(ConfigError) as caught:
        rlx.run(rlx.compose([*TINY, hooks(node)]), tmp_path)
    assert says in str(caught.value)
    assert not (tmp_path / "env.json").exists()


def test_a_misspelt_point_is_said():
    film = type("Film", (), {"on_rolout": lambda self, run, rollout: None})
    assert no_hook(film) == "Film.on_rolout is no point of a run; did you mean on_rollout?"
    assert no_hook(Recorder) == ""


def test_hooks_that_are_no_list_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"hooks=x.*accepted: a list"):
        rlx.run(rlx.compose([*TINY, "hooks=x"]), tmp_path)
