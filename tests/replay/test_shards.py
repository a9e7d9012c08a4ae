"""Rings side by side: each lane in one of them, the same draws, priorities and probabilities."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from replay_streams import IN_MEMORY, carry_spec, fill, making, rollout, row_spec, sequence_spec

from rlx import trees
from rlx.problems import ConfigError
from rlx.replay.ring import storage
from rlx.replay.ring.block_spec import BlockSpec
from rlx.replay.ring.budget import budget
from rlx.replay.ring.ring import BlockRing, Draw
from rlx.replay.ring.shards import ShardedRing
from rlx.replay.ring.storage import Storing
from rlx.replay.ring.stores import make_storage
from rlx.replay.uniform import Uniform

SEQUENCE = sequence_spec(block_rows=2, length=5)  # three blocks
SPEC = BlockSpec(sequence=SEQUENCE, row=row_spec(), carry=carry_spec())


def make(lanes: int = 4, blocks: int = 48, shards: int = 2) -> ShardedRing:
    return ShardedRing(
        capacity_rows=2 * blocks,
        spec=SPEC,
        lanes=lanes,
        storings=[Storing()] * shards,
    )


def ones(keys: np.ndarray) -> np.ndarray:
    return np.ones(len(keys))


def add(ring: Any, begin: int, end: int, lanes: int = 4, leaf_of: Any = ones) -> None:
    """Blocks begin .. end-1 of every lane."""
    for number in range(begin, end):
        ring.add(rollout([(lane, 0, number) for lane in range(lanes)], SEQUENCE), leaf_of)


def test_every_batch_is_shared_equally_and_every_sequence_is_one_lanes():
    ring = make()
    add(ring, 0, 30)
    assert all(inner.check_valid() == (True, "") for inner in ring.rings)
    drawn = ring.draw(Draw(batch_size=64), np.random.default_rng(0))
    lane = drawn.rows.action  # as replay_streams writes it: the lane, in its rollout
    assert (lane == lane[:, :1]).all()
    assert (lane[:32] % 2 == 0).all()
    assert (lane[32:] % 2 == 1).all()
    assert set(lane[:, 0].tolist()) == {0, 1, 2, 3}
    assert (drawn.keys[:32] % 2 == 0).all()
    assert (drawn.keys[32:] % 2 == 1).all()
    assert (np.diff(drawn.rows.inputs.time, axis=1) == 1).all()


def test_a_first_leaf_is_asked_for_with_the_key_that_samples_have():
    ring, asked = make(), []

    def leaf_of(keys: np.ndarray) -> np.ndarray:
        scalars = ring.scalars(keys)
        asked.extend(zip(keys.tolist(), scalars.action[:, 0].tolist(), strict=True))
        return np.ones(len(keys))

    add(ring, 0, 6, leaf_of=leaf_of)
    assert len(asked) == len(set(asked)) == 16
    lane_of = dict(asked)
    drawn = ring.draw(Draw(batch_size=64), np.random.default_rng(0))
    for key, lane in zip(drawn.keys.tolist(), drawn.rows.action[:, 0].tolist(), strict=True):
        assert lane_of[key] == lane


def test_priorities_reach_their_sequence_and_late_ones_are_counted():
    ring = make()
    add(ring, 0, 12)
    keys = np.unique(ring.draw(Draw(batch_size=64), np.random.default_rng(0)).keys)
    leaves = np.full(len(keys), 1e-9)
    chosen = [int(keys[keys % 2 == shard][3]) for shard in (0, 1)]
    leaves[np.isin(keys, chosen)] = 1e9
    assert ring.set_leaves(keys, leaves) == 0
    assert set(ring.draw(Draw(batch_size=64), np.random.default_rng(1)).keys.tolist()) == set(
        chosen
    )
    add(ring, 12, 30)
    assert ring.set_leaves(keys, leaves) == len(keys)


def test_probabilities_are_those_of_the_draws():
    """A sequence's chance of being drawn, from what the ring says of it and by counting."""
    ring = make()
    add(ring, 0, 12, leaf_of=lambda keys: 1.0 + keys % 7)
    rng, counts, said = np.random.default_rng(0), Counter(), {}
    for _ in range(400):
        drawn = ring.draw(Draw(batch_size=64, find_least=True), rng)
        counts.update(drawn.keys.tolist())
        said |= dict(
            zip(drawn.keys.tolist(), drawn.scaled_probability / ring.startable, strict=True)
        )
    assert sum(said.values()) == pytest.approx(1.0)
    assert drawn.least_scaled_probability == pytest.approx(min(said.values()) * ring.startable)
    for key, probability in said.items():
        expected = 400 * 64 * probability
        assert abs(counts[key] - expected) < 5 * np.sqrt(expected)


@pytest.mark.parametrize("spread", [0.5, 1.0])
def test_four_shards_draw_as_one_replay_does_to_a_hundredth(spread):
    """Total variation between the two distributions, at the size of a small paper replay.

    256 lanes whose exploration, and with it the scale of their TD errors, differs by the lane as
    in R2D2's ladder; TD errors of a lane spread log-normally.
    """
    lanes, numbers, shards = 256, 160, 4
    scale = np.linspace(1.0, 3.0, lanes)
    td = scale[:, None] * np.random.default_rng(0).lognormal(0.0, spread, (lanes, numbers))
    priority = td**0.9
    leaf = {(lane, n): priority[lane, n] for lane in range(lanes) for n in range(numbers)}
    rings = [make(lanes, lanes * numbers, shards), one_ring(lanes, lanes * numbers)]
    found = []
    for ring in rings:

        def leaf_of(keys: np.ndarray, ring: Any = ring) -> np.ndarray:
            rows = ring.scalars(keys)
            names = zip(
                rows.action[:, 0].tolist(), (rows.inputs.time[:, 0] // 2).tolist(), strict=True
            )
            return np.array([leaf[name] for name in names])

        add(ring, 0, numbers, lanes, leaf_of)
        found.append(chances(ring))
    sharded, whole = found
    assert sharded.keys() == whole.keys()
    error = 0.5 * sum(abs(sharded[name] - whole[name]) for name in whole)
    print(f"total variation {100 * error:.2f} %")
    assert error < 0.01


def one_ring(lanes: int, blocks: int) -> BlockRing:
    return BlockRing(
        capacity_rows=2 * blocks,
        spec=SPEC,
        lanes=lanes,
    )


def chances(ring: Any) -> dict[tuple[int, int], float]:
    """(lane, number) -> the chance that a draw of a batch is it, from all leaves."""
    found, rings = {}, ring.rings
    for inner in rings:
        keys = np.arange(inner.oldest_key, inner.next_key)
        leaves = inner.leaves(keys)
        keys, leaves = keys[leaves > 0], leaves[leaves > 0]
        rows = inner.scalars(keys)
        names = zip(rows.action[:, 0].tolist(), (rows.inputs.time[:, 0] // 2).tolist(), strict=True)
        for name, chance in zip(names, leaves / leaves.sum() / len(rings), strict=True):
            found[name] = chance
    return found


def test_nothing_is_startable_until_every_ring_has_something():
    ring = make()
    for number in range(5):
        ring.add(rollout([(0, 0, number), (2, 0, number)], SEQUENCE), ones)
    assert ring.rings[0].startable == 6
    assert ring.startable == 0
    for number in range(3):
        ring.add(rollout([(3, 0, number)], SEQUENCE), ones)
    assert ring.startable == 7


def test_a_rollout_is_added_whole_or_not_at_all():
    ring = make()
    with pytest.raises(ValueError, match="Block out of order: lane 0, chain 0 expects number 0"):
        ring.add(rollout([(0, 0, 0), (2, 0, 0), (1, 0, 1)], SEQUENCE), ones)
    assert ring.rows == 0
    add(ring, 0, 5)
    assert ring.startable == 12


def test_the_budget_of_shards_is_the_bytes_of_their_rings():
    replay = uniform(shards=4, lanes=4, capacity=2 * 27)
    assert replay.capacity == 2 * 24
    planned = budget(capacity_rows=2 * 27, spec=SPEC, lanes=4, shards=4)
    assert planned.total_bytes == replay.nbytes
    add(replay_ring := replay._ring, 0, 12)
    assert replay_ring.startable == planned.sequences
    with pytest.raises(ValueError, match=r"min_sequences=17, but a full replay of 48 rows"):
        uniform(shards=4, lanes=4, capacity=2 * 27, min_sequences=17)


def uniform(**changes: Any) -> Uniform:
    settings = {"ratio": 1.5, "min_sequences": 1, "seed": 0} | changes
    return making(
        Uniform,
        sequence=SEQUENCE,
        row_spec=row_spec(),
        carry_spec=carry_spec(),
        **IN_MEMORY | settings,
    )


def test_frames_of_all_shards_must_fit_compressed(monkeypatch):
    """Noise, which LZ4 makes no smaller: 10 KB a block, 40 blocks, of which 32 are written."""
    monkeypatch.setattr(storage, "available_bytes", lambda: 120_000)
    row = row_spec((64, 80))
    noise = np.random.default_rng(0).integers(0, 256, (32, 2, 64, 80), np.uint8)

    def write(shards: int) -> None:
        storing = Storing(compress="lz4", shards=shards)
        spec = BlockSpec(sequence=SEQUENCE, row=row, carry=carry_spec())
        kept = make_storage(storing, spec, slots=40)
        leaves = trees.flatten({"rows": fill(row, (32, 2)), "carry": fill(carry_spec(), (32,))})
        kept.write(0, leaves | {"rows/inputs/observation/image": noise})

    write(1)
    with pytest.raises(ConfigError, match=r"about 0\.00 GB compressed.*replay\.compress=none"):
        write(4)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: make(lanes=3, shards=4), "3 lanes do not divide over 4 shards"),
        (
            lambda: make().draw(Draw(batch_size=63), np.random.default_rng(0)),
            "batches of 63 sequences",
        ),
        (lambda: make().restore({"shards": 3}, []), "the saved replay has 3 shards, now 2"),
        (lambda: make().restore({"layout": ""}, []), "the saved replay has 1 shards, now 2"),
        (lambda: make().add(rollout([(4, 0, 0)], SEQUENCE), ones), "Lane 4 is not one of the 4"),
    ],
)
def test_what_cannot_work_is_said(call, says):
    with pytest.raises(ValueError, match=says):
        call()
