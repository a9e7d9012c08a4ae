"""A replay in a process of its own: the same answers, and what happens when either side dies."""

from __future__ import annotations

import itertools
import os
import pickle
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from replay_streams import (
    IN_MEMORY,
    all_blocks,
    carry_spec,
    making,
    rollout,
    row_spec,
    sequence_spec,
)

from rlx import trees
from rlx.problems import ConfigError, refuse
from rlx.replay.files.segments import SegmentError
from rlx.replay.files.snapshots import Snapshots, read_blocks
from rlx.replay.prioritized import Prioritized
from rlx.replay.process import client as process
from rlx.replay.process.client import ReplayLost, ReplayProcess

SEQUENCE = sequence_spec(block_rows=2, length=5)
BATCH = 8


DRAWING = {
    "priority_exponent": 0.9,
    "priority_eta": 0.9,
    "priority_epsilon": 0.001,
    "importance_exponent": 0.6,
    "importance_exponent_final": None,
    "anneal_env_steps": None,
    "importance_scale": "batch",
    "initial_priority": "max",
    "stratified": True,
    "initial_priorities": None,
}


def make(**changes: Any) -> Prioritized:
    settings = {"capacity": 80, "ratio": 1.5, "min_sequences": 1, "seed": 0} | DRAWING | changes
    return making(Prioritized, 
        sequence=SEQUENCE, row_spec=row_spec(), carry_spec=carry_spec(), lanes=2,
        **IN_MEMORY | settings,
    )  # fmt: skip


def add(replay: Any, begin: int, end: int) -> None:
    replay.add(rollout([(k % 2, 0, k // 2) for k in range(begin, end)], SEQUENCE))


@pytest.fixture
def start():
    """Starts replays in processes, and sees to it that they end."""
    started: list[ReplayProcess] = []

    def begin(ahead: int = 0, **changes: Any) -> ReplayProcess:
        started.append(ReplayProcess(partial(make, **changes), ahead=ahead, batch_size=BATCH))
        return started[-1]

    yield begin
    for replay in started:
        replay.close()
        assert not psutil.pid_exists(replay.pid)


def test_it_answers_what_the_replay_would_here(start):
    here, there = make(), start()
    assert there.ratio == 1.5
    assert there.capacity == here.capacity
    for round_ in range(6):
        for replay in (here, there):
            add(replay, 12 * round_, 12 * round_ + 12)
        assert (there.startable, there.rows) == (here.startable, here.rows)
        assert (there.env_steps, there.nbytes) == (here.env_steps, here.nbytes)
        samples = [replay.sample(BATCH) for replay in (here, there)]
        for mine, its in zip(*[trees.flatten(vars(s)).values() for s in samples], strict=True):
            assert np.array_equal(mine, its)
        for replay in (here, there):
            replay.update_priorities(samples[0].keys, np.ones((BATCH, 3), np.float32))
    assert there.stats() == here.stats()
    state, other = here.state(), there.state()
    assert all(np.array_equal(state[name], other[name]) for name in state)


def test_it_is_told_of_values_that_change(start):
    here, there = make(), start()
    for replay in (here, there):
        add(replay, 0, 40)
        keys = replay.sample(BATCH).keys
        replay.change({"priority_eta": 0.0, "importance_exponent": 1.0})
        replay.update_priorities(keys, np.arange(3 * BATCH, dtype=np.float32).reshape(BATCH, 3))
    samples = [replay.sample(BATCH) for replay in (here, there)]
    assert samples[0].importance_exponent == samples[1].importance_exponent == 1.0
    assert np.array_equal(samples[0].batch.importance, samples[1].batch.importance)
    assert here.stats() == there.stats()
    assert make().stats()["replay/importance_exponent"] == 0.6


def test_two_samples_are_left_alone_while_more_are_drawn(start):
    replay = start(ahead=2)
    add(replay, 0, 40)
    kept: list[tuple[Any, Any]] = []
    for _ in range(20):
        for sample, copy in kept[-2:]:
            for mine, its in zip(
                trees.flatten(sample.batch).values(), trees.flatten(copy).values(), strict=True
            ):
                assert np.array_equal(mine, its)
        sample = replay.sample(BATCH)
        kept.append((sample, trees.tree_map(np.copy, sample.batch)))
        assert (np.diff(sample.batch.rows.inputs.time, axis=1) == 1).all()
        time.sleep(0.01)  # so that the next ones are drawn
    assert replay.stats()["replay/prefetch_lag_updates"] == 2.0


@pytest.mark.parametrize("shards", [None, 2])
def test_a_snapshot_comes_back_here_and_there(start, tmp_path, shards):
    replay, keeper = start(shards=shards), Snapshots(tmp_path)
    add(replay, 0, 30)
    keeper.write_ahead(replay)
    add(replay, 30, 50)
    segments = keeper.complete(replay)
    state = replay.state()
    for other in (make(shards=shards), start(seed=9, shards=shards)):
        other.restore(state, read_blocks(tmp_path, segments))
        assert [len(ring) for ring in all_blocks(other)] == [len(r) for r in all_blocks(replay)]
        for mine, its in zip(
            *[itertools.chain(*all_blocks(r)) for r in (other, replay)], strict=True
        ):
            assert all(np.array_equal(leaf, its.leaves[path]) for path, leaf in mine.leaves.items())
        assert np.array_equal(
            other.sample(BATCH).keys, make_restored(state, segments, tmp_path, shards)
        )


def make_restored(state: Any, segments: Any, folder: Path, shards: int | None) -> np.ndarray:
    other = make(shards=shards)
    other.restore(state, read_blocks(folder, segments))
    return other.sample(BATCH).keys


def test_what_cannot_be_read_for_a_restore_is_what_is_raised(start, tmp_path):
    replay = start()
    add(replay, 0, 40)
    segments = Snapshots(tmp_path).complete(replay)
    next(tmp_path.iterdir()).unlink()
    other = start()
    with pytest.raises(SegmentError):
        other.restore(replay.state(), read_blocks(tmp_path, segments))
    other.close()


def test_what_it_raises_is_raised_here_and_it_goes_on(start):
    replay = start()
    with pytest.raises(ValueError, match="No sequence is startable"):
        replay.sample(BATCH)
    with pytest.raises(ValueError, match="Block out of order: lane 0"):
        replay.add(rollout([(0, 0, 5)], SEQUENCE))
    with pytest.raises(ValueError, match="another layout"):
        replay.restore(make(capacity=100).state(), [[]])
    add(replay, 0, 40)
    replay.update_priorities(np.arange(8), np.full((8, 3), np.nan, np.float32))
    with pytest.raises(FloatingPointError, match="not finite"):
        replay.sample(BATCH)
    with pytest.raises(ValueError, match="batches have 8 sequences always"):
        replay.sample(4)
    assert len(replay.sample(BATCH).keys) == BATCH


def test_what_cannot_be_made_is_said_and_leaves_nothing_behind():
    before = {child.pid for child in psutil.Process().children()}
    with pytest.raises(ValueError, match=r"raise replay\.capacity"):
        ReplayProcess(partial(make, capacity=2), ahead=0, batch_size=BATCH)
    with pytest.raises(ConfigError, match=r"replay\.capacity=1: too few"):
        ReplayProcess(refused, ahead=0, batch_size=BATCH)
    with pytest.raises(ValueError, match="define the agent in a module"):
        ReplayProcess(lambda: None, ahead=0, batch_size=BATCH)
    assert {child.pid for child in psutil.Process().children()} == before


def refused() -> Any:
    raise refuse("replay.capacity", "too few", given="1")


def test_its_death_is_an_error_that_says_how_it_ended(start):
    replay = start(ahead=2)
    add(replay, 0, 40)
    replay.sample(BATCH)
    for number in (signal.SIGINT, signal.SIGTERM):  # are the run's affair
        os.kill(replay.pid, number)
    replay.sample(BATCH)
    os.kill(replay.pid, signal.SIGKILL)
    with pytest.raises(ReplayLost, match=r"ended by SIGKILL \(is the machine's memory full\?\)"):
        add(replay, 40, 44)
    with pytest.raises(ReplayLost, match=r"replay's process \d+ is closed"):
        replay.stats()


def test_an_answer_that_does_not_come_is_an_error(start, monkeypatch):
    replay = start()
    monkeypatch.setattr(process.Caller.call, "__kwdefaults__", {"deadline_s": 0.5, "feed": ()})
    os.kill(replay.pid, signal.SIGSTOP)
    while psutil.Process(replay.pid).status() != psutil.STATUS_STOPPED:
        time.sleep(0.01)
    try:
        with pytest.raises(ReplayLost, match="has not answered next_key for 0 s"):
            _ = replay.rings[0].next_key
    finally:
        os.kill(replay.pid, signal.SIGCONT)
    with pytest.raises(ReplayLost, match="is closed"):  # no late answer is taken for another
        _ = replay.rings[0].oldest_key


def test_a_message_that_is_not_taken_is_an_error(start, monkeypatch):
    monkeypatch.setattr(process, "CALL_S", 1)
    replay = start()
    os.kill(replay.pid, signal.SIGSTOP)
    try:
        with pytest.raises(ReplayLost, match="has not gone on with a message for 1 s"):
            tell(replay, 1000, np.ones((8, 40_000), np.float32))  # more than the socket can hold
    finally:
        os.kill(replay.pid, signal.SIGCONT)


def test_many_things_told_are_heard_of_without_a_call(start):
    replay = start()
    add(replay, 0, 40)
    replay.update_priorities(np.arange(8), np.full((8, 3), np.nan, np.float32))
    with pytest.raises(FloatingPointError, match="not finite"):
        tell(replay, process.MOST_TOLD, np.ones((8, 3), np.float32))
    tell(replay, 5000, np.ones((8, 3), np.float32))
    assert len(replay.sample(BATCH).keys) == BATCH


def tell(replay: ReplayProcess, times: int, td: np.ndarray) -> None:
    for _ in range(times):
        replay.update_priorities(np.arange(len(td)), td)


class TwoWords(Exception):
    """One that pickle cannot make again."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} {two}")


def strange() -> Any:
    raise TwoWords("mind", "this")


def test_an_error_keeps_its_words_and_the_place_it_came_from():
    with pytest.raises(RuntimeError, match="TwoWords: mind this") as raised:
        ReplayProcess(strange, ahead=0, batch_size=BATCH)
    assert "in strange\n" in raised.value.__notes__[0]


def test_what_main_defines_cannot_be_imported_there(tmp_path):
    code = (
        "from rlx.replay.process.client import ReplayProcess\n"
        "def make(): pass\n"
        "ReplayProcess(make, ahead=0, batch_size=8)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "define the agent in a module (not in __main__ or a notebook)" in done.stderr


def test_it_ends_with_a_run_that_is_killed(tmp_path):
    code = (
        "import sys, time, test_process as t\n"
        "from rlx.replay.process.client import ReplayProcess\n"
        "replay = ReplayProcess(t.make, ahead=2, batch_size=8)\n"
        "t.add(replay, 0, 40); replay.sample(8)\n"
        "print(replay.pid, flush=True); time.sleep(60)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent,
                           stdout=subprocess.PIPE, text=True)  # fmt: skip
    pid = int(run.stdout.readline())
    assert psutil.pid_exists(pid)
    run.kill()
    run.wait()
    psutil.Process(pid).wait(10)


def test_what_lies_in_the_folder_it_is_started_from_is_not_imported(start, monkeypatch, tmp_path):
    (tmp_path / "socket.py").write_text("raise RuntimeError('not this one')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    replay = start()
    add(replay, 0, 40)
    assert len(replay.sample(BATCH).keys) == BATCH


def test_exceptions_travel():
    """ConfigError is made of problems, not of a text."""
    error = refuse("replay.capacity", "too few", given="1")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
