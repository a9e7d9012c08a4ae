"""The queue: every sequence once, in order; late ones are dropped and counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replay_streams import all_blocks, carry_spec, making, rollout, row_spec, sequence_spec

from rlx.interfaces import PrioritizedReplay
from rlx.replay.online import Online
from rlx.types import Carry, Sample

SEQUENCE = sequence_spec(block_rows=2, length=4, blocks_per_stride=2)


def make(lanes: int = 2, **changes: Any) -> Online:
    options: dict[str, Any] = {
        "capacity": 80,
        "min_sequences": 4,
        "max_delay": 1000,
        "gather_threads": 1,
        "record": None,
        "sequence": SEQUENCE,
        "row_spec": row_spec(),
        "carry_spec": carry_spec(),
        "lanes": lanes,
        "seed": 0,
        "on_policy": False,
    }
    return making(Online, **options | changes)


def add(replay: Online, begin: int, end: int) -> None:
    """Blocks of two lanes taking turns."""
    replay.add(rollout([(k % 2, 0, k // 2) for k in range(begin, end)], SEQUENCE))


def seen(sample: Sample) -> list[tuple[int, int]]:
    """(lane, row) of every row, in order."""
    rows = sample.batch.rows
    return list(zip(rows.action.ravel().tolist(), rows.inputs.time.ravel().tolist(), strict=True))


def test_every_row_is_trained_on_once_and_in_order():
    replay, trained = make(), []
    for begin in range(0, 400, 8):
        add(replay, begin, begin + 8)  # two sequences of each lane
        sample = replay.sample(4)
        trained += seen(sample)
        assert (sample.batch.importance == 1).all()
        assert (sample.batch.carry.core[0][:, 0] == sample.batch.rows.inputs.time[:, 0]).all()
    assert len(trained) == len(set(trained)) == 800
    for lane in (0, 1):
        assert [row for its, row in trained if its == lane] == list(range(400))
    assert replay.startable == 0
    assert replay.stats()["replay/dropped_sequences"] == 0


def test_what_waits_too_long_is_dropped_and_counted():
    replay = make(max_delay=10)
    add(replay, 0, 4)  # complete after 8 env steps
    assert replay.startable == 2
    add(replay, 4, 9)
    assert replay.startable == 4
    add(replay, 9, 10)
    assert replay.stats()["replay/dropped_sequences"] == 2
    assert seen(replay.sample(1))[0] == (0, 4)


def test_what_the_ring_has_forgotten_is_dropped():
    replay = make()  # 40 blocks
    add(replay, 0, 44)
    assert replay.stats()["replay/dropped_sequences"] == 2
    assert replay.startable == 20
    assert seen(replay.sample(1))[0] == (0, 4)


def test_a_slow_lane_loses_its_own_sequences_only():
    replay = make()  # 40 blocks
    replay.add(rollout([(1, 0, 0)], SEQUENCE))  # lane 1 begins a sequence, and pauses
    replay.add(rollout([(0, 0, n) for n in range(38)], SEQUENCE))
    replay.add(rollout([(1, 0, 1)], SEQUENCE))  # and ends it, behind 19 of lane 0
    assert replay.startable == 20
    replay.add(rollout([(0, 0, 38)], SEQUENCE))  # over its first block
    assert replay.startable == 19
    assert replay.stats()["replay/dropped_sequences"] == 1
    assert {lane for lane, _ in seen(replay.sample(19))} == {0}


def test_a_delay_that_no_batch_can_meet_is_refused():
    with pytest.raises(ValueError, match=r"max_delay=12: 8 sequences of 2 lanes take about 24"):
        make(min_sequences=8, max_delay=12)


def test_acting_waits_for_the_learner_and_the_learner_for_sequences():
    replay = make()
    add(replay, 0, 12)
    assert not replay.has_enough
    add(replay, 12, 16)
    assert replay.has_enough
    replay.sample(4)
    assert not replay.has_enough
    replay.sample(4)
    with pytest.raises(ValueError, match=r"4 sequences are asked for, 0 wait; set replay\.min_seq"):
        replay.sample(4)


def test_an_on_policy_agents_queue_has_enough_with_one_batch():
    replay = make(on_policy=True)
    add(replay, 0, 6)
    assert (replay.startable, replay.has_enough) == (2, False)
    add(replay, 6, 8)
    assert (replay.startable, replay.has_enough) == (4, True)
    replay.sample(4)
    assert (replay.startable, replay.has_enough) == (0, False)


def test_starts_inside_blocks_are_given_once_and_in_order():
    """Every row begins one sequence; their carry is the frames before, so it has no core."""
    sequence = sequence_spec(block_rows=3, length=4, stride=1)
    carry = Carry(core=(), frames=carry_spec().frames)
    replay, begun = make(sequence=sequence, carry_spec=carry), []
    for number in range(60):
        some = rollout([(lane, 0, number) for lane in range(2)], sequence, carry=carry)
        replay.add(some)
        while replay.startable >= 4:
            rows = replay.sample(4).batch.rows
            begun += [(int(rows.action[b, 0]), int(rows.inputs.time[b, 0])) for b in range(4)]
    assert len(begun) == len(set(begun)) > 100
    for lane in (0, 1):
        times = [time for its, time in begun if its == lane]
        assert times == list(range(len(times)))


def test_uniform_and_online_take_no_priorities():
    assert not isinstance(make(), PrioritizedReplay)


def test_a_stopped_queue_goes_on():
    replay, other = make(), make(seed=5)
    add(replay, 0, 30)
    replay.sample(3)
    other.restore(replay.state(), all_blocks(replay))
    assert other.startable == replay.startable
    for both in (replay, other):
        add(both, 30, 34)
    while replay.startable:
        assert seen(replay.sample(1)) == seen(other.sample(1))


@given(data=st.data())
@settings(deadline=None, max_examples=80)
def test_no_history_gives_a_row_twice_or_out_of_order(data):
    """Lanes of any speed, broken chains, any batch: rows of a lane's chain come in order, once."""
    lanes = data.draw(st.integers(1, 3))
    max_delay = data.draw(st.integers(5, 200))
    replay = make(lanes=lanes, max_delay=max_delay, min_sequences=1, capacity=40)  # 20 blocks
    heads, newest = [(0, 0)] * lanes, {}
    for _ in range(data.draw(st.integers(1, 120))):
        lane = data.draw(st.integers(0, lanes - 1))
        chain, number = heads[lane]
        if number and data.draw(st.integers(0, 9)) == 0:
            chain, number = chain + 1, 0
        replay.add(rollout([(lane, chain, number)], SEQUENCE))
        heads[lane] = (chain, number + 1)
        if replay.startable and data.draw(st.booleans()):
            rows = replay.sample(data.draw(st.integers(1, replay.startable))).batch.rows
            for b in range(len(rows.action)):
                its, chain = int(rows.action[b, 0]), int(rows.reward[b, 0])
                first = int(rows.inputs.time[b, 0])
                assert (rows.inputs.time[b] == first + np.arange(4)).all()
                assert (chain, first) > newest.get(its, (-1, -1))
                newest[its] = (chain, first)


def test_of_an_on_policy_agent_it_holds_one_batch_that_nothing_makes_late():
    replay, other = make(on_policy=True, max_delay=1), make(on_policy=True)
    add(replay, 0, 6)
    assert not replay.has_enough
    add(replay, 6, 8)
    assert replay.has_enough
    assert replay.startable == replay.min_sequences == 4
    assert replay.stats()["replay/dropped_sequences"] == 0
    other.restore(replay.state(), all_blocks(replay))
    assert other.startable == 0  # a round that was broken off is made anew
    replay.sample(4)
    assert not replay.has_enough
