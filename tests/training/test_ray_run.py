"""Whole runs on Ray: bad settings, kills, signals, resume; nothing is left running."""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray._common.usage.usage_constants import CLUSTER_METADATA_KEY
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster

import rlx
from rlx.cluster.fleet import Fleet, Slot
from rlx.config import targets
from rlx.evaluation.ray_evaluator import RayEvaluator
from rlx.problems import ConfigError
from rlx.runs.folders import read_rows
from rlx.training.stages import Stages
from rlx.types import Evaluated, Rollout
from tests.acting.test_ray_pool import assert_in_order_and_once, streams, wait_for
from tests.training.test_run import TINY, run

RAY = [
    *(key for key in TINY if not key.startswith("acting.")),
    "acting=ray_pool",
    "acting.instances=2",
    "acting.envs_per_actor=4",
    "acting.env_steps_per_request=40",
    "acting.cpus_per_actor=0.5",
]


OURS = "RLX_TEST_SESSION", uuid.uuid4().hex  # in the environment of all that these tests start
os.environ.update([OURS])


def rays() -> list[psutil.Process]:
    """Processes of any Ray cluster that these tests have started."""
    names = ("raylet", "gcs_server", "ray::")
    return [
        process
        for process in psutil.process_iter(["name", "cmdline", "status", "environ"])
        if process.info["status"] != psutil.STATUS_ZOMBIE
        and OURS in (process.info["environ"] or {}).items()
        and any(
            name in " ".join([process.info["name"], *process.info["cmdline"][:2]]) for name in names
        )
    ]


@pytest.fixture(autouse=True)
def nothing_is_left_running() -> Iterator[None]:
    yield
    wait_for(lambda: not rays(), f"Ray to end: {rays()}", 90)


def command(folder: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "rlx.train", *arguments, f"hydra.run.dir={folder}"]


def train(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(folder, *arguments), capture_output=True, text=True, timeout=200, check=False
    )


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            ["acting.instances=128", "replay.capacity=400000"],
            "acting.instances=128: 128 actors ask for 128 CPU, this machine has ",
        ),
        (["acting.min_instances=3"], "acting.min_instances=3: more than acting.instances=2"),
        (
            ["acting.address=127.0.0.1:1"],
            "acting.address=127.0.0.1:1: cannot be reached ([Errno 111] Connection refused); "
            "tried 127.0.0.1 port 1 for 10 s",
        ),
        (["acting.address=auto"], "acting.address=auto: no Ray cluster is there; start one with"),
        (
            ["acting.resources.simulator=1"],
            "no such setting; write +acting.resources.simulator=1",
        ),
        (
            ["+acting.resources.simulator=1", "acting.cpus_per_actor=0.1"],
            "acting.resources.simulator=1: no node offers it",
        ),
        (["acting.cpus_per_actor=0.00001"], "acting: Ray cannot give actors what is asked for: "),
        (["acting.gpus_per_actor=1.5"], "acting.gpus_per_actor=1.5: accepted: a share of one GPU"),
        (["acting.request_timeout_s=inf"], "acting.request_timeout_s=inf"),
        (
            ["acting.max_in_flight_bytes=1000000000000000"],
            "acting.max_in_flight_bytes=1000000000000000: Ray's object store takes twice as much",
        ),
        (["acting.address=ray://127.0.0.1:1"], "acting.address=ray://127.0.0.1:1: "),
    ],
)
def test_what_cannot_work_is_said_before_anything_starts(tmp_path, settings, says):
    with pytest.raises(ConfigError) as caught:
        rlx.run(rlx.compose(["acting=ray_pool", *settings]), tmp_path / "run")
    assert says in str(caught.value)
    assert not (tmp_path / "run" / "env.json").exists()


def test_what_cannot_be_reached_is_one_line_and_status_2(tmp_path):
    done = train(tmp_path / "run", "acting=ray_pool", "acting.address=127.0.0.1:1")
    says = "acting.address=127.0.0.1:1: cannot be reached "
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("rlx: ")]
    assert says in line
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "env.json").exists()


def test_a_cluster_of_another_ray_version_is_refused(tmp_path):
    """A real cluster, whose own note of its version is altered."""
    there = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    address = there.address
    try:
        store = GcsClient(address=address)
        where = {"namespace": ray._private.ray_constants.KV_NAMESPACE_CLUSTER}
        note = json.loads(store.internal_kv_get(CLUSTER_METADATA_KEY, **where))
        note = json.dumps(note | {"ray_version": "2.9.3"}).encode()
        store.internal_kv_put(CLUSTER_METADATA_KEY, note, overwrite=True, **where)
        done = train(tmp_path / "run", "acting=ray_pool", f"acting.address={address}")
    finally:
        there.shutdown()
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("rlx: ")]
    assert f"acting.address={address}: the cluster there refused this program: " in line
    assert "2.9.3" in line
    assert line.endswith("install the same versions of ray and python on all machines")
    assert "Traceback" not in done.stderr


def test_what_raises_always_ends_with_a_checkpoint_and_status_1(tmp_path, monkeypatch):
    """The environment works when it is checked, and in no actor."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    code = (
        "import rlx, tests.training.test_ray_run as t\n"
        "from tests.acting.faulty_envs import FaultyFamily\n"
        "from rlx.training import assemble\n"
        "build = assemble.build\n"
        "def faulty(node, role, **given):\n"
        "    made = build(node, role, **given)\n"
        "    return FaultyFamily(inner=made, fault='raises', after=20) if role == 'env' else made\n"
        "assemble.build = faulty\n"
        f"rlx.run(rlx.compose([*t.RAY, 'total_env_steps=100000']), {str(tmp_path / 'run')!r})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 1
    assert "out of coal" in done.stderr
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed"
    assert "actor" in status["error"]
    assert list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))


class Kept:
    """Keeps what reached the loop, and whether it went on while an actor was missing."""

    def __init__(self) -> None:
        self.rollouts: list[Rollout] = []
        self.updates_without_all = 0
        self.replaced_s: list[float] = []  # from each actor's last kill until it acted again

    def note(self, killed_s: dict[int, float], slot: Slot) -> None:
        began = killed_s.get(slot.index, math.inf)
        if slot.state == "ready" and slot.ready_s > began:
            self.replaced_s.append(slot.ready_s - killed_s.pop(slot.index))


class Killer(threading.Thread):
    """Sends SIGKILL to a random actor's process every second, once all four act."""

    def __init__(self, seconds: float) -> None:
        super().__init__(daemon=True)
        self.seconds, self.kills = seconds, 0
        self.killed_s: dict[int, float] = {}  # actor -> when last
        self.fleet: Fleet | None = None
        self.niceness: dict[str, set[int]] = {"ready": set(), "preparing": set()}
        self.start()

    def run(self) -> None:
        while self.fleet is None:
            time.sleep(0.01)
        while self.fleet.ready < 4:
            time.sleep(0.1)
        rng, end = random.Random(0), time.monotonic() + self.seconds
        while time.monotonic() < end:
            time.sleep(1.0)
            slot = self.fleet.slots[rng.randrange(4)]
            if (where := slot.where) is not None:  # else it is only just being started
                with suppress(ProcessLookupError):
                    self.niceness[slot.state].add(os.getpriority(os.PRIO_PROCESS, where.pid))
                    os.kill(where.pid, signal.SIGKILL)
                    self.killed_s[slot.index] = time.monotonic()
                    self.kills += 1


def keep(monkeypatch: pytest.MonkeyPatch, killer: Killer) -> Kept:
    """Watches every rollout, update and replacement of a run in this process."""
    kept, learn, act = Kept(), Stages.learn, Stages.act

    def learning(self: Stages) -> None:
        before = self.parts.learner.updates
        learn(self)
        if self.parts.learner.updates > before and killer.killed_s:
            kept.updates_without_all += 1

    def acting(self: Stages) -> None:
        replay: Any = self.parts.replay
        add = type(replay).add
        if not hasattr(replay, "watched"):
            replay.watched = True
            replay.add = lambda rollout: (kept.rollouts.append(rollout), add(replay, rollout))
        pool: Any = self.parts.pool
        killer.fleet = pool._fleet
        for slot in pool._fleet.slots:
            kept.note(killer.killed_s, slot)
        act(self)

    monkeypatch.setattr(Stages, "learn", learning)
    monkeypatch.setattr(Stages, "act", acting)
    return kept


@pytest.mark.slow  # tests/acting and a notebook kill one actor each in every day's tests
@pytest.mark.parametrize(
    ("inference", "seconds"), [("actor", 12.0), ("actor", 60.0), ("server", 60.0)]
)
def test_a_run_whose_actors_are_killed_every_second_finishes(
    tmp_path, monkeypatch, inference, seconds
):
    killer = Killer(seconds)
    kept = keep(monkeypatch, killer)
    finished = Stages.finished

    def all_are_back(self: Stages) -> bool:
        return (not killer.is_alive() and not killer.killed_s) or finished(self)

    monkeypatch.setattr(Stages, "finished", all_are_back)
    summary = run(
        tmp_path,
        *RAY,
        "acting.instances=4",
        "acting.cpus_per_actor=0.25",
        f"acting.inference={inference}",
        "replay.ratio=null",  # so that learning waits for nobody
        "total_env_steps=10_000_000",
        "stop_after_s=180",
        "logging.every_env_steps=2000",
        "checkpoint.every_env_steps=1_000_000",
    )
    assert summary["state"] == "finished"
    replaced = f"replaced in at most {max(kept.replaced_s):.1f} s"
    print(f"{killer.kills} kills, {replaced}")
    assert killer.kills > seconds / 3
    assert_in_order_and_once(kept.rollouts)
    assert {lane for lane, _ in streams(kept.rollouts)} == set(range(16))
    assert kept.updates_without_all > killer.kills  # learning waits for no replacement
    assert read_rows(tmp_path / "metrics.jsonl")[-1]["acting/restarts_died"] > seconds / 4
    assert len(kept.replaced_s) >= 4
    assert not killer.killed_s  # the last ones are back, too
    assert killer.niceness["ready"] == {15}
    assert 0 in killer.niceness["preparing"]  # it starts with a full share


def test_evaluation_in_an_actor_of_its_own_lets_training_go_on(tmp_path, monkeypatch):
    results: list[Evaluated] = []
    poll, finished = RayEvaluator.poll, Stages.finished

    def polled(self: RayEvaluator) -> list[Evaluated]:
        found = poll(self)
        results.extend(found)
        return found

    monkeypatch.setattr(RayEvaluator, "poll", polled)
    monkeypatch.setattr(Stages, "finished", lambda self: len(results) > 1 or finished(self))
    run(
        tmp_path,
        *RAY,
        "replay.ratio=null",
        "total_env_steps=10_000_000",
        "stop_after_s=120",
        "logging.every_env_steps=200",
        "checkpoint.every_env_steps=1_000_000",
        "env.max_episode_steps=30",
        "evaluation.where=actor",
        "evaluation.every_env_steps=1000",
        "evaluation.episodes=4",
        "evaluation.final_episodes=0",
    )
    rows = read_rows(tmp_path / "metrics.jsonl")
    found = [row for row in rows if row["evaluation/return_mean"] is not None]
    assert len(found) >= 2
    # The run ends as soon as the second is found, be there new env steps by then or not; all other
    # rows are of a run that went on.
    went_on = [row for row in found if row is not rows[-1]]
    assert went_on
    assert all(row["evaluation/of_env_steps"] < row["env_steps"] for row in went_on)
    assert all(row["evaluation/weights_version"] < row["updates"] for row in went_on)
    assert found[-1]["evaluation/of_env_steps"] <= found[-1]["env_steps"]
    assert found[-1]["evaluation/weights_version"] <= found[-1]["updates"]
    assert all(row["time/evaluation"] == 0 for row in rows if "time/evaluation" in row)
    assert rows[-1]["evaluation/skipped"] >= 0


def test_a_killed_run_leaves_nothing_running_and_resumes(tmp_path):
    running = subprocess.Popen(command(tmp_path, *RAY, "total_env_steps=1_000_000"))
    try:
        checkpoints = tmp_path / "checkpoints"
        wait_for(lambda: len(list(checkpoints.glob("[0-9]*"))) > 1, "two checkpoints", 90)
    finally:
        running.kill()
        running.wait(10)
    # Ray's own agents need a minute more, which they spend trying to report the loss.
    agents = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
    wait_for(
        lambda: all(process.info["cmdline"][:1] in [[a] for a in agents] for process in rays()),
        "Ray to end with its driver",
    )
    saved = max(int(path.name) for path in checkpoints.glob("[0-9]*"))
    done = train(tmp_path, f"resume={tmp_path}", f"total_env_steps={saved + 400}")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["state"] == "finished"
    assert saved + 400 <= summary["env_steps"] < saved + 2000


@pytest.mark.parametrize(
    ("number", "to"),
    [(signal.SIGINT, "group"), (signal.SIGTERM, "all")],
)
def test_a_signal_to_everybody_ends_the_run_with_a_checkpoint(tmp_path, number, to):
    """A terminal's Ctrl-C goes to a group, a batch system's SIGTERM to all processes."""
    running = subprocess.Popen(
        command(tmp_path, *RAY, "total_env_steps=1_000_000"), start_new_session=True
    )
    wait_for(lambda: (tmp_path / "metrics.jsonl").exists(), "the first row", 90)
    if to == "group":
        os.killpg(running.pid, number)
    else:
        driver = psutil.Process(running.pid)
        for process in [driver, *driver.children(recursive=True)]:
            process.send_signal(number)
    assert running.wait(60) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["state"] == "interrupted"
    assert Path(summary["checkpoint"]).is_dir()


def test_a_run_inside_a_running_event_loop_as_a_notebook_has_one(tmp_path, monkeypatch):
    """The run has a cluster of its own, whatever Ray's own setting says."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")

    async def cell() -> dict[str, Any]:
        return run(tmp_path, *RAY, "total_env_steps=400")

    assert asyncio.run(cell())["state"] == "finished"
    assert not ray.is_initialized()


def test_actors_wrap_their_lanes_with_classes_that_only_the_run_was_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr(targets, "_allowed", {"rlx.", "tests."})
    mine = "{_target_: tests.envs.wrapped.Plus, number: 0}"
    clip = "{_target_: gymnasium.wrappers.ClipReward, min_reward: -1.0, max_reward: 1.0}"
    settings = [*RAY, "env=gymnasium", "env.id=tests.envs.wrapped:rlx-wrapped/Lives-v0"]
    settings += [f"env.wrappers=[{mine},{clip}]", "evaluation.where=actor", "total_env_steps=800"]
    summary = rlx.run(rlx.compose(settings), tmp_path)
    assert summary["evaluation_return"] == 780.0  # ten times 1 + 2 + ... + 12
    rows = read_rows(tmp_path / "metrics.jsonl")
    returns = [row["train/return_mean"] for row in rows if row.get("train/return_mean")]
    assert set(returns) == {780.0}


@pytest.mark.slow  # most of a minute; sweeps by rlx_ray are tested in test_sweeps
def test_two_jobs_of_a_multirun_each_have_their_cluster(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "rlx.train", "-m", *RAY, "total_env_steps=400", "seed=0,1"),
            f"hydra.sweep.dir={tmp_path}",
        ],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    states = [json.loads((tmp_path / n / "summary.json").read_text())["state"] for n in "01"]
    assert states == ["finished", "finished"]


@pytest.mark.parametrize(
    ("victim", "named"),
    [
        ("gcs_server", "GCS server at "),
        ("DashboardAgent", "its dashboard_agent was lost"),
        pytest.param("raylet", "its raylet (process ", marks=pytest.mark.slow),
        pytest.param("RuntimeEnvAgent", "runtime_env_agent was lost", marks=pytest.mark.slow),
    ],
)
def test_a_run_names_what_ended_its_cluster(tmp_path, victim, named):
    """Ray itself ends a process whose raylet ends with an agent, before it can save."""
    often = ("checkpoint.every_env_steps=500", "total_env_steps=1_000_000")
    running = subprocess.Popen(command(tmp_path, *RAY, *often), stderr=subprocess.PIPE, text=True)
    try:
        saved = (tmp_path / "checkpoints").glob
        wait_for(lambda: [*saved("[0-9]*")], "a checkpoint", 120)
        (found,) = [
            p for p in psutil.Process(running.pid).children(recursive=True) if victim in names_of(p)
        ]
        found.kill()
        said = running.communicate(timeout=300)[1]
    finally:
        running.kill()
    assert running.returncode == 1
    lines = [line for line in said.splitlines() if line.startswith("rlx: ")]
    assert named in lines[0]
    assert lines[1:] == [f"rlx: resume={tmp_path} goes on from the last checkpoint"]
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], named in status["error"]) == ("failed", True)


def names_of(process: psutil.Process) -> str:
    return (process.cmdline() or [""])[0].rpartition("/")[2]
