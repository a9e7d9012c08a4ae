"""Batches drawn ahead: the same distribution, no torn or reused arrays, no hang."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
from replay_streams import IN_MEMORY, carry_spec, making, rollout, row_spec, sequence_spec
from scipy import stats

from rlx.replay.prefetch import SPARE
from rlx.replay.uniform import Uniform

SEQUENCE = sequence_spec(block_rows=2, length=5)


def make(prefetch: int, min_sequences: int = 1) -> Uniform:
    return making(
        Uniform,
        capacity=80,
        ratio=None,
        min_sequences=min_sequences,
        sequence=SEQUENCE,
        row_spec=row_spec(),
        carry_spec=carry_spec(),
        lanes=2,
        seed=0,
        **IN_MEMORY | {"prefetch": prefetch},
    )


def add(replay: Uniform, begin: int, end: int) -> None:
    replay.add(rollout([(k % 2, 0, k // 2) for k in range(begin, end)], SEQUENCE))


def assert_whole(sample: Any) -> None:
    """Every row is the one that its key and its place say."""
    first = 2 * (sample.keys // 2)
    assert (sample.batch.rows.inputs.time == first[:, None] + np.arange(5)).all()
    assert (sample.batch.carry.core[0][:, 0] == first).all()


def test_prefetched_samples_follow_the_same_distribution_and_are_whole():
    replay, counts = make(prefetch=3), np.zeros(50)
    add(replay, 0, 50)
    for _ in range(400):
        sample = replay.sample(100)
        assert_whole(sample)
        np.add.at(counts, sample.keys, 1)
    replay.close()
    assert counts[:10].sum() == counts[46:].sum() == 0
    assert stats.chisquare(counts[10:46]).pvalue > 1e-3


def test_a_sample_stays_as_it_is_while_the_next_two_are_taken():
    replay = make(prefetch=2)
    add(replay, 0, 50)
    kept = []
    for _ in range(50):
        sample = replay.sample(8)
        kept = [*kept[-1:], (sample, sample.batch.rows.inputs.time.copy())]
        time.sleep(0.002)  # the thread draws all it may
        for old, its_time in kept:
            assert np.array_equal(old.batch.rows.inputs.time, its_time)
    arrays = {id(replay.sample(8).batch.rows.reward) for _ in range(40)}
    assert len(arrays) == 2 + SPARE
    replay.close()


def test_no_more_is_drawn_ahead_than_was_asked_for():
    replay, drawn = make(prefetch=2), []
    draw = replay._draw
    replay._draw = lambda *given: drawn.append(0) or draw(*given)  # type: ignore[method-assign]
    add(replay, 0, 50)
    for taken in range(1, 20):
        replay.sample(4)
        time.sleep(0.01)
        assert taken <= len(drawn) <= taken + 2
        assert replay.stats()["replay/prefetch_lag_updates"] <= 2
    assert replay.stats()["replay/prefetch_lag_updates"] == 2
    replay.close()


def test_it_waits_until_learning_may_begin_and_ends_when_closed():
    before = threading.active_count()
    replay = make(prefetch=2, min_sequences=10)
    add(replay, 0, 6)
    got: list[Any] = []
    thread = threading.Thread(target=lambda: got.append(replay.sample(4)))
    thread.start()
    time.sleep(0.3)
    assert not got
    add(replay, 6, 30)
    thread.join(10)
    assert_whole(got[0])
    with pytest.raises(ValueError, match="have 4 sequences always"):
        replay.sample(5)
    replay.close()
    assert threading.active_count() <= before


def test_what_ends_the_thread_is_raised():
    replay = make(prefetch=1)

    def broken(*_: Any) -> Any:
        raise RuntimeError("the ring is broken")

    replay._draw = broken  # type: ignore[method-assign]
    add(replay, 0, 50)
    with pytest.raises(RuntimeError, match="the ring is broken"):
        replay.sample(4)
    replay.close()


def test_samples_stay_whole_while_blocks_are_overwritten():
    replay, stop = make(prefetch=2), threading.Event()
    add(replay, 0, 50)

    def write() -> None:
        at = 50
        while not stop.is_set():
            add(replay, at, at + 2)
            at += 2

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(150):
            assert_whole(replay.sample(16))
    finally:
        stop.set()
        writer.join()
        replay.close()
