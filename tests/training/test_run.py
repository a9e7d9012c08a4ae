"""Whole runs at toy size: same bits, resume, signals, quota, weights, lanes, errors, devices."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import rlx
from rlx import trees
from rlx.acting.local_pool import OpenLocalPool
from rlx.config.build import plain
from rlx.envs.envpool import EnvPoolLanes
from rlx.problems import ConfigError, Problem
from rlx.replay.files.snapshots import Snapshots
from rlx.replay.process.client import ReplayLost
from rlx.runs.folders import read_rows
from rlx.runs.metrics import Metrics, without_wall_clock
from rlx.training import checkpoint_files
from rlx.training.agreement import check_agreement
from rlx.training.assemble import assemble
from rlx.training.keeper import Keeper
from rlx.training.learner import OpenLearner
from rlx.training.nonfinite import NonFinite
from rlx.training.stages import Stages

ROOT = Path(__file__).resolve().parents[2]
LANES, REQUEST, ROWS_PER_UPDATE, ROW_EVERY = 4, 8, 16, 200
TINY = [
    "agent.burn_in=2",
    "agent.unroll=4",
    "agent.stride=2",
    "agent.block_rows=2",
    "agent.n_step=2",
    *("agent.target_period_updates=5", "agent.target_rate=null"),
    "learner.batch_size=4",
    "learner.publish_every_updates=2",
    "replay.min_sequences=4",
    "replay.capacity=2000",
    "replay.ratio=0.8",
    "acting.envs_per_actor=4",
    "acting.env_steps_per_request=8",
    "network.torso.layers=[8]",
    "network.core.units=8",
    "agent.head.hidden=8",
    "evaluation.episodes=4",
    "evaluation.final_episodes=4",
    "logging.every_env_steps=200",
    "logging.tensorboard=false",
    "logging.console=off",
    "checkpoint.every_env_steps=400",
    "total_env_steps=1200",
]
EVALUATED = "evaluation.every_env_steps=300"
# A run that sends itself a signal once it has made so many env steps.
STOPPED = """
import os, sys
number, env_steps = int(sys.argv.pop(1)), int(sys.argv.pop(1))
from rlx import train
from rlx.training.stages import Stages
learn = Stages.learn
def learn_and_stop(loop):
    learn(loop)
    if loop.count.env_steps >= env_steps:
        os.kill(os.getpid(), number)
Stages.learn = learn_and_stop
train.main()
"""


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    """Every program is compiled once, for these runs and for those in processes of their own."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    precision = {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}  # as tests/conftest.py sets it here
    yield {name.upper(): str(value) for name, value in settings.items()} | precision
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run with evaluations and checkpoints that several tests look at."""
    folder = tmp_path_factory.mktemp("base") / "run"
    return run(folder, EVALUATED), folder


@pytest.fixture
def loops(monkeypatch):
    """The loops of the runs that the test makes."""
    made: list[Stages] = []
    begin = Keeper.begin
    monkeypatch.setattr(
        Keeper, "begin", lambda keeper: (made.append(keeper._stages), begin(keeper))[1]
    )
    return made


def run(folder: Path | None, *overrides: str) -> dict[str, Any]:
    return rlx.run(rlx.compose([*TINY, *overrides]), folder)


def train(*arguments: str, env: dict[str, str], code: str | None = None) -> Any:
    """`python -m rlx.train`, or other code, in a process of its own."""
    start = ["-m", "rlx.train"] if code is None else ["-c", code]
    return subprocess.run(
        [sys.executable, *start, *arguments],
        cwd=ROOT,
        env={**os.environ, **env, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def stopped(number: int, env_steps: int, *arguments: str, env: dict[str, str]) -> Any:
    """A run that gets this signal when it has made so many env steps."""
    return train(str(int(number)), str(env_steps), *arguments, env=env, code=STOPPED)


def rows(folder: Path) -> list[dict[str, Any]]:
    """The part of their rows that two runs of one seed share."""
    return [without_wall_clock(row) for row in read_rows(folder / "metrics.jsonl")]


def read(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name).read_text())


def checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("[0-9]*"))


def assert_one_row_per_interval(folder: Path, total: int = 1200) -> None:
    env_steps = [row["env_steps"] for row in rows(folder)]
    assert [n // ROW_EVERY for n in env_steps] == list(range(1, total // ROW_EVERY + 1))


def assert_same_tree(first: Any, second: Any) -> None:
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(one, other)


# --- the same bits -------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(base, tmp_path):
    first, folder = base
    again = run(tmp_path / "again", EVALUATED)
    other = run(tmp_path / "other", EVALUATED, "seed=1")
    assert first["params_sha256"] == again["params_sha256"] != other["params_sha256"]
    assert rows(folder) == rows(tmp_path / "again") != rows(tmp_path / "other")
    evaluations = [row["evaluation/return_mean"] for row in rows(folder)]
    assert sum(value is not None for value in evaluations) == 4
    assert first["state"] == "finished"


def test_evaluating_changes_no_bit_of_training(base, tmp_path):
    summary, folder = base
    without = run(tmp_path, "evaluation.final_episodes=0")
    assert without["params_sha256"] == summary["params_sha256"]
    assert without["evaluation_return"] is None
    for pair in zip(rows(tmp_path), rows(folder), strict=True):
        row, other = ({k: v for k, v in r.items() if "evaluation/" not in k} for r in pair)
        assert row == other


def test_there_is_one_row_per_interval_and_every_name_has_a_value(base):
    _, folder = base
    assert_one_row_per_interval(folder)
    assert all(value is not None for value in rows(folder)[-1].values())
    fractions = {k: v for k, v in read_rows(folder / "metrics.jsonl")[-1].items() if "time/" in k}
    shares_of_acting = [fractions.pop("time/acting_env"), fractions.pop("time/acting_policy")]
    assert 0 < sum(shares_of_acting) <= 1
    assert sum(fractions.values()) == pytest.approx(1, abs=1e-6)


def test_the_last_interval_is_evaluated_once_also_without_a_final_evaluation(tmp_path):
    run(tmp_path, "evaluation.every_env_steps=600", "evaluation.final_episodes=0")
    evaluated = [row["evaluation/return_mean"] is not None for row in rows(tmp_path)]
    assert evaluated == [False, False, True, False, False, True]


# --- resume --------------------------------------------------------------------------------------


class Recorder:
    """Stands before a pool and keeps what it gives."""

    def __init__(self, pool: OpenLocalPool) -> None:
        self._pool, self.given = pool, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def collect(self, timeout_s: float, updates: int) -> Any:
        self.given.append(self._pool.collect(timeout_s, updates))
        return self.given[-1]


class Player(Recorder):
    """Gives again what a Recorder kept."""

    def play(self, given: list[Any]) -> Player:
        self.given = list(given)
        return self

    def collect(self, timeout_s: float, updates: int) -> Any:
        return self.given.pop(0)


def advance(loop: Stages, iterations: int) -> None:
    for _ in range(iterations):
        loop.act()
        loop.agree()
        loop.learn()
    loop.settle()


def test_learner_replay_and_sampler_continue_bit_for_bit_from_the_same_blocks(tmp_path):
    settings = plain(rlx.compose(TINY))
    parts = assemble(settings, tmp_path, resume=False)
    recorder = Recorder(parts.pool)
    loop = Stages(dataclasses.replace(parts, pool=recorder))
    keeper = Keeper(loop)
    keeper.begin()
    loop.publish()
    for _ in range(60):  # ends with an update in flight, whose TD errors must not be lost
        loop.act()
        loop.agree()
        loop.learn()
    while loop._in_flight is None:
        loop.agree()
        loop.learn()
        loop.act()
    keeper.save()
    recorder.given.clear()
    advance(loop, 40)
    keeper.close()
    parts.close()

    parts = assemble(settings, tmp_path, resume=True)
    resumed = Stages(dataclasses.replace(parts, pool=Player(parts.pool).play(recorder.given)))
    resumed.publish()
    advance(resumed, 40)
    resumed.metrics.close()
    parts.close()
    assert resumed.parts.learner.updates == loop.parts.learner.updates > 20
    assert_same_tree(resumed.parts.learner.state(), loop.parts.learner.state())
    state, expected = resumed.parts.replay.state(), loop.parts.replay.state()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(state[name], value, err_msg=name)
    assert resumed.parts.quota.state() == loop.parts.quota.state()
    assert resumed.count.env_steps == loop.count.env_steps


def test_an_exact_run_stopped_twice_is_the_same_bits_as_an_unstopped_one(compiled, tmp_path):
    decay = ("exploration.decay_env_steps=1000", "exploration.final_scale=0.1")
    # Rows out of step with checkpoints, so that these hold the sums of half an interval.
    clocks = ("evaluation.every_env_steps=500", "logging.every_env_steps=150")
    exact = ("checkpoint.exact=true", "seed=4", *clocks, *decay)
    expected = run(tmp_path / "unstopped", *exact)
    folder = tmp_path / "stopped"
    done = stopped(signal.SIGKILL, 900, *TINY, *exact, f"hydra.run.dir={folder}", env=compiled)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert read(folder, "status.json")["state"] == "running"
    assert [int(path.name) // 400 for path in checkpoints(folder)] == [0, 1, 2]
    done = stopped(signal.SIGTERM, 1050, f"resume={folder}", env=compiled)
    assert done.returncode == 0, done.stderr
    assert read(folder, "status.json")["state"] == "interrupted"
    assert rows(folder)[-1]["env_steps"] >= 1050

    summary = run(None, *exact, f"resume={folder}")
    assert summary["params_sha256"] == expected["params_sha256"]
    assert rows(folder) == rows(tmp_path / "unstopped")
    for name in ("state", "env_steps", "frames", "updates", "train_return", "evaluation_return"):
        assert summary[name] == expected[name]
    assert read(folder, "status.json")["state"] == "finished"


def test_without_a_saved_replay_it_fills_anew_and_the_account_opens_again(loops, tmp_path):
    parted = ("checkpoint.replay=false", "replay.min_sequences=50")
    before = run(tmp_path, *parted, "stop_after_updates=25")
    assert not (Path(before["checkpoint"]) / "replay.json").exists()
    after = run(None, *parted, f"resume={tmp_path}")
    replay, quota = loops[1].parts.replay, loops[1].parts.quota
    added = after["env_steps"] - before["env_steps"]
    assert after["updates"] > before["updates"] == 25
    assert (after["env_steps"] // 1200, before["env_steps"] // 1200) == (1, 0)
    assert added - LANES <= replay.env_steps <= added
    assert quota.state()["opened_at"] > 50  # of the env steps of the new replay
    trained = (after["updates"] - 25) * ROWS_PER_UPDATE
    assert quota.state()["trained_rows"] == trained
    assert len({row["env_steps"] for row in rows(tmp_path)}) == len(rows(tmp_path)) == 7
    episodes = [row["train/episodes"] for row in rows(tmp_path)]
    assert episodes == sorted(episodes)
    assert after["wall_s"] > before["wall_s"]


def segments_on_disk(folder: Path) -> set[str]:
    return {path.name for path in (folder / "checkpoints" / "segments").iterdir()}


def segments_named(checkpoint: Path) -> set[str]:
    return {segment["file"] for segment in read(checkpoint, "manifest.json")["body"]["segments"]}


def test_segments_go_with_the_checkpoints_that_need_them(tmp_path):
    often = ("checkpoint.every_env_steps=100", "checkpoint.keep=1", "stop_after_updates=25")
    run(tmp_path, *often)
    (kept,) = checkpoints(tmp_path)
    assert segments_on_disk(tmp_path) == segments_named(kept) != set()
    run(None, "checkpoint.keep=1", "checkpoint.replay=false", f"resume={tmp_path}")
    assert segments_on_disk(tmp_path) == set()


@pytest.mark.parametrize("readable", [True, False])
def test_segments_stay_as_long_as_a_checkpoint_cannot_be_read(tmp_path, readable):
    """It may need one that no other does."""
    run(tmp_path, "stop_after_updates=25", "checkpoint.keep=99")
    folder = tmp_path / "checkpoints"
    shutil.copytree(checkpoints(tmp_path)[-1], older := folder / "000000000001")
    some = folder / "segments" / min(segments_on_disk(tmp_path))
    shutil.copy(some, other := some.with_name("000000000000-aaaaaaaa.npz"))
    body = json.loads((older / "manifest.json").read_text())["body"] | {"env_steps": 1}
    whole = json.dumps({"sha256": checkpoint_files._body_sha256(body), "body": body})
    (older / "manifest.json").write_text(whole if readable else "{")
    run(None, "checkpoint.keep=99", f"resume={tmp_path}")
    assert older.is_dir()
    assert other.exists() == (not readable)


def test_a_finished_run_resumed_has_nothing_to_do_until_it_is_given_more(tmp_path):
    before = run(tmp_path, "total_env_steps=400")
    seen, saved = rows(tmp_path), (tmp_path / "checkpoints").stat().st_mtime_ns
    again = run(None, "total_env_steps=400", f"resume={tmp_path}")
    assert {**again, "wall_s": 0} == {**before, "wall_s": 0}
    assert rows(tmp_path) == seen
    assert (tmp_path / "checkpoints").stat().st_mtime_ns == saved
    more = run(None, "total_env_steps=800", f"resume={tmp_path}")
    assert more["state"] == "finished"
    assert more["updates"] > before["updates"]
    assert_one_row_per_interval(tmp_path, 800)


def test_resume_auto_begins_or_continues(loops, tmp_path):
    first = run(tmp_path, "resume=auto", "total_env_steps=400")
    assert loops[0].parts.resumed is None
    second = run(tmp_path, "resume=auto", "total_env_steps=600")
    assert loops[1].parts.resumed.env_steps == first["env_steps"] < second["env_steps"]


def test_resume_with_another_network_names_the_leaves(base):
    _, folder = base
    with pytest.raises(ConfigError) as caught:
        run(None, f"resume={folder}", "network.core.units=9")
    (problem,) = caught.value.problems
    assert problem.path == "resume"
    assert "params/" in problem.says
    assert "float32[" in problem.says


def test_resume_falls_back_behind_a_damaged_checkpoint_and_says_which(tmp_path, caplog, loops):
    run(tmp_path, "total_env_steps=800")
    *_, older, newest = checkpoints(tmp_path)
    (newest / "meta.json").write_text("{}")
    summary = run(None, f"resume={tmp_path}")
    assert loops[1].parts.resumed.path == older
    said = [r.getMessage() for r in caplog.records if "damaged" in r.getMessage()]
    assert len(said) == 1
    assert str(newest / "meta.json") in said[0]
    assert summary["state"] == "finished"
    assert_one_row_per_interval(tmp_path)


def test_an_exact_run_without_a_saved_replay_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"checkpoint\.replay"):
        run(tmp_path, "checkpoint.exact=true", "checkpoint.replay=false")


# --- stopping ------------------------------------------------------------------------------------


def test_ctrl_c_ends_a_run_with_a_checkpoint_and_resume_finishes_it(compiled, tmp_path):
    done = stopped(signal.SIGINT, 900, *TINY, f"hydra.run.dir={tmp_path}", env=compiled)
    assert done.returncode == 0, done.stderr
    assert "SIGINT: stopping with a checkpoint" in done.stderr
    status, summary = read(tmp_path, "status.json"), read(tmp_path, "summary.json")
    assert status["state"] == summary["state"] == "interrupted"
    assert status["error"] is None
    assert 900 <= summary["env_steps"] == status["env_steps"] < 920
    assert summary["evaluation_return"] is None
    assert Path(summary["checkpoint"]) == checkpoints(tmp_path)[-1]
    assert int(Path(summary["checkpoint"]).name) == summary["env_steps"]

    finished = run(None, f"resume={tmp_path}")
    assert finished["state"] == read(tmp_path, "status.json")["state"] == "finished"
    assert finished["updates"] > summary["updates"]
    assert finished["evaluation_return"] is not None
    env_steps = [row["env_steps"] for row in rows(tmp_path)]
    assert env_steps == sorted(set(env_steps))
    assert summary["env_steps"] in env_steps


def send(monkeypatch: pytest.MonkeyPatch, number: int, times: int) -> None:
    """A signal, so many times, in the 50th turn of the next run's loop."""
    turns, learn = [], Stages.learn

    def learn_and_send(loop: Stages) -> None:
        learn(loop)
        turns.append(loop)
        for _ in range(times if len(turns) == 50 else 0):
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Stages, "learn", learn_and_send)


def test_sigterm_ends_a_run_with_a_checkpoint(monkeypatch, tmp_path):
    send(monkeypatch, signal.SIGTERM, times=1)
    summary = run(tmp_path)
    assert summary["state"] == read(tmp_path, "status.json")["state"] == "interrupted"
    assert int(Path(summary["checkpoint"]).name) == summary["env_steps"] < 600


def test_sigterm_ends_an_evaluation_that_would_never_end(monkeypatch, tmp_path):
    """Episodes may have no end, such as CliffWalking's under a poor policy."""
    checked = []

    def complete(starts: Any) -> bool:
        checked.append(starts)
        assert len(checked) < 100, "the signal is not heeded"
        if len(checked) == 50:
            os.kill(os.getpid(), signal.SIGTERM)
        return False

    monkeypatch.setattr("rlx.evaluation.playing.Starts.complete", property(complete))
    summary = run(tmp_path, "total_env_steps=100")
    assert (summary["state"], summary["evaluation_return"]) == ("interrupted", None)
    monkeypatch.undo()
    assert run(tmp_path, "total_env_steps=100", "resume=auto")["evaluation_return"] is not None


def test_a_second_ctrl_c_interrupts_at_once_and_the_handlers_are_given_back(monkeypatch, tmp_path):
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    send(monkeypatch, signal.SIGINT, times=2)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    status = read(tmp_path, "status.json")
    assert status["state"] == "interrupted"
    assert "without a checkpoint" in status["error"]
    assert len(checkpoints(tmp_path)) < 2
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_the_limits_end_a_run_as_finished(loops, tmp_path):
    by_updates = run(tmp_path / "updates", "stop_after_updates=7")
    assert (by_updates["updates"], by_updates["state"]) == (7, "finished")
    by_time = run(tmp_path / "time", "stop_after_s=0.2", "total_env_steps=1_000_000_000")
    assert by_time["state"] == "finished"
    assert by_time["wall_s"] >= 0.2
    again = run(None, f"resume={tmp_path / 'time'}", "stop_after_s=0.2")
    assert again["env_steps"] == by_time["env_steps"]
    goes_on = run(None, f"resume={tmp_path / 'updates'}")
    assert goes_on["state"] == "finished"
    # The last request is the only one that may go over; it ends with a step of all lanes.
    assert 1200 <= goes_on["env_steps"] < 1200 + REQUEST + LANES


def test_training_goes_on_while_a_snapshot_is_written(tmp_path, monkeypatch):
    turns, went_on = [0], []
    write, agree = Snapshots._write_ahead, Stages.agree

    def slow(snapshots: Snapshots, replay: Any) -> None:
        began, until = turns[0], time.monotonic() + 5
        while turns[0] < began + 3 and time.monotonic() < until:
            time.sleep(0.001)
        went_on.append(turns[0] >= began + 3)
        write(snapshots, replay)

    def count(loop: Stages, *, is_writing: bool) -> None:
        turns[0] += 1
        agree(loop, is_writing=is_writing)

    monkeypatch.setattr(Snapshots, "_write_ahead", slow)
    monkeypatch.setattr(Stages, "agree", count)
    run(tmp_path)
    assert went_on[0]
    assert len(went_on) >= 2


# --- quota and weights ---------------------------------------------------------------------------


def test_the_replay_ratio_is_kept_and_told_as_it_is(loops, tmp_path):
    summary = run(tmp_path)
    replay, account = loops[0].parts.replay, loops[0].parts.quota.state()
    trained = summary["updates"] * ROWS_PER_UPDATE
    assert account["trained_rows"] == trained
    since = replay.env_steps - account["opened_at"]
    assert 0 <= 0.8 * since - trained < ROWS_PER_UPDATE
    assert rows(tmp_path)[-1]["replay/ratio"] == pytest.approx(trained / since)
    # What is missing lies in the lanes' open blocks of two rows.
    assert 0 <= summary["env_steps"] - replay.env_steps <= LANES


def test_actors_act_with_the_version_that_was_published_last(loops, monkeypatch, tmp_path):
    versions: list[int] = []
    publish, collect = OpenLocalPool.publish, OpenLocalPool.collect

    def published(pool: OpenLocalPool, weights: Any, env_steps: int) -> None:
        versions.append(weights.version)
        publish(pool, weights, env_steps)

    def collected(pool: OpenLocalPool, *given: Any) -> Any:
        (rollout,) = collect(pool, *given)
        assert pool._actors[0].weights_version == versions[-1]
        # A block began at most one request ago.
        assert set(rollout.weights_version.tolist()) <= set(versions[-2:])
        return [rollout]

    monkeypatch.setattr(OpenLocalPool, "publish", published)
    monkeypatch.setattr(OpenLocalPool, "collect", collected)
    summary = run(tmp_path)
    assert versions == list(range(0, summary["updates"] + 1, 2))
    ages = [row["weights/age_updates"] for row in rows(tmp_path)]
    assert ages[-1] == pytest.approx(1.5, abs=0.2)
    assert all(1 <= age <= 2 for age in ages)
    assert all(row["replay/age_updates"] >= 1 for row in rows(tmp_path))


def test_after_the_last_update_the_pool_has_the_learners_parameters(loops, tmp_path):
    summary = run(tmp_path, "learner.publish_every_updates=1", "total_env_steps=600")
    weights = loops[0].parts.pool._weights
    assert weights.version == summary["updates"]
    assert_same_tree(weights.params, loops[0].parts.learner.state().params)


# --- lanes ---------------------------------------------------------------------------------------


def test_two_actors_give_the_data_of_one(loops, monkeypatch, tmp_path):
    episodes: list[Any] = []
    take = Metrics.episodes
    monkeypatch.setattr(
        Metrics, "episodes", lambda self, new: (episodes.extend(new), take(self, new))[1]
    )
    told, random = {}, "exploration.base=0.999"  # all lanes act at random
    for instances in (1, 2):
        episodes.clear()
        lanes = (f"acting.instances={instances}", f"acting.envs_per_actor={LANES // instances}")
        run(tmp_path / str(instances), *lanes, random, "exploration.exponent=0.0", "seed=5")
        told[instances] = list(episodes)
        stored = loops[-1].parts.replay._ring.index.slot
        assert set(stored.lane[stored.key >= 0].tolist()) == set(range(LANES))
    for lane in range(LANES):
        one, two = ([e for e in told[n] if e.lane == lane] for n in (1, 2))
        assert {e.epsilon for e in one} == {e.epsilon for e in two} == {float(np.float32(0.999))}
        lengths = [np.array([e.env_steps for e in given]) for given in (one, two)]
        spread = np.sqrt(sum(x.var() / len(x) for x in lengths))
        assert abs(lengths[0].mean() - lengths[1].mean()) < 4 * spread
        assert sum(lengths[1]) == pytest.approx(300, abs=60)  # no lane is left behind


def test_epsilons_go_by_the_lane_of_the_run_not_of_the_actor(monkeypatch, tmp_path):
    episodes: list[Any] = []
    monkeypatch.setattr(Metrics, "episodes", lambda self, new: episodes.extend(new))
    run(
        tmp_path,
        "acting.instances=2",
        "acting.envs_per_actor=2",
        "exploration.exponent=7",
        "total_env_steps=400",
    )
    ladder = {lane: 0.4 ** (1 + 7 * lane / 3) for lane in range(LANES)}
    assert {e.lane: e.epsilon for e in episodes} == pytest.approx(ladder, rel=1e-5)


DRAWS: dict[str, dict[str, Any]] = {  # and what is set
    "mixed": {"start": 0.5, "decay_env_steps": 1},
    "redrawn": {},
}


@pytest.mark.parametrize("name", DRAWS)
def test_a_lane_draws_by_the_runs_seed_also_in_a_resumed_run(name, monkeypatch, tmp_path):
    episodes: list[Any] = []
    monkeypatch.setattr(Metrics, "episodes", lambda self, new: episodes.extend(new))
    settings = DRAWS[name]
    changes = [f"exploration.{key}={value}" for key, value in settings.items()]
    told = (f"exploration={name}", *changes, "seed=3")
    run(tmp_path, *told, "total_env_steps=600")
    run(None, f"resume={tmp_path}", *told, "total_env_steps=1200")
    assert {e.chain for e in episodes} == {0, 1}
    schedule = rlx.make(f"exploration={name}", seed=3, **settings)
    last = schedule.amount(np.arange(LANES), LANES, 10**9)
    for chain in (0, 1):
        for lane in range(LANES):
            found = [e.epsilon for e in episodes if (e.lane, e.chain) == (lane, chain)]
            number = np.arange(len(found))
            expected = np.full(len(found), last[lane])
            if name == "redrawn":
                where = (np.full(len(found), chain), number)
                expected = schedule.episode_amount(0 * number + lane, LANES, 0, *where)
            assert found[1:] == expected[1:].tolist()  # a first one may end before the decay


@pytest.mark.parametrize(
    ("name", "rungs"),
    [
        ("exponential", {"0.05-0.2", "0.2-1"}),
        ("decaying_ladder", {"0.01-0.05", "0.2-1"}),
        ("mixed", {"0.2-1"}),
        ("redrawn", {"0-0.01", "0.01-0.05", "0.05-0.2"}),
        ("constant", {"0.05-0.2"}),
        ("greedy", {"0-0.01"}),
    ],
)
def test_every_exploration_runs_and_rows_have_the_returns_of_its_rungs(name, rungs, tmp_path):
    changed = {"exponential": 4_000, "decaying_ladder": 1_000_000, "mixed": 1_000_000}
    decay = [f"exploration.decay_env_steps={changed[name]}"] if name in changed else []
    run(tmp_path, f"exploration={name}", *decay, "total_env_steps=2000")
    row = rows(tmp_path)[-1]
    assert row["env_steps"] >= 2000
    prefix = "train/return_mean/epsilon_"
    found = {key.removeprefix(prefix): row[key] for key in row if key.startswith(prefix)}
    assert set(found) == rungs
    assert min(found.values()) <= row["train/return_mean"] <= max(found.values())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["exploration=mixed", "exploration.weights=[1,2]"], "give each final amount one weight"),
        (["exploration=redrawn", "exploration.lowest=0.5"], "above exploration.highest=0.1"),
        (["exploration.final_scale=0.5"], "exploration.decay_env_steps=null: to shrink"),
        (["exploration.decay_env_steps=9"], "exploration.final_scale=1 and"),
    ],
)
def test_amounts_that_make_no_sense_are_refused_before_an_environment_opens(
    settings, says, monkeypatch, tmp_path
):
    monkeypatch.setattr("rlx.training.assemble.build_agent", lambda settings: pytest.fail("late"))
    with pytest.raises(ConfigError, match=says):
        run(tmp_path, *settings)


@pytest.mark.parametrize(
    "settings",
    [
        ["exploration=sample"],
        ["exploration=linear", "exploration.final=1.0"],
        ["exploration=redrawn", "exploration.highest=1", "exploration.lowest=1"],
        ["exploration=redrawn", "exploration.highest=1", "exploration.count=1"],
    ],
)
def test_an_agent_without_a_distribution_may_not_act_at_random_for_ever(settings, tmp_path):
    with pytest.raises(ConfigError, match=r"exploration: its amount stays 1.*agent\.head\.noise"):
        run(tmp_path, *settings)


@pytest.mark.parametrize(
    "settings", [["exploration=sample"], ["exploration=linear", "exploration.final=1.0"]]
)
def test_an_agent_with_noisy_layers_may_act_as_they_sample(settings, tmp_path):
    run(tmp_path, *settings, "agent.head.noise=0.5", "total_env_steps=200")


def test_rows_that_no_update_reads_are_told_at_the_start(caplog, tmp_path):
    run(tmp_path, "agent.unroll=4", "agent.stride=8", "total_env_steps=200")
    (said,) = (r.getMessage() for r in caplog.records if "never trained" in r.getMessage())
    assert said.startswith("sequences start 8 rows apart and train on 4: 4 of 8 rows are never")


def test_schedules_go_on_in_a_resumed_run(monkeypatch, tmp_path, caplog):
    episodes: list[Any] = []
    monkeypatch.setattr(Metrics, "episodes", lambda self, new: episodes.extend(new))
    decay = ("exploration.decay_env_steps=1000", "exploration.final_scale=0.0")
    run(tmp_path, *decay, "total_env_steps=400")
    first = [e.epsilon for e in episodes if e.lane == 0]
    other = ("env.max_episode_steps=499", "env.threads=2")
    run(None, *decay, *other, f"resume={tmp_path}", "total_env_steps=800")
    says = "the saved replay may have rows of env.max_episode_steps=null, here 499; they"
    assert says in caplog.text
    epsilons = [e.epsilon for e in episodes if e.lane == 0]
    assert epsilons == sorted(epsilons, reverse=True)
    assert 0.4 * (1 - 2 * 32 / 1000) <= first[0] <= 0.4  # in the first requests
    assert first[-1] == pytest.approx(0.24, abs=0.02)
    assert epsilons[len(first)] == pytest.approx(0.24, abs=0.02)
    assert epsilons[-1] == pytest.approx(0.08, abs=0.02)


# --- errors --------------------------------------------------------------------------------------


def open_files(folder: Path) -> list[str]:
    return [name for name in descriptors() if name.startswith(str(folder))]


def descriptors() -> list[str]:
    """The paths of the files that this process holds open."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            found.append(os.readlink(link))
        except OSError:  # the folder that is being read
            continue
    return found


@pytest.fixture
def open_environments(monkeypatch):
    """The environments that were made and are not closed."""
    alive: list[EnvPoolLanes] = []
    begin, close = EnvPoolLanes.__init__, EnvPoolLanes.close

    def begun(env: EnvPoolLanes, **given: Any) -> None:
        begin(env, **given)
        alive.append(env)

    def closed(env: EnvPoolLanes) -> None:
        close(env)
        if env in alive:
            alive.remove(env)

    monkeypatch.setattr(EnvPoolLanes, "__init__", begun)
    monkeypatch.setattr(EnvPoolLanes, "close", closed)
    return alive


def test_an_environment_that_raises_ends_the_run_as_failed(
    open_environments, monkeypatch, tmp_path
):
    receive, steps = EnvPoolLanes.recv, []

    def failing(env: EnvPoolLanes) -> Any:
        steps.append(env)
        if len(steps) > 100:
            raise RuntimeError("the emulator is gone\nand more")
        return receive(env)

    monkeypatch.setattr(EnvPoolLanes, "recv", failing)
    with pytest.raises(RuntimeError, match="the emulator is gone"):
        run(tmp_path, "logging.tensorboard=true")
    status = read(tmp_path, "status.json")
    assert (status["state"], status["error"]) == ("failed", "RuntimeError: the emulator is gone")
    assert status["env_steps"] == rows(tmp_path)[-1]["env_steps"] > 0
    assert not (tmp_path / "summary.json").exists()
    assert open_files(tmp_path) == []
    assert open_environments == []


def test_everything_is_closed_though_one_closing_fails(open_environments, monkeypatch, tmp_path):
    def failing(metrics: Metrics) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Metrics, "close", failing)
    with pytest.raises(OSError, match="no space left"):
        run(tmp_path, "total_env_steps=100")
    assert open_environments == []


def test_a_td_error_that_is_not_finite_stops_the_run_and_names_the_keys(monkeypatch, tmp_path):
    priorities, calls = OpenLearner.priorities, []

    def broken(learner: OpenLearner, output: Any) -> np.ndarray:
        calls.append(output)
        found = priorities(learner, output).copy()
        found[1] = np.nan if len(calls) == 30 else found[1]
        return found

    monkeypatch.setattr(OpenLearner, "priorities", broken)
    with pytest.raises(FloatingPointError, match=r"1 of \d+ sequences are not finite \(keys \d+\)"):
        run(tmp_path)
    status = read(tmp_path, "status.json")
    assert status["state"] == "failed"
    assert status["error"].startswith("NotFinite: Priorities of 1 of ")


# --- devices, threads, leftovers -----------------------------------------------------------------


def test_two_devices_give_nearly_the_metrics_of_one(base, compiled, tmp_path):
    _, folder = base
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    short = ["total_env_steps=600", "evaluation.final_episodes=0"]
    arguments = [*TINY, *short, "learner.devices=2", f"hydra.run.dir={tmp_path}"]
    done = train(*arguments, env=compiled | flags)
    assert done.returncode == 0, done.stderr
    one, two = rows(folder), rows(tmp_path)
    # Sums in another order, until by them an action or a draw is another.
    for name in ("updates", "learner/loss", "learner/grad_norm", "replay/ratio"):
        assert two[0][name] == pytest.approx(one[0][name], rel=1e-3), name
    assert len(two) == 3
    for row, other in zip(two, one, strict=False):
        assert row["updates"] == pytest.approx(other["updates"], abs=1)
        assert row["learner/loss"] == pytest.approx(other["learner/loss"], rel=0.3)
        assert row["learner/q_mean"] == pytest.approx(other["learner/q_mean"], rel=0.3)


def test_each_device_draws_from_its_own_memory_what_a_shard_of_the_host_would(compiled, tmp_path):
    """Also after a resume. That the blocks lie apart is looked at in the run."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    code = (
        "import sys, jax, rlx\n"
        "from tests.training.test_run import TINY\n"
        "from rlx.training.learner import OpenLearner\n"
        "seen, put = set(), OpenLearner.put\n"
        "def watched(self, batch):\n"
        "    leaf = batch.rows.reward\n"
        "    assert isinstance(leaf, jax.Array) == ('device' in name)\n"
        "    if isinstance(leaf, jax.Array):\n"
        "        seen.update(shard.device.id for shard in leaf.addressable_shards)\n"
        "        assert len(leaf.addressable_shards[0].data) == len(leaf) // 2\n"
        "    found = put(self, batch)\n"
        "    after = found.rows.reward\n"
        "    if isinstance(leaf, jax.Array):\n"
        "        where = [s.data.unsafe_buffer_pointer() for s in leaf.addressable_shards]\n"
        "        assert [s.device.id for s in after.addressable_shards] == [0, 1], where\n"
        "    return found\n"
        "OpenLearner.put = watched\n"
        "for name in ('replay.shards=2', 'replay=device_prioritized'):\n"
        "    here = [*TINY, 'learner.devices=2', 'evaluation.final_episodes=0', name]\n"
        "    folder = f'{sys.argv[1]}/{len(name)}'\n"
        "    rlx.run(rlx.compose([*here, 'total_env_steps=500']), folder)\n"
        "    more = rlx.compose([*here, 'total_env_steps=700', f'resume={folder}'])\n"
        "    print(rlx.run(more)['params_sha256'])\n"
        "assert seen == {0, 1}\n"
        "rlx.run(rlx.compose([*here, 'replay.prefetch=2', 'total_env_steps=500']), sys.argv[1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=os.environ | compiled | flags | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    host, device = done.stdout.split()
    assert host == device


def test_learning_waits_for_the_warm_up(tmp_path):
    summary = run(tmp_path, "replay.min_env_steps=900", "logging.every_env_steps=200")
    found = rows(tmp_path)
    assert all((row["updates"] > 0) == (row["env_steps"] > 900) for row in found)
    assert summary["updates"] > 0
    with pytest.raises(ConfigError, match=r"replay\.min_env_steps=1200: learning would never"):
        run(tmp_path / "never", "replay.min_env_steps=1200")


def poison(monkeypatch: pytest.MonkeyPatch, *numbers: int) -> None:
    """Makes these updates' losses NaN."""
    put = OpenLearner.put

    def poisoned(self: OpenLearner, batch: Any) -> Any:
        if self.updates + 1 in numbers:
            batch.importance[0] = np.nan
        return put(self, batch)

    monkeypatch.setattr(OpenLearner, "put", poisoned)


def test_an_update_that_is_not_finite_stops_the_run_with_its_batch_and_a_checkpoint(
    tmp_path, monkeypatch
):
    poison(monkeypatch, 20)
    with pytest.raises(NonFinite, match="changed nothing, its batch is in"):
        run(tmp_path)
    with np.load(tmp_path / "nonfinite" / "0.npz") as kept:
        assert np.isnan(kept["importance"]).sum() == 1
        assert kept["rows/reward"].shape[0] == len(kept["key"])
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "failed"
    assert run(None, f"resume={tmp_path}")["state"] == "finished"


def test_updates_that_are_not_finite_may_be_left_out(tmp_path, monkeypatch, caplog):
    poison(monkeypatch, *range(20, 40))
    summary = run(tmp_path, "learner.on_nonfinite=skip", "logging.every_env_steps=200")
    assert summary["state"] == "finished"
    assert caplog.text.count("an update was left out") == 10
    assert len(list((tmp_path / "nonfinite").iterdir())) == 10
    found = rows(tmp_path)
    assert min(row["learner/finite"] for row in found if row["updates"]) < 1
    assert all(row["learner/loss"] is not None for row in found if row["learner/finite"])


def test_a_run_that_learnt_nothing_says_so(tmp_path, caplog):
    assert run(tmp_path, "replay.min_env_steps=1199", "replay.shards=2")["updates"] == 0
    assert "no update was made: the replay got" in caplog.text
    assert "waits for the env steps that replay.ratio asks for" in caplog.text
    assert "learning begins at replay.min_env_steps=1199 and replay.min_sequences=" in caplog.text


def test_recorded_experience_trains_without_actors(tmp_path, caplog):
    record = f"replay.record={tmp_path / 'experience'}"
    made = run(tmp_path / "acting", record)
    offline = ("replay=dataset", f"replay.path={tmp_path / 'experience'}")
    fitting = [s for s in TINY if not s.startswith("replay.capacity")]
    learnt = rlx.run(rlx.compose([*fitting, *offline, "env.threads=2"]), tmp_path / "learning")
    assert "was recorded with" not in caplog.text
    assert learnt["state"] == "finished"
    assert made["updates"] - 10 < learnt["updates"] <= made["updates"] + 60
    found = rows(tmp_path / "learning")
    assert found[-1]["env_steps"] >= 1200
    assert any(row["evaluation/return_mean"] is not None for row in found)
    more = (f"resume={tmp_path / 'learning'}", "total_env_steps=1500", "env.max_episode_steps=499")
    went_on = rlx.run(rlx.compose([*fitting, *offline, *more]))
    assert "was recorded with env.max_episode_steps=null, here 499; its rows" in caplog.text
    assert went_on["updates"] > learnt["updates"]
    exact = ("checkpoint.exact=true", "evaluation.final_episodes=0")
    twice = [
        rlx.run(rlx.compose([*fitting, *offline, *exact]), tmp_path / name)["params_sha256"]
        for name in ("one", "two")
    ]
    assert twice[0] == twice[1]
    with pytest.raises(ConfigError, match=r"replay: set its path"):
        rlx.run(rlx.compose([*fitting, "replay=dataset"]), tmp_path / "no path")


@pytest.mark.parametrize(
    "option", ["replay=device_prioritized", "replay.storage=mmap", "replay.where=process"]
)
def test_where_blocks_lie_changes_no_bit(base, option, tmp_path):
    expected, _ = base
    found = run(tmp_path, option)
    assert found["params_sha256"] == expected["params_sha256"]
    went_on = run(None, option, f"resume={tmp_path}", "total_env_steps=1400")
    assert went_on["updates"] > found["updates"]


def test_a_run_whose_replay_is_killed_says_so_and_resumes(loops, monkeypatch, tmp_path):
    learn = Stages.learn

    def learning(self: Stages) -> None:
        if self.count.env_steps > 700 and self.parts.resumed is None:
            os.kill(self.parts.replay.pid, signal.SIGKILL)
        learn(self)

    monkeypatch.setattr(Stages, "learn", learning)
    options = ("replay.where=process", "replay.prefetch=2", "checkpoint.every_env_steps=300")
    with pytest.raises(ReplayLost, match="ended by SIGKILL"):
        run(tmp_path, *options)
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["state"] == "failed"
    assert "ended by SIGKILL" in status["error"]
    went_on = run(None, *options, f"resume={tmp_path}")
    assert went_on["state"] == "finished"
    assert went_on["env_steps"] >= 1200


def test_an_online_queue_trains_on_every_row_about_once(loops, tmp_path):
    """Sequences of 4 trained rows begin every 4; what is missing still waits."""
    fitting = [s for s in TINY if not s.startswith(("replay.ratio", "agent.stride"))]
    online = ("replay=online", "agent.stride=4", "agent.burn_in=0", "agent.block_rows=4")
    rlx.run(rlx.compose([*fitting, *online]), tmp_path)
    replay, updates = loops[0].parts.replay, loops[0].parts.learner.updates
    assert replay.stats()["replay/dropped_sequences"] == 0
    waiting = replay.startable * 4
    open_rows = LANES * 8  # of each lane: a block, and a sequence without its last rows
    assert 0 <= replay.rows - updates * ROWS_PER_UPDATE - waiting <= open_rows
    with pytest.raises(ConfigError, match=r"replay\.min_sequences=3: accepted: 4 \(learner"):
        rlx.run(rlx.compose([*fitting, *online, "replay.min_sequences=3"]), tmp_path / "few")
    uses = [*fitting, "agent.stride=4", "agent.burn_in=0", "agent.block_rows=4"]
    again = rlx.compose([*uses, "resume=auto", "replay.ratio=1.0", "total_env_steps=9999"])
    with pytest.raises(ConfigError, match=r"saved replay was of another kind \(it has no 'larg"):
        rlx.run(again, tmp_path)


def test_a_queue_resumed_with_lower_demands_goes_on(tmp_path):
    fitting = [s for s in TINY if not s.startswith(("replay.ratio", "agent.stride"))]
    online = ("replay=online", "agent.stride=4", "agent.burn_in=0", "agent.block_rows=4")
    many = rlx.compose([*fitting, *online, "replay.min_sequences=400", "stop_after_s=2"])
    assert rlx.run(many, tmp_path)["updates"] == 0
    few = rlx.compose([*fitting, *online, f"resume={tmp_path}", "total_env_steps=2000"])
    assert rlx.run(few)["updates"] > 0


def test_more_devices_than_there_are_is_said_of_the_learner(tmp_path):
    with pytest.raises(ConfigError, match=r"learner\.devices=3") as caught:
        run(tmp_path, "learner.devices=3")
    assert caught.value.problems[0].path == "learner"


@pytest.mark.parametrize(
    ("override", "path"),
    [
        ("env.batch_size=9", "env.batch_size"),
        (
            "acting=threads learner.publish_every_updates=9 acting.max_weight_age_updates=8",
            "acting.max_weight_age_updates",
        ),
        ("network=grid_lstm", "network"),
        ("checkpoint.exact=true replay.prefetch=2", "replay.prefetch"),
    ],
)
def test_what_cannot_work_is_said_of_its_setting_before_memory_is_taken(
    override, path, monkeypatch, tmp_path
):
    monkeypatch.setattr(
        "rlx.training.assemble.make_replay", lambda *_, **__: pytest.fail("memory was taken")
    )
    fitting = [s for s in TINY if not (path == "network" and s.startswith("network.torso"))]
    with pytest.raises(ConfigError) as caught:
        rlx.run(rlx.compose([*fitting, *override.split()]), tmp_path / "run")
    assert [problem.path for problem in caught.value.problems] == [path]


class Fussy:
    """A class of settings with a rule of its own (interfaces.Agrees)."""

    @staticmethod
    def clashes(settings: Any) -> list[Problem]:
        return [Problem(path="exploration", says=f"not with seed {settings['seed']}")]


def test_a_part_of_ones_own_has_its_rules_asked_with_all_others(monkeypatch):
    settings = plain(rlx.compose([*TINY, "replay.ratio=null"]))
    monkeypatch.setattr("rlx.config.targets._allowed", {"rlx.", "tests."})
    settings["exploration"] = {"_target_": "tests.training.test_run.Fussy"}
    with pytest.raises(ConfigError) as caught:
        check_agreement(settings)
    assert [problem.path for problem in caught.value.problems] == ["exploration", "replay.ratio"]


def test_a_deterministic_run_asks_xla_for_it_and_for_the_local_pool(monkeypatch, tmp_path):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/nowhere")
    seen = []
    monkeypatch.setattr(
        "rlx.training.assemble.assemble",
        lambda *_, **__: nullcontext(seen.append(os.environ["XLA_FLAGS"])),
    )
    monkeypatch.setattr("rlx.training.loop.train", lambda parts: {})
    run(tmp_path / "run", "deterministic=true")
    assert seen[0].startswith("--xla_dump_to=/nowhere ")
    assert seen[0].endswith(" --xla_gpu_deterministic_ops=true")
    settings = plain(rlx.compose([*TINY, "deterministic=true"]))
    ahead = settings | {"replay": settings["replay"] | {"prefetch": 1}}
    with pytest.raises(ConfigError, match=r"replay\.prefetch=1: .*deterministic=false"):
        rlx.api.start(ahead, tmp_path)
    settings["acting"] = settings["acting"] | {"_target_": "mypkg.RayPool"}
    with pytest.raises(ConfigError, match=r"deterministic=true: .*acting=local"):
        rlx.api.start(settings, tmp_path)


def is_writing_events() -> bool:
    """TensorBoard's writer ends a little after it was closed."""
    return any(thread.name == "QueueFeederThread" for thread in threading.enumerate())


def test_runs_in_a_thread_leave_nothing_behind(base, open_environments, tmp_path):
    expected, _ = base
    short = (EVALUATED, "logging.tensorboard=true")
    summaries: list[dict[str, Any]] = []
    counts = []

    def body(folder: Path) -> None:
        summaries.append(run(folder, *short))

    for i in range(3):
        thread = threading.Thread(target=body, args=(tmp_path / str(i),))
        thread.start()
        thread.join(timeout=120)
        end = time.monotonic() + 10
        while is_writing_events() and time.monotonic() < end:
            time.sleep(0.01)
        counts.append((threading.active_count(), len(descriptors())))
        assert open_files(tmp_path) == []
        assert open_environments == []
    assert [summary["params_sha256"] for summary in summaries] == [expected["params_sha256"]] * 3
    # what tests before this one left may go meanwhile
    assert all(last <= one for last, one in zip(counts[2], counts[1], strict=True)), counts


def test_the_state_that_a_run_resumed_from_is_let_go(base, loops):
    _, folder = base
    run(None, f"resume={folder}", "total_env_steps=1210")
    resumed = loops[0].parts.resumed
    assert resumed.state is None
    assert trees.flatten(loops[0].parts.learner.state().params)


def test_a_target_is_copied_by_the_env_steps_of_the_run(tmp_path, loops):
    counted = ("agent.target_period_updates=null", "agent.target_period_env_steps=100")
    run(tmp_path / "run", *counted)
    state = loops[0].parts.learner.state()
    assert state.statistics["target_env_steps"] in (1100, 1200)  # by the last update
    run(None, *counted, f"resume={tmp_path / 'run'}", "total_env_steps=1500")
    assert loops[1].parts.learner.state().statistics["target_env_steps"] in (1400, 1500)
