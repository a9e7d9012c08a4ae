import json
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replay_streams import (
    IN_MEMORY,
    all_blocks,
    carry_spec,
    making,
    rollout,
    row_spec,
    sequence_spec,
)
from scipy import stats

from rlx import trees
from rlx.interfaces import PrioritizedReplay
from rlx.replay.prioritized import Prioritized, importance_of, sequence_priority
from rlx.replay.uniform import Uniform
from rlx.types import Row

CONF = Path(__file__).parents[2] / "conf" / "replay"
RUNTIME = {"devices", "sequence", "row_spec", "carry_spec", "lanes", "initial_priorities", "seed"}
SEQUENCE = sequence_spec(block_rows=2, length=5)


def initial_priorities(rows: Row) -> np.ndarray:
    """One trained row: the time of the sequence's first row."""
    assert rows.inputs.observation == {}
    return rows.inputs.time[:, :1].astype(np.float32)


def make(**settings) -> Prioritized:
    defaults = {
        "capacity": 80,
        "ratio": 0.8,
        "min_sequences": 1,
        "priority_exponent": 0.9,
        "priority_eta": 0.9,
        "priority_epsilon": 0.001,
        "importance_exponent": 0.6,
        "importance_exponent_final": None,
        "anneal_env_steps": None,
        "importance_scale": "batch",
        "initial_priority": "acting",
        "stratified": False,
        "sequence": SEQUENCE,
        "row_spec": row_spec(),
        "carry_spec": carry_spec(),
        "lanes": 2,
        "initial_priorities": initial_priorities,
        **IN_MEMORY,
        "seed": 0,
    }
    return making(Prioritized, **(defaults | settings))


def test_an_agent_without_first_priorities_is_refused_but_with_the_largest_ones():
    with pytest.raises(
        ValueError, match=r"no initial_priorities .*replay\.initial_priority to max or one"
    ):
        make(initial_priorities=None)
    replay = make(initial_priorities=None, initial_priority="max")
    assert replay.needs_priorities
    assert isinstance(replay, PrioritizedReplay)
    replay = make(initial_priorities=None, priority_exponent=0.0)
    add(replay, 0, 20)
    assert not replay.needs_priorities
    assert (replay.sample(8).batch.importance == 1).all()


def add(replay: Prioritized | Uniform, begin: int, end: int) -> None:
    """Blocks of two lanes taking turns: key k is block k // 2 of lane k % 2."""
    replay.add(rollout([(k % 2, 0, k // 2) for k in range(begin, end)], SEQUENCE))


def leaves_by_hand(td: list[list[float]], eta=0.9, epsilon=0.001, exponent=0.9) -> list[float]:
    """The formula in plain Python; -1 marks a row without error."""
    leaves = []
    for errors in td:
        valid = [error for error in errors if error != -1]
        mean = sum(valid) / max(1, len(valid))
        priority = eta * max(valid, default=0.0) + (1 - eta) * mean
        leaves.append((priority + epsilon) ** exponent)
    return leaves


# --- priorities ----------------------------------------------------------------------------------


@pytest.mark.parametrize("end", range(8))
def test_rows_not_valid_have_no_share_wherever_they_are(end):
    """An end at every position of 7 trained rows (7: none), also all but that one."""
    errors = np.arange(1.0, 8.0, dtype=np.float32)
    one_out, one_in = errors.copy(), np.full(7, -1, np.float32)
    one_out[end : end + 1] = -1
    one_in[end : end + 1] = errors[end : end + 1]
    td = np.stack([one_out, one_in])
    leaves = (sequence_priority(td, 0.9) + 0.001) ** 0.9
    assert leaves == pytest.approx(leaves_by_hand(td.tolist()), rel=1e-12)


@given(td=st.lists(st.lists(st.just(-1.0) | st.floats(0, 1e6), min_size=4, max_size=4), min_size=1))
@settings(deadline=None)
def test_leaves_after_an_update_are_the_formula(td):
    td = np.array(td, np.float32)[:10]
    replay = make(capacity=80)
    add(replay, 0, 40)
    replay.update_priorities(np.arange(len(td)), td)
    leaves = replay._ring.leaves(np.arange(len(td)))
    assert leaves == pytest.approx(leaves_by_hand(td.tolist()), rel=1e-12)
    assert (leaves > 0).all()


def test_first_priorities_come_from_acting_time():
    replay = make()
    add(replay, 0, 13)  # then wrapping around, in several rollouts
    for begin in range(13, 90, 7):
        add(replay, begin, begin + 7)
    keys = np.arange(90 - 40, 90 - 4)
    expected = leaves_by_hand([[4.0 * (key // 2) / 2] for key in keys.tolist()])
    assert replay._ring.leaves(keys) == pytest.approx(expected, rel=1e-12)
    assert replay.startable == len(keys)


def test_initial_priority_max_is_the_largest_so_far():
    replay = make(initial_priority="max", initial_priorities=None)
    add(replay, 0, 6)
    assert replay._ring.leaves(np.arange(2)) == pytest.approx([1.001**0.9] * 2)
    replay.update_priorities(np.array([0]), np.array([[5.0]], np.float32))
    replay.update_priorities(np.array([1]), np.array([[0.5]], np.float32))
    add(replay, 6, 7)
    assert replay._ring.leaves(np.arange(3)) == pytest.approx(leaves_by_hand([[5], [0.5], [5]]))


def test_initial_priority_one_is_1_whatever_came_before():
    replay = make(initial_priority="one")
    add(replay, 0, 6)
    replay.update_priorities(np.array([0]), np.array([[5.0]], np.float32))
    add(replay, 6, 7)
    assert replay._ring.leaves(np.arange(3)) == pytest.approx(leaves_by_hand([[5], [1], [1]]))


def test_errors_that_are_not_finite_name_their_keys():
    replay = make()
    add(replay, 0, 10)
    before = replay._ring.leaves(np.arange(6))
    for bad in (np.nan, np.inf, -np.inf):
        td = np.array([[1, 1], [1, bad], [1, 1], [bad, -1]], np.float32)
        with pytest.raises(FloatingPointError, match=r"2 of 4 .*\(keys 3, 5\)"):
            replay.update_priorities(np.array([2, 3, 4, 5]), td)
    assert (replay._ring.leaves(np.arange(6)) == before).all()
    with pytest.raises(FloatingPointError, match=r"5 of 6 .*\(keys 0, 1, 2, 4, \.\.\.\)"):
        replay.update_priorities(
            np.arange(6), np.float32([[np.nan]] * 3 + [[1.0]] + [[np.inf]] * 2)
        )
    broken = make(initial_priorities=lambda rows: np.full((len(rows.valid), 1), np.nan))
    with pytest.raises(FloatingPointError, match=r"\(keys 0\)"):  # the first one completed
        add(broken, 0, 8)


def test_other_errors_in_updates():
    replay = make()
    add(replay, 0, 10)
    with pytest.raises(ValueError, match=r"must be f32\[2, T\], one line per key, got \[2\]"):
        replay.update_priorities(np.array([0, 1]), np.ones(2, np.float32))
    with pytest.raises(ValueError, match="must be >= 0"):
        replay.update_priorities(np.array([0]), np.array([[0.5, -0.5]], np.float32))
    with pytest.raises(ValueError, match=r"Keys \[10\] were never given out"):
        replay.update_priorities(np.array([10]), np.ones((1, 1), np.float32))
    with pytest.raises(ValueError, match="begin no startable sequence"):
        replay.update_priorities(np.array([9]), np.ones((1, 1), np.float32))
    assert replay.startable == 6


SPREAD = np.sqrt(8 / 3)  # of the initial priorities of six sequences, 0 to 4


def test_stats_are_metrics():
    replay = make()
    add(replay, 0, 10)
    replay.add(rollout([(0, 1, 0), (0, 0, 5)], SEQUENCE))
    assert replay.stats() == {
        "replay/fill": 11 / 40,
        "replay/startable_sequences": 6.0,
        "replay/blocks_dropped": 1.0,
        "replay/redraws": 0.0,
        "replay/prefetch_lag_updates": 0.0,
        "replay/stale_updates": 0.0,
        "replay/importance_exponent": 0.6,
        **{"replay/priority_min": 0.0, "replay/priority_max": pytest.approx(4.0)},
        "replay/priority_mean": pytest.approx(2.0),
        "replay/priority_std": pytest.approx(SPREAD),
    }


def test_a_late_priority_is_ignored_and_counted():
    replay = make()
    add(replay, 0, 40)
    sample = replay.sample(4)
    assert sample.keys.max() < 36
    add(replay, 40, 41)  # key 0 is overwritten: its slot holds key 40 now
    before = replay._ring.leaves(np.arange(41))
    replay.update_priorities(np.array([0, 1, 0]), np.full((3, 1), 7.0, np.float32))
    after = replay._ring.leaves(np.arange(41))
    assert after[1] == pytest.approx(leaves_by_hand([[7.0]])[0])
    assert (np.delete(after, 1) == np.delete(before, 1)).all()
    assert replay.stats()["replay/stale_updates"] == 2
    assert replay._ring.check_valid() == (True, "")


# --- sampling ------------------------------------------------------------------------------------


def drawn_counts(replay: Prioritized | Uniform, keys: int, draws: int) -> np.ndarray:
    counts = np.zeros(keys)
    for _ in range(draws // 50):
        np.add.at(counts, replay.sample(50).keys, 1)
    return counts


def test_draws_follow_the_priorities():
    replay = make()
    add(replay, 0, 24)
    td = np.array([[0.01], [3.0], [0.2], [1.0], [0.0], [9.0]], np.float32)
    replay.update_priorities(np.array([0, 1, 5, 6, 10, 19]), td)
    leaves = np.array(leaves_by_hand([[4.0 * (key // 2) / 2] for key in range(20)]))
    leaves[[0, 1, 5, 6, 10, 19]] = leaves_by_hand(td.tolist())
    counts = drawn_counts(replay, 20, 100_000)
    expected = leaves / leaves.sum() * 100_000
    # Cells that expect fewer than 5 draws are no chi-square cells: they are put together.
    rare = expected < 5
    assert rare.sum() < 5
    merged = [np.append(x[~rare], x[rare].sum() + 1e-9) for x in (counts, expected)]
    assert stats.chisquare(*merged).pvalue > 1e-3


def test_stratified_draws_take_one_of_each_part():
    replay = make(stratified=True, priority_exponent=0.0)  # all leaves 1
    add(replay, 0, 36)
    assert replay.startable == 32
    for _ in range(20):
        assert sorted(replay.sample(32).keys.tolist()) == list(range(32))
    assert stats.chisquare(drawn_counts(replay, 32, 50_000)).pvalue > 1e-3


@pytest.mark.parametrize("exponent", [0.0, 0.6, 1.0])
def test_importance_is_recomputed_from_the_raw_tree(exponent):
    replay = make(importance_exponent=exponent)
    add(replay, 0, 60)
    for _ in range(20):
        sample = replay.sample(16)
        raw = np.array(replay._ring.index.tree.values)
        probability = raw[sample.keys % 40] / raw.sum()
        expected = ((raw > 0).sum() * probability) ** -exponent
        assert sample.batch.importance.dtype == np.float32
        assert sample.batch.importance == pytest.approx(expected / expected.max(), rel=1e-6)
        replay.update_priorities(sample.keys, np.random.default_rng(1).random((16, 3), np.float32))


def test_importance_by_the_rarest_sequence_of_the_whole_replay():
    replay = make(importance_scale="replay")
    add(replay, 0, 60)
    for _ in range(20):
        sample = replay.sample(4)
        raw = np.array(replay._ring.index.tree.values)
        expected = (raw[sample.keys % 40] / raw[raw > 0].min()) ** -0.6
        assert sample.batch.importance == pytest.approx(expected, rel=1e-6)
        assert sample.batch.importance.max() <= 1
        replay.update_priorities(sample.keys, np.random.default_rng(1).random((4, 3), np.float32))


@pytest.mark.parametrize("shards", [None, 2])
def test_importance_stays_at_most_1_while_blocks_come(shards):
    replay, stop = make(importance_scale="replay", shards=shards), threading.Event()
    add(replay, 0, 60)

    def write() -> None:
        begin = 60
        while not stop.is_set():
            add(replay, begin, begin + 2)
            begin += 2

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(300):
            sample = replay.sample(4)
            assert (sample.batch.importance > 0).all()
            assert (sample.batch.importance <= 1 + 1e-6).all()
            td = np.random.default_rng(1).random((4, 3), np.float32)
            replay.update_priorities(sample.keys, td)
    finally:
        stop.set()
        writer.join()
    assert replay.stats()["replay/stale_updates"] > 0


def test_the_importance_exponent_goes_to_its_final_value_by_env_steps():
    replay = make(importance_exponent_final=1.0, anneal_env_steps=100)
    seen = []
    for begin in range(0, 70, 10):
        seen.append(replay.importance_exponent)
        add(replay, begin, begin + 10)  # 20 rows
    assert seen == pytest.approx([0.6, 0.68, 0.76, 0.84, 0.92, 1.0, 1.0])
    assert replay.stats()["replay/importance_exponent"] == 1.0
    raw = np.array(replay._ring.index.tree.values)
    sample = replay.sample(8)
    probability = raw[sample.keys % 40]
    expected = probability.min() / probability
    assert sample.batch.importance == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="both, or neither"):
        make(importance_exponent_final=1.0)


def test_annealing_goes_on_from_the_env_steps_before_this_replay():
    annealed = {"importance_exponent_final": 1.0, "anneal_env_steps": 100}
    replay = make(**annealed, env_steps=50)  # of a run that was resumed without its replay
    assert replay.importance_exponent == pytest.approx(0.8)
    add(replay, 0, 10)  # 20 rows
    assert replay.importance_exponent == pytest.approx(0.88)
    other = make(**annealed)
    other.restore(replay.state(), all_blocks(replay))
    assert other.importance_exponent == pytest.approx(0.88)


def test_importance_is_at_most_1_and_largest_for_the_rarest():
    importance = importance_of(np.array([2.0, 0.5, 1.0]), 0.6, 0.5)
    assert importance == pytest.approx([0.25**0.6, 1.0, 0.5**0.6])


def test_a_sample_is_what_its_keys_say():
    replay = make()
    add(replay, 0, 60)
    buffers = replay.buffers(32)
    sample = replay.sample(32, buffers=buffers)
    assert sample.batch.rows.reward is buffers.rows.reward
    assert sample.keys.dtype == np.int64
    first = SEQUENCE.block_rows * (sample.keys // 2)
    assert (sample.batch.rows.inputs.time == first[:, None] + np.arange(5)).all()
    assert (sample.batch.rows.action == (sample.keys % 2)[:, None]).all()
    assert (sample.batch.carry.core[0][:, 0] == first).all()
    assert (sample.weights_version == 10 * (sample.keys // 2)).all()


def test_a_sample_stays_as_it_is_while_the_next_two_are_taken():
    replay, kept = make(), []
    add(replay, 0, 60)
    for _ in range(20):
        sample = replay.sample(8)
        kept = [*kept[-2:], (sample, sample.batch.rows.inputs.time.copy())]
        for old, its_time in kept:
            assert np.array_equal(old.batch.rows.inputs.time, its_time)


# --- settings and saving -------------------------------------------------------------------------


def test_unreachable_min_sequences_are_refused():
    assert make(min_sequences=36).min_sequences == 36
    with pytest.raises(ValueError, match="min_sequences=37"):
        make(min_sequences=37)


def through_json(state: dict) -> dict:
    """Turns a state into what a checkpoint keeps: arrays apart, the rest JSON."""
    scalars = {k: v for k, v in state.items() if not isinstance(v, np.ndarray)}
    return {**state, **json.loads(json.dumps(scalars))}


@pytest.mark.parametrize("blocks", [10, 40, 61])
@pytest.mark.parametrize("initial_priority", ["acting", "max"])
def test_stop_and_resume_is_never_stopped(blocks, initial_priority):
    def work(replay, begin):
        samples = []
        for block in range(begin, begin + 15):
            add(replay, block, block + 1)
            sample = replay.sample(8)
            td = np.random.default_rng(block).random((8, 3), np.float32) * 3
            replay.update_priorities(sample.keys, td)
            samples.append(sample)
        return samples

    replay = make(initial_priority=initial_priority)
    add(replay, 0, blocks)
    work(replay, blocks)
    state, blocks_then = replay.state(), all_blocks(replay)
    other = make(initial_priority=initial_priority, seed=7)
    other.restore(through_json(state), blocks_then)
    assert other.stats() == replay.stats()
    assert (other.env_steps, other.rows, other.startable) == (
        replay.env_steps,
        replay.rows,
        replay.startable,
    )
    for a, b in zip(work(replay, blocks + 15), work(other, blocks + 15), strict=True):
        for x, y in zip(trees.flatten(a).values(), trees.flatten(b).values(), strict=True):
            assert np.array_equal(x, y)
    assert other.stats() == replay.stats()
