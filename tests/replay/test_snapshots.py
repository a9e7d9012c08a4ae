"""Snapshots: only what is new is written, while blocks go on coming, and exactly comes back."""

from __future__ import annotations

import itertools
import threading
import time
from typing import Any

import numpy as np
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

from rlx.replay.files import snapshots
from rlx.replay.files.segments import SegmentError
from rlx.replay.files.snapshots import Snapshots, read_blocks
from rlx.replay.uniform import Uniform

SEQUENCE = sequence_spec(block_rows=2, length=5)


@pytest.fixture(autouse=True)
def small_segments(monkeypatch):
    """Lets a segment hold three blocks."""
    monkeypatch.setattr(snapshots, "SEGMENT_BYTES", 3.5 * make().rings[0].block_nbytes)


def make(seed: int = 0, **keeping: Any) -> Uniform:
    return making(
        Uniform,
        capacity=80,
        ratio=None,
        min_sequences=1,
        sequence=SEQUENCE,
        row_spec=row_spec(),
        carry_spec=carry_spec(),
        lanes=2,
        seed=seed,
        **IN_MEMORY | keeping,
    )


def add(replay: Uniform, begin: int, end: int) -> None:
    replay.add(rollout([(k % 2, 0, k // 2) for k in range(begin, end)], SEQUENCE))


def assert_same(a: Uniform, b: Uniform) -> None:
    state, other = a.state(), b.state()
    assert state.keys() == other.keys()
    for name, value in state.items():
        assert np.array_equal(value, other[name]), name
    mine_and_its = [itertools.chain(*all_blocks(replay)) for replay in (a, b)]
    for some, others in zip(*mine_and_its, strict=True):
        assert np.array_equal(some.keys, others.keys)
        for mine, its in ((some.leaves, others.leaves),):
            assert all(np.array_equal(leaf, its[path]) for path, leaf in mine.items())


def restored(folder: Any, segments: list[dict[str, Any]], state: dict[str, Any]) -> Uniform:
    other = make(seed=9, shards=state.get("shards"))
    other.restore(state, read_blocks(folder, segments))
    return other


@pytest.mark.parametrize(
    "keeping", [{}, {"storage": "mmap"}, {"shards": 2}], ids=["memory", "mmap", "shards"]
)
def test_each_block_is_written_once_and_all_comes_back(tmp_path, keeping):
    replay, keeper = make(**keeping), Snapshots(tmp_path)
    at = 0
    written: dict[str, int] = {}
    for more in (0, 5, 0, 7, 30, 1, 100, 3):  # the ring holds 40
        add(replay, at, at + more)
        at += more
        segments = keeper.complete(replay)
        assert_same(restored(tmp_path, segments, replay.state()), replay)
        for path in tmp_path.iterdir():
            written.setdefault(path.name, path.stat().st_mtime_ns)
            assert written[path.name] == path.stat().st_mtime_ns
        for ring in read_blocks(tmp_path, segments):
            keys = [k for some in ring for k in some.keys.tolist()]
            assert keys == sorted(set(keys))
    keeper.forget(set())
    assert {path.name for path in tmp_path.iterdir()} == {s["file"] for s in segments}
    assert len(written) > len(segments)


def test_a_resumed_run_writes_only_what_is_new(tmp_path):
    replay, keeper = make(), Snapshots(tmp_path)
    add(replay, 0, 20)
    segments = keeper.complete(replay)
    state = replay.state()
    other = restored(tmp_path, segments, state)
    again = Snapshots(tmp_path, segments)
    assert again.complete(other) == segments
    add(other, 20, 21)
    assert len(again.complete(other)) == len(segments) + 1
    # Back to the first checkpoint: the same keys now name other blocks.
    third = restored(tmp_path, segments, state)
    third.add(rollout([(1, 1, 0)], SEQUENCE))
    back = Snapshots(tmp_path, segments)
    assert_same(restored(tmp_path, back.complete(third), third.state()), third)


def test_blocks_that_come_while_it_writes_are_in_the_checkpoint_exactly(tmp_path):
    replay, keeper = make(), Snapshots(tmp_path)
    add(replay, 0, 40)
    stop = threading.Event()
    added = [40]

    def acting() -> None:
        while not stop.is_set():
            add(replay, added[0], added[0] + 1)
            added[0] += 1

    thread = threading.Thread(target=acting)
    thread.start()
    try:
        for _ in range(10):
            keeper.write_ahead(replay)
            while keeper.is_writing:
                time.sleep(0.001)
    finally:
        stop.set()
        thread.join()
    segments = keeper.complete(replay)
    assert added[0] > 50
    assert_same(restored(tmp_path, segments, replay.state()), replay)


def test_segments_are_kept_when_it_is_not_known_who_needs_them(tmp_path):
    replay, keeper = make(), Snapshots(tmp_path)
    add(replay, 0, 20)
    keeper.complete(replay)
    add(replay, 20, 70)
    keeper.complete(replay)
    (tmp_path / "a folder").mkdir()
    before = len(list(tmp_path.iterdir()))
    keeper.forget(None)
    assert len(list(tmp_path.iterdir())) == before
    keeper.forget(set())
    assert len(list(tmp_path.iterdir())) < before
    assert (tmp_path / "a folder").is_dir()


def test_what_kept_it_from_writing_is_raised_at_the_checkpoint(tmp_path):
    (tmp_path / "file").write_text("")
    replay, keeper = make(), Snapshots(tmp_path / "file" / "below")
    add(replay, 0, 3)
    keeper.write_ahead(replay)
    with pytest.raises(OSError, match="file"):
        keeper.complete(replay)


def test_a_damaged_or_missing_segment_is_named(tmp_path):
    replay, keeper = make(), Snapshots(tmp_path)
    add(replay, 0, 9)
    segments = keeper.complete(replay)
    path = tmp_path / segments[1]["file"]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(SegmentError, match=path.name):
        restored(tmp_path, segments, replay.state())
    with pytest.raises(ValueError, match="has 9 blocks, 6 were found"):
        restored(tmp_path, [segments[0], segments[2]], replay.state())
