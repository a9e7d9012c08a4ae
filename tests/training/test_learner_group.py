"""Several learner processes: the same updates as one, and a group that outlives its processes."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil
import pytest

import rlx
from rlx.acting.exploration import Ladder, Redrawn
from rlx.cluster.faults import ActingFailed
from rlx.config import targets
from rlx.config.build import plain
from rlx.interfaces import PerEpisode
from rlx.problems import ConfigError, RunFailed
from rlx.runs.folders import read_rows
from rlx.training.assemble import assemble
from rlx.training.hooks import Run
from rlx.training.keeper import Keeper
from rlx.training.learner import OpenLearner
from rlx.training.loop import train as train_loop
from rlx.training.parts import Alone, Parts
from rlx.training.shares import share_exploration, share_folder, share_of, share_seed
from rlx.types import Batch
from tests import parts
from tests.acting.test_ray_pool import wait_for
from tests.training.test_learner import UPDATES, learner
from tests.training.test_policy_runs import RUNS, SMALL
from tests.training.test_ray_run import command, names_of, nothing_is_left_running
from tests.training.test_run import TINY

__all__ = ["nothing_is_left_running"]  # a fixture of every test here, too

GROUP = [
    *TINY,
    "learner.processes=2",
    "learner.group.cpus_per_learner=0.1",
    "replay.min_sequences=8",
    "evaluation.every_env_steps=800",
]

JOINED = [
    "learner.processes=2",
    "learner.group.cpus_per_learner=0.1",
    "logging.every_env_steps=500",
]


class Rank(Alone):
    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count = rank, count


# --- shares --------------------------------------------------------------------------------------


def settings(*overrides: str) -> dict[str, Any]:
    return plain(rlx.compose(list(overrides)))


def test_processes_divide_what_a_run_has():
    whole = settings("acting=ray_pool", "acting.instances=4", "replay.min_env_steps=1001")
    own = share_of(whole, 2)
    assert own["learner"]["batch_size"] * 2 == whole["learner"]["batch_size"]
    assert own["replay"]["capacity"] * 2 == whole["replay"]["capacity"]
    assert own["replay"]["min_env_steps"] == 501
    assert own["acting"]["instances"] == 2
    assert own["acting"]["envs_per_actor"] == whole["acting"]["envs_per_actor"]
    assert own["acting"]["min_instances"] == 1
    assert own["acting"]["env_steps_per_request"] == whole["acting"]["env_steps_per_request"]
    of_server = share_of(settings("acting=ray_pool", "acting.inference=server"), 2)["acting"]
    assert of_server["env_steps_per_request"] == whole["acting"]["env_steps_per_request"] // 2
    annealed = settings("replay.importance_exponent_final=1", "replay.anneal_env_steps=1000")
    assert share_of(annealed, 2)["replay"]["anneal_env_steps"] == 500
    one_actor = share_of(settings("acting.envs_per_actor=16"), 4)["acting"]
    assert (one_actor["instances"], one_actor["envs_per_actor"]) == (1, 4)
    each = settings()["acting"]["env_steps_per_request"] // 4
    assert one_actor["env_steps_per_request"] == each


def test_settings_say_themselves_what_processes_share():
    """Every count that a process takes its part of is marked, in unions too; nothing else is."""
    whole = settings("acting=ray_pool", "acting.instances=4", "replay.anneal_env_steps=7",
                     "replay.importance_exponent_final=1", "acting.min_instances=3")  # fmt: skip
    own = share_of(whole, 2)
    changed = {
        f"{group}.{name}": own[group][name]
        for group in ("env", "replay", "acting", "learner")
        for name, value in whole[group].items()
        if own[group][name] != value
    }
    assert changed == {
        "replay.capacity": whole["replay"]["capacity"] // 2,
        "replay.min_sequences": whole["replay"]["min_sequences"] // 2,
        "replay.anneal_env_steps": 4,
        "acting.instances": 2,
        "acting.min_instances": 2,
        "acting.max_in_flight_bytes": whole["acting"]["max_in_flight_bytes"] // 2,
        "learner.batch_size": whole["learner"]["batch_size"] // 2,
    }
    queue = settings("replay=online")
    assert share_of(queue, 2)["replay"]["max_delay"] == queue["replay"]["max_delay"] // 2


def slow(*values: Any) -> Any:
    """Each of these starts Ray; one is enough for every day."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["learner.batch_size=33"], "learner.batch_size=33: does not divide over 2 processes"),
        (["acting.envs_per_actor=7"], "acting.envs_per_actor=7: does not divide over 2 processes"),
        (["checkpoint.exact=true"], "checkpoint.exact: needs learner.processes=1"),
        (["deterministic=true"], "deterministic: needs learner.processes=1"),
        (["replay=dataset", "replay.path=somewhere"], "replay.path: needs learner.processes=1"),
        slow(["learner.group.cpus_per_learner=99"], "learner.group.cpus_per_learner=99: 2 learner"),
        (["learner.group.gpus_per_learner=1"], "learner.group.gpus_per_learner=1: 2 learner proc"),
        (["learner.group.gpus_per_learner=0.5"], "accepted: whole GPUs"),
        (["learner.platform=gpu"], "set learner.group.gpus_per_learner=1"),
        (["replay.min_env_steps=250000"], "replay.min_env_steps=250000: learning would never"),
        slow(["acting=ray_pool", "acting.instances=1000"], "acting.cpus_per_actor=1: 1000 actors"),
        (["learner.group.address=127.0.0.1:1"], "learner.group.address=127.0.0.1:1: cannot be"),
        slow(["replay.capacity=100"], "in one of 2 learner processes, for its share"),
    ],
)
def test_what_cannot_be_divided_is_refused(tmp_path, overrides, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        rlx.run(rlx.compose(["learner.processes=2", *overrides]), tmp_path)


def test_what_the_learner_refuses_is_said_before_ray_starts(tmp_path, monkeypatch):
    monkeypatch.setattr("rlx.training.group._join_cluster", lambda *given: pytest.fail("too late"))
    both = ["learner.processes=2", "learner.publish_every_env_steps=9"]
    with pytest.raises(ConfigError, match="one of them says when actors get new weights"):
        rlx.run(rlx.compose(both), tmp_path)


def test_lanes_of_all_processes_explore_as_those_of_one():
    ladder = Ladder(base=0.4, exponent=7.0, minimum=0.0, final_scale=1.0, decay_env_steps=None)
    whole = ladder.amount(np.arange(6), 6, 0)
    shares = [
        share_exploration(ladder, Rank(rank, 2)).amount(np.arange(3), 3, 0) for rank in (0, 1)
    ]
    np.testing.assert_array_equal(np.stack(shares, axis=1).ravel(), whole)
    drawn = Redrawn(highest=0.1, lowest=0.001, count=256, seed=5)
    chain, number = np.arange(3), np.arange(3) * 2
    for rank in (0, 1):
        share, lanes = share_exploration(drawn, Rank(rank, 2)), np.arange(3) * 2 + rank
        np.testing.assert_array_equal(
            share.episode_amount(np.arange(3), 3, 0, chain, number),
            drawn.episode_amount(lanes, 6, 0, chain, number),
        )
        assert isinstance(share, PerEpisode)
        assert not isinstance(share_exploration(ladder, Rank(rank, 2)), PerEpisode)
    assert share_seed(5, Rank(0, 2)) == 5
    assert len({share_seed(5, Rank(rank, 3)) for rank in range(3)}) == 3


# --- updates -------------------------------------------------------------------------------------


def update(subject: OpenLearner, batches: list[tuple[Batch, float | None]]) -> list[np.ndarray]:
    """Parameters, targets, optimiser and the last TD errors."""
    for batch, largest in batches:
        output = subject.update(subject.put(batch), largest)
    state = subject.state()
    leaves = jax.tree.leaves((state.params, state.target_params, state.opt_state))
    return [*leaves, subject.priorities(output)]


def batches_of(rank: int, count: int) -> list[tuple[Batch, float | None]]:
    """The part of rank `rank`, with an importance that is 1 at most in each part."""
    made = []
    for seed in range(UPDATES):
        whole = parts.batch(parts.agent(), 8, seed=seed)
        raw = whole.importance * 3.0
        share = 8 // count
        mine = slice(rank * share, (rank + 1) * share)
        largest = float(raw[mine].max())
        own = jax.tree.map(lambda x, s=mine: x[s], whole)
        own = replace(own, importance=(raw[mine] / largest).astype(np.float32))
        made.append((own, largest if count > 1 else None))
    return made


ONE_OF_TWO = """
import sys, numpy as np, jax
rank, address, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update("jax_default_matmul_precision", "highest")
jax.distributed.initialize(address, 2, rank, initialization_timeout=60)
from tests.training.test_learner_group import batches_of, learner, update
np.savez(out, *update(learner(processes=2), batches_of(rank, 2)))
try:
    learner(devices=None, processes=2)
except ValueError as error:
    print(error)
"""


def test_two_processes_give_the_parameters_of_one(tmp_path):
    """The first has two devices; with devices=1 they are even, with null they are refused."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", ONE_OF_TWO, str(rank), address, str(tmp_path / f"{rank}.npz")],
            env={
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={2 - rank}",
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    says = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert "learner process 1 has 1 devices, this one uses 2" in says[0]
    found = [list(np.load(tmp_path / f"{rank}.npz").values()) for rank in (0, 1)]
    expected = update(learner(), batches_of(0, 1))
    for ours, theirs, one in zip(found[0][:-1], found[1][:-1], expected[:-1], strict=True):
        np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_allclose(ours, one, rtol=1e-4, atol=1e-5)
    td = np.concatenate([found[0][-1], found[1][-1]])
    np.testing.assert_allclose(td, expected[-1], atol=1e-5)


# --- loops ---------------------------------------------------------------------------------------


class Together:
    """The interfaces.Peers of two loops in threads of this process."""

    count, restarts = 2, 0

    def __init__(self, rank: int, given: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self._given, self._barrier = rank, given, barrier

    def exchange(self, mine: Any) -> list[Any]:
        self._given[self.rank] = mine
        self._barrier.wait(30)
        given = list(self._given)
        self._barrier.wait(30)
        assert len({type(each) for each in given}) == 1, given
        return given


def two_loops(
    folder: Path, *overrides: str, resume: bool = False, touch: Callable[..., None] | None = None
) -> list[Any]:
    """The states in which two loops end, or what they raise. Their updates are not joined."""
    own = share_of(settings(*TINY, "replay.min_sequences=8", *overrides), 2)
    given, barrier, stops = [None, None], threading.Barrier(2), [threading.Event() for _ in "01"]

    def go(rank: int) -> Any:
        try:
            with assemble(own, folder, resume=resume, peers=Together(rank, given, barrier)) as made:
                if touch is not None:
                    touch(rank, made, stops)
                return train_loop(made, stops[rank])["state"]
        except RunFailed as error:
            return error

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(go, (0, 1)))


def names(folder: Path) -> set[str]:
    return {path.name for path in (folder / "checkpoints").glob("[0-9]*")}


def test_a_stop_told_to_one_ends_both_at_the_same_count(tmp_path):
    def touch(rank: int, made: Parts, stops: list[threading.Event]) -> None:
        if rank == 1:
            threading.Timer(1.0, stops[1].set).start()

    given = ["total_env_steps=1_000_000"]
    assert two_loops(tmp_path, *given, touch=touch) == ["interrupted"] * 2
    first, second = summaries(tmp_path)
    assert first["env_steps"] == second["env_steps"] > 0
    assert max(names(tmp_path)) == max(names(tmp_path / "learners" / "1"))


def test_actors_of_both_have_settings_of_their_own(tmp_path):
    sized = ["env=gymnasium", "env.id=tests.worlds:rlx-test/Sized-v0"]
    assert two_loops(tmp_path, *sized, "+env.per_actor.reward=[3.0,9.0]") == ["finished"] * 2
    for rank in (0, 1):
        row = read_rows(share_folder(tmp_path, rank) / "metrics.jsonl")[-1]
        assert row["train/return_max"] == 3 * row["train/return_min"]


def test_both_follow_a_clock_alike_also_in_the_first_turn_after_a_resume(tmp_path, monkeypatch):
    put, seen = OpenLearner.put, ([], [])
    learners: list[Any] = [None, None]

    def noted(subject: OpenLearner, batch: Batch) -> Any:
        seen[learners.index(subject)].append(float(batch.scheduled["discount"][0]))
        return put(subject, batch)

    def touch(rank: int, made: Parts, stops: list[threading.Event]) -> None:
        learners[rank] = made.learner
        if made.resumed is not None:  # no two processes are stopped in the same microsecond
            made.resumed.meta["wall_s"] += 100.0 * rank

    monkeypatch.setattr(OpenLearner, "put", noted)
    by = "{setting: agent.discount, over: seconds, points: [[0, 0.5], [200, 0.9]], between: linear}"
    clock = f"schedules=[{by}]"
    first = [clock, "replay.ratio=8", "total_env_steps=600"]  # each turn owes updates
    assert two_loops(tmp_path, *first, touch=touch) == ["finished"] * 2
    more = [*first, "total_env_steps=1200"]
    assert two_loops(tmp_path, *more, resume=True, touch=touch) == ["finished"] * 2
    assert seen[0] == seen[1]
    assert max(seen[0]) > 0.65 > min(seen[0])


def test_a_run_left_in_its_last_evaluation_resumes(tmp_path, monkeypatch):
    evaluate, told = Keeper.evaluate, []

    def leave(keeper: Keeper, *given: Any) -> None:
        told[0].set()
        evaluate(keeper, *given)

    def touch(rank: int, made: Parts, stops: list[threading.Event]) -> None:
        told[:] = stops

    with monkeypatch.context() as patched:
        patched.setattr(Keeper, "evaluate", leave)
        ends = two_loops(tmp_path, "evaluation.every_env_steps=null", touch=touch)
        assert ends == ["interrupted", "finished"]
    assert two_loops(tmp_path, resume=True) == ["finished"] * 2


def test_when_evaluating_fails_both_save(tmp_path):
    class Failing:
        polls = 0

        def poll(self) -> list[Any]:
            self.polls += 1
            if self.polls == 40:
                raise ActingFailed("the evaluator raised 3 times")
            return []

        def stats(self) -> dict[str, float]:
            return {}

        def close(self) -> None:
            pass

    def touch(rank: int, made: Parts, stops: list[threading.Event]) -> None:
        if rank == 0:
            object.__setattr__(made, "evaluator", Failing())

    given = ["total_env_steps=1_000_000", "evaluation.every_env_steps=null"]
    failed, other = two_loops(tmp_path, *given, touch=touch)
    assert isinstance(failed, ActingFailed)
    assert other == "interrupted"
    assert names(tmp_path) == names(tmp_path / "learners" / "1") != set()


# --- runs ----------------------------------------------------------------------------------------


def summaries(run: Path) -> list[dict[str, Any]]:
    return [json.loads((f / "summary.json").read_text()) for f in (run, run / "learners" / "1")]


def newest(run: Path) -> int:
    return max((int(p.name) for p in (run / "checkpoints").glob("[0-9]*")), default=0)


def lose_one(folder: Path, number: signal.Signals, *arguments: str) -> str:
    """Trains, does that to the second process after a checkpoint, and waits for the end."""
    console, before = folder / "console.txt", newest(folder)
    with console.open("w") as file:
        running = subprocess.Popen(
            command(folder, *arguments), stdout=file, stderr=subprocess.STDOUT
        )
    try:
        wait_for(lambda: newest(folder) > before, f"a checkpoint: {console.read_text()}", 120)
        [pid] = re.findall(r"process 1: .* process id (\d+)", console.read_text())
        os.kill(int(pid), number)
        assert running.wait(150) == 0, console.read_text()
    finally:
        running.kill()
    return console.read_text()


def check_finished(folder: Path, restarts: int) -> None:
    first, second = summaries(folder)
    assert first["state"] == second["state"] == "finished"
    for name in ("env_steps", "updates", "params_sha256"):
        assert first[name] == second[name]
    rows = read_rows(folder / "metrics.jsonl")
    steps = [row["env_steps"] for row in rows]
    assert steps == sorted(set(steps))
    assert rows[-1]["learner/restarts"] == restarts
    evaluated = [row["evaluation/return_mean"] for row in rows]
    assert any(value is not None for value in evaluated)
    # Each process acted in its own environments.
    own = [(folder / p / "metrics.jsonl").exists() for p in ("", "learners/1")]
    assert own == [True, True]
    replays = [
        read_rows(folder / p / "metrics.jsonl")[-1]["replay/fill"] for p in ("", "learners/1")
    ]
    assert min(replays) > 0.5 * max(replays) > 0


def test_a_stopped_group_resumes_and_a_killed_process_costs_what_came_after_a_checkpoint(tmp_path):
    running = subprocess.Popen(command(tmp_path, *GROUP, "total_env_steps=1_000_000"))
    try:
        wait_for(lambda: newest(tmp_path) > 0, "a checkpoint", 120)
    finally:
        running.terminate()
    assert running.wait(60) == 0
    first, second = summaries(tmp_path)
    assert first["state"] == second["state"] == "interrupted"
    assert first["env_steps"] == second["env_steps"] == newest(tmp_path)
    total = first["env_steps"] + 2000
    console = lose_one(tmp_path, signal.SIGKILL, f"resume={tmp_path}", f"total_env_steps={total}")
    assert "a learner process was lost" in console
    assert "begin anew from the last checkpoint" in console
    check_finished(tmp_path, restarts=1)
    alone = ["learner.processes=1", f"total_env_steps={total + 400}"]
    with pytest.raises(ConfigError, match="saved in parts by 2 learner processes, now 1"):
        rlx.run(rlx.compose([*GROUP, f"resume={tmp_path}", *alone]))
    summary = rlx.run(
        rlx.compose([*GROUP, f"resume={tmp_path}", "checkpoint.replay=false", *alone])
    )
    assert summary["state"] == "finished"


@pytest.mark.slow  # a minute; beside the one above it tells of the deadline only
def test_a_process_that_hangs_costs_no_more(tmp_path):
    given = [*GROUP, "learner.group.silence_timeout_s=20", "total_env_steps=6000"]
    console = lose_one(tmp_path, signal.SIGSTOP, *given)
    assert "no sign of learner processes 1 for 20 s" in console
    check_finished(tmp_path, restarts=1)


@pytest.mark.slow  # half a minute; tests/training/test_ray_run.py has it of one learner process
def test_a_group_names_what_ended_its_cluster(tmp_path):
    """Its processes are told to stop, and do not say afterwards that somebody interrupted it."""
    given = command(tmp_path, *GROUP, "total_env_steps=1_000_000")
    running = subprocess.Popen(given, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: newest(tmp_path) > 0, "a checkpoint", 120)
        children = psutil.Process(running.pid).children(recursive=True)
        next(p for p in children if "gcs_server" in names_of(p)).kill()
        said = running.communicate(timeout=300)[1]
    finally:
        running.kill()
    assert running.returncode == 1
    lines = [line for line in said.splitlines() if line.startswith("rlx: ")]
    assert "GCS server at " in lines[0]
    assert lines[1:] == [f"rlx: resume={tmp_path} goes on from the last checkpoint"]
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], "GCS server at " in status["error"]) == ("failed", True)


@pytest.mark.slow  # a minute
def test_what_fails_again_and_again_ends_the_run(tmp_path):
    given = [*GROUP, "learner.group.max_restarts=0", "total_env_steps=1_000_000"]
    with pytest.raises(AssertionError, match="lost 1 times without a checkpoint"):
        lose_one(tmp_path, signal.SIGKILL, *given)
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "failed"


# --- agents with a policy ------------------------------------------------------------------------


class TellsItsRank:
    """A hook of both processes."""

    def on_update(self, run: Run, metrics: Mapping[str, Any]) -> None:
        run.record("mine/rank", run.rank)


def test_two_learner_processes_train_rounds_of_both_by_the_policy_that_acted(
    tmp_path: Path, monkeypatch
):
    """Whatever a round's first minibatch learns was drawn from the very policy that it changes."""
    monkeypatch.setattr(targets, "_allowed", {"rlx."})
    rlx.allow("tests.")  # which their processes are told, too
    hook = "hooks=[{_target_: tests.training.test_learner_group.TellsItsRank}]"
    made = rlx.compose([*RUNS["ppo"], *SMALL, *JOINED, "total_env_steps=2000", hook])
    assert rlx.run(made, tmp_path)["state"] == "finished"
    first, second = (read_rows(share_folder(tmp_path, rank) / "metrics.jsonl") for rank in (0, 1))
    for mine, theirs in zip(first, second, strict=True):
        assert mine["updates"] == theirs["updates"] > 0
        assert mine["weights/age_updates"] == theirs["weights/age_updates"] == 0
        assert mine["learner/ratio_error"] == theirs["learner/ratio_error"] < 1e-5
        assert mine["learner/loss"] == theirs["learner/loss"]
        assert (mine["mine/rank"], theirs["mine/rank"]) == (0.0, 1.0)


@pytest.mark.slow  # half a minute each; the one above has the shares and the rendezvous
@pytest.mark.parametrize("name", RUNS)
def test_learner_processes_resume(tmp_path: Path, name):
    given = [*RUNS[name], *SMALL, *JOINED]
    assert rlx.run(rlx.compose([*given, "total_env_steps=1000"]), tmp_path)["state"] == "finished"
    again = rlx.run(rlx.compose([*given, "total_env_steps=2000", f"resume={tmp_path}"]), tmp_path)
    assert again["state"] == "finished"
    assert again["env_steps"] >= 2000
