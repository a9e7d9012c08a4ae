import numpy as np
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
from rlx.replay.uniform import Uniform

SEQUENCE = sequence_spec(block_rows=2, length=5)


def make(**settings) -> Uniform:
    defaults = {
        "capacity": 80,
        "ratio": None,
        "min_sequences": 1,
        "sequence": SEQUENCE,
        "row_spec": row_spec(),
        "carry_spec": carry_spec(),
        "lanes": 2,
        **IN_MEMORY,
        "seed": 0,
    }
    return making(Uniform, **(defaults | settings))


def add(replay: Uniform, begin: int, end: int) -> None:
    replay.add(rollout([(k % 2, 0, k // 2) for k in range(begin, end)], SEQUENCE))


def test_every_startable_sequence_has_the_same_chance():
    replay, counts = make(), np.zeros(50)
    add(replay, 0, 50)  # keys 0 .. 9 are overwritten, 46 .. 49 wait for more
    for _ in range(500):
        np.add.at(counts, replay.sample(100).keys, 1)
    assert counts[:10].sum() == counts[46:].sum() == 0
    assert stats.chisquare(counts[10:46]).pvalue > 1e-3


def test_importance_is_1_and_priorities_are_not_taken():
    replay = make()
    add(replay, 0, 20)
    sample = replay.sample(16)
    assert sample.batch.importance.dtype == np.float32
    assert (sample.batch.importance == 1).all()
    assert not isinstance(replay, PrioritizedReplay)


def test_another_seed_draws_otherwise():
    replays = [make(seed=seed) for seed in (0, 0, 1)]
    for replay in replays:
        add(replay, 0, 20)
    keys = [replay.sample(32).keys.tolist() for replay in replays]
    assert keys[0] == keys[1] != keys[2]


def test_stop_and_resume_is_never_stopped():
    replay, other = make(), make(seed=3)
    add(replay, 0, 33)
    replay.sample(5)
    other.restore(replay.state(), all_blocks(replay))
    for begin in (33, 40):
        add(replay, begin, begin + 7)
        add(other, begin, begin + 7)
        a, b = replay.sample(16), other.sample(16)
        for x, y in zip(trees.flatten(a).values(), trees.flatten(b).values(), strict=True):
            assert np.array_equal(x, y)
    assert replay.stats() == other.stats()
    assert replay.nbytes == other.nbytes
