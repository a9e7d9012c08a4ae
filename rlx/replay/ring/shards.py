"""Rings side by side, each with a share of the lanes, that are drawn from as one.

Lane l lies in ring l % R as its lane l // R, so that lanes which explore much and little are spread
evenly, and a block with key k of ring r has the key k * R + r outside. Of a batch each ring gives
an equal part, whatever its priorities: that is what lets every device of a learner, or every one of
its processes, draw from its own memory. Exact probabilities go into the importance.

DEPARTS from drawing from one replay: a sequence's chance is p / (R * the sum of its own ring's p).
The more sequences there are, the less it differs (tests/replay/test_shards.py measures it).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, final

import numpy as np

from rlx import trees
from rlx.replay.ring import saving
from rlx.replay.ring.block_spec import BlockSpec
from rlx.replay.ring.ring import BlockRing, Draw, Drawn, LeafOf
from rlx.replay.ring.storage import Storing
from rlx.types import Batch, Blocks, Rollout, Row

SEQUENCES = ("rows", "next", "carry")  # of a batch


@final
class ShardedRing:
    """R BlockRings; the same methods, with keys of all of them."""

    def __init__(
        self,
        *,
        capacity_rows: int,
        spec: BlockSpec,
        lanes: int,
        storings: Sequence[Storing],
    ) -> None:
        """One ring for each of `storings`; raises ValueError if they do not fit."""
        count = len(storings)
        if lanes % count:
            raise ValueError(
                f"{lanes} lanes do not divide over {count} shards, which give equal parts of every "
                f"batch; make acting.instances * acting.envs_per_actor a multiple of {count}."
            )
        self.rings = [
            BlockRing(
                capacity_rows=capacity_rows // count,
                spec=spec,
                lanes=len(range(shard, lanes, count)),
                storing=storing,
            )
            for shard, storing in enumerate(storings)
        ]
        self._lanes = lanes

    # --- as BlockRing ---

    @property
    def startable(self) -> int:
        """Sequences that can be drawn now: none, as long as one ring has none."""
        each = [ring.startable for ring in self.rings]
        return sum(each) if all(each) else 0

    @property
    def rows(self) -> int:
        """Rows stored now."""
        return sum(ring.rows for ring in self.rings)

    @property
    def env_steps(self) -> int:
        """Valid rows ever added."""
        return sum(ring.env_steps for ring in self.rings)

    @property
    def nbytes(self) -> int:
        return sum(ring.nbytes for ring in self.rings)

    @property
    def copies_into_buffers(self) -> bool:
        """Says whether `draw` fills buffers; else it answers arrays of its own."""
        return self.rings[0].copies_into_buffers

    @property
    def capacity_rows(self) -> int:
        """Rows that can be held."""
        return sum(ring.capacity_rows for ring in self.rings)

    def stats(self) -> dict[str, float]:
        """Metrics: sums, and the mean of how full they are."""
        each = [ring.stats() for ring in self.rings]
        total = {name: sum(stats[name] for stats in each) for name in each[0]}
        return total | {"replay/fill": total["replay/fill"] / len(each)}

    def add(self, rollout: Rollout, leaf_of: LeafOf) -> None:
        """Adds each block to its lane's ring; see BlockRing.add."""
        count = len(self.rings)
        self._check_lanes(rollout.lane)
        owner = rollout.lane % count
        shares = [_part(rollout, np.flatnonzero(owner == shard), count) for shard in range(count)]
        for ring, share in zip(self.rings, shares, strict=True):
            ring.check(share)  # all of them first: a rollout is added whole or not at all
        for shard, (ring, share) in enumerate(zip(self.rings, shares, strict=True)):
            if not share.lane.size:
                continue

            def leaves(keys: np.ndarray, shard: int = shard) -> np.ndarray:
                return leaf_of(keys * count + shard)

            ring.add(share, leaves)

    def scalars(self, keys: np.ndarray) -> Row:
        """Row [M, L + 1] of these sequences of one ring; see BlockRing.scalars."""
        count = len(self.rings)
        return self.rings[int(keys[0]) % count].scalars(keys // count)

    def set_leaves(self, keys: np.ndarray, leaves: np.ndarray) -> int:
        """Sets f64[n] > 0 of i64[n] keys; answers how many were overwritten since."""
        keys, count = np.asarray(keys, np.int64), len(self.rings)
        stale = 0
        for shard, ring in enumerate(self.rings):
            mine = keys % count == shard
            stale += ring.set_leaves(keys[mine] // count, leaves[mine])
        return stale

    def buffers(self, batch_size: int) -> Batch:
        """A batch of uninitialised arrays to draw into, again and again."""
        return self.rings[0].buffers(batch_size)

    def draw(self, how: Draw, rng: np.random.Generator, buffers: Batch | None = None) -> Drawn:
        """Draws batch_size / R from each ring, one after the other; see BlockRing.draw."""
        count = len(self.rings)
        if how.batch_size % count:
            raise ValueError(
                f"batches of {how.batch_size} sequences are not to be shared by {count} rings; "
                f"set learner.batch_size to a multiple of {count}."
            )
        if not self.copies_into_buffers:
            buffers = None
        elif buffers is None:
            buffers = self.buffers(how.batch_size)
        share = how.batch_size // count
        parts = []
        for shard, ring in enumerate(self.rings):
            mine = slice(shard * share, (shard + 1) * share)
            own = None if buffers is None else _sliced(buffers, mine)
            part = ring.draw(replace(how, batch_size=share), rng, own)
            parts.append(self._outside(part, shard))
        return _joined(parts, buffers)

    def state(self) -> dict[str, Any]:
        """Flat names to arrays and JSON scalars: all that `restore` needs beside the blocks."""
        each = (ring.state() for ring in self.rings)
        named = {f"{i}/{name}": x for i, state in enumerate(each) for name, x in state.items()}
        return {"shards": len(self.rings), **named}

    def restore(self, state: Mapping[str, Any], blocks: Sequence[Iterable[Blocks]]) -> None:
        """Takes over a saved state, given each ring's blocks; see BlockRing.restore."""
        saving.check_shards(state, len(self.rings))
        for shard, ring in enumerate(self.rings):
            own = f"{shard}/"
            its = {n.removeprefix(own): x for n, x in state.items() if n.startswith(own)}
            ring.restore(its, blocks[shard : shard + 1])

    # --- details ---

    def _check_lanes(self, lane: np.ndarray) -> None:
        wrong = lane[(lane < 0) | (lane >= self._lanes)]
        if wrong.size:
            raise ValueError(f"Lane {wrong[0]} is not one of the {self._lanes} lanes 0 .. lanes-1.")

    def _outside(self, part: Drawn, shard: int) -> Drawn:
        """One ring's part of a batch, with keys and probabilities as of all rings."""
        count, own = len(self.rings), max(1, self.rings[shard].startable)
        scale = max(1, self.startable) / (count * own)
        return replace(
            part,
            keys=part.keys * count + shard,
            scaled_probability=part.scaled_probability * scale,
            least_scaled_probability=part.least_scaled_probability * scale,
        )


def _part(rollout: Rollout, mine: np.ndarray, count: int) -> Rollout:
    """Some blocks of a rollout, with the lanes' numbers in their ring."""
    return replace(
        rollout,
        rows=trees.tree_map(lambda x: x[mine], rollout.rows),
        carry=trees.tree_map(lambda x: x[mine], rollout.carry),
        next=trees.tree_map(lambda x: x[mine], rollout.next),
        lane=rollout.lane[mine] // count,
        chain=rollout.chain[mine],
        number=rollout.number[mine],
        weights_version=rollout.weights_version[mine],
    )


def _sliced(buffers: Batch, mine: slice) -> Batch:
    sliced: Batch = trees.tree_map(lambda x: x[mine], buffers)
    return sliced


def _joined(parts: Sequence[Drawn], buffers: Batch | None) -> Drawn:
    """The parts as one batch: in the buffers already, or on the devices where they lie."""
    if buffers is not None:
        whole: dict[str, Any] = {name: getattr(buffers, name) for name in SEQUENCES}
    else:
        from rlx.replay.ring.device import side_by_side  # loads JAX

        each = [{name: getattr(part, name) for name in SEQUENCES} for part in parts]
        whole = trees.tree_map(lambda *x: side_by_side(x), *each)
    return Drawn(
        **whole,
        keys=np.concatenate([part.keys for part in parts]),
        weights_version=np.concatenate([part.weights_version for part in parts]),
        scaled_probability=np.concatenate([part.scaled_probability for part in parts]),
        least_scaled_probability=min(part.least_scaled_probability for part in parts),
    )
