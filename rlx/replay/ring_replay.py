"""What replays have in common whose sequences lie in a ring."""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rlx.interfaces import Ring
from rlx.machine.memory import available_bytes
from rlx.replay.files.experience import Layout, Recorder
from rlx.replay.prefetch import SPARE, Prefetcher
from rlx.replay.ring.block_spec import BlockSpec
from rlx.replay.ring.budget import budget
from rlx.replay.ring.ring import BlockRing
from rlx.replay.ring.shards import ShardedRing
from rlx.replay.ring.storage import Storing
from rlx.seeding import spawn_rng
from rlx.types import Batch, Blocks, Carry, Rollout, Row, Sample, SequenceSpec

log = logging.getLogger(__name__)


class RingReplay(ABC):
    """A ring of blocks and the generator it is drawn from; how to draw is for the class above."""

    is_recorded = False  # whether it is full from the start, and no actor adds to it
    ratio: float | None = None  # trained rows per env step; None: no quota
    min_env_steps = 0  # before learning begins

    def __init__(
        self,
        *,
        capacity: int,
        ratio: float | None,
        min_sequences: int,
        min_env_steps: int,
        storing: Storing,
        shards: int | None,
        devices: Sequence[Any],
        record: str | None,
        where: Literal["thread", "process"],
        prefetch: int,
        sequence: SequenceSpec,
        row_spec: Row,
        carry_spec: Carry,
        lanes: int,
        seed: int,
    ) -> None:
        """Says the bytes it will take; raises ValueError for what cannot work.

        where: of the process that holds it, which is seen to by who builds it (assemble).
        """
        if where == "process" and storing.storage == "device":
            raise ValueError("where=process: blocks on the learner's device are in its process.")
        self.ratio = ratio
        self.min_sequences = min_sequences
        self.min_env_steps = min_env_steps
        self._rng = spawn_rng(seed, "replay", "sample")
        spec = BlockSpec(sequence=sequence, row=row_spec, carry=carry_spec)
        shapes: Any = {"capacity_rows": capacity, "spec": spec, "lanes": lanes}
        storings = _storings(storing, shards, devices)
        planned = budget(**shapes, storing=storing, shards=len(storings))
        log.info("replay: %s; %.2f GB are available", planned, available_bytes() / 1e9)
        if not self.is_recorded:  # else it is known how many there are
            planned.check_min_sequences(min_sequences)
        planned.check(available_bytes())  # each shard looks at its own share only
        self._ring: BlockRing | ShardedRing = (
            ShardedRing(**shapes, storings=storings)
            if len(storings) > 1
            else BlockRing(**shapes, storing=storings[0])
        )
        self._prefetch = prefetch
        self._prefetcher: Prefetcher | None = None  # once the batch size is known
        self._batch_size = 0  # of the buffers
        self._buffers: list[Batch] = []
        self._recorder: Recorder | None = None
        if record is not None:
            layout = Layout.of(sequence, row_spec, carry_spec, lanes)
            self._recorder = Recorder(Path(record), layout)

    def add(self, rollout: Rollout) -> None:
        """Stores a rollout's blocks, and writes them down if they are recorded."""
        self._store(rollout)
        if self._recorder is not None:
            self._recorder.add(rollout)

    @abstractmethod
    def _store(self, rollout: Rollout) -> None:
        """Adds to the ring, with the leaves that the way of drawing gives."""

    def sample(self, batch_size: int, *, buffers: Batch | None = None) -> Sample:
        """Draws with replacement, into the buffers if there are any.

        Else the arrays of the batch are overwritten after two more samples have been taken: an
        update may still read the one before. With `prefetch` it was drawn before.
        """
        if not self._prefetch:
            return self._draw(batch_size, buffers or self._next_buffers(batch_size))
        if self._prefetcher is None:
            self._batch_size = batch_size
            self._prefetcher = Prefetcher(
                ahead=self._prefetch,
                draw=partial(self._draw, batch_size),
                make_buffers=partial(self.buffers, batch_size),
                may_draw=lambda: self.startable >= self.min_sequences,
            )
        if batch_size != self._batch_size:
            raise ValueError(f"prefetched batches have {self._batch_size} sequences always.")
        return self._prefetcher.take()

    def _next_buffers(self, batch_size: int) -> Batch | None:
        """Fresh memory for each batch costs more than all the copying."""
        if not self._ring.copies_into_buffers:
            return None
        if batch_size != self._batch_size:
            self._batch_size = batch_size
            self._buffers = [self.buffers(batch_size) for _ in range(SPARE + 1)]
        self._buffers.append(self._buffers.pop(0))
        return self._buffers[-1]

    @abstractmethod
    def _draw(self, batch_size: int, buffers: Batch | None) -> Sample:
        """A sample, now."""

    def flush(self) -> None:
        """What is recorded is on the disk when this returns."""
        if self._recorder is not None:
            self._recorder.flush()

    def close(self) -> None:
        """Ends what was recorded, and drawing ahead."""
        if self._prefetcher is not None:
            self._prefetcher.close()
        if self._recorder is not None:
            self._recorder.close()

    @property
    def startable(self) -> int:
        """Sequences that can be sampled now."""
        return self._ring.startable

    @property
    def has_enough(self) -> bool:
        """Whether acting had better wait for the learner, whatever the ratio."""
        return False

    @property
    def rows(self) -> int:
        """Rows stored now."""
        return self._ring.rows

    @property
    def env_steps(self) -> int:
        """Valid rows ever added."""
        return self._ring.env_steps

    @property
    def nbytes(self) -> int:
        return self._ring.nbytes

    @property
    def capacity(self) -> int:
        """Rows that it can hold."""
        return self._ring.capacity_rows

    @property
    def rings(self) -> Sequence[Ring]:
        """Where the blocks lie."""
        return self._ring.rings

    def buffers(self, batch_size: int) -> Batch:
        """Arrays that `sample` can fill again and again."""
        return self._ring.buffers(batch_size)

    def stats(self) -> dict[str, float]:
        """Metrics of the ring, and how many updates ago the last batch was drawn."""
        lag = self._prefetcher.lag if self._prefetcher else 0
        return {**self._ring.stats(), "replay/prefetch_lag_updates": float(lag)}

    def state(self) -> dict[str, Any]:
        """Arrays and JSON scalars: all but the blocks."""
        return {**self._ring.state(), "rng": json.dumps(self._rng.bit_generator.state)}

    def restore(self, state: Mapping[str, Any], blocks: Sequence[Iterable[Blocks]]) -> None:
        """Goes on from a saved state and its blocks; raises ValueError if they do not fit."""
        self._ring.restore(state, blocks)
        self._rng.bit_generator.state = json.loads(state["rng"])


def _storings(storing: Storing, shards: int | None, devices: Sequence[Any]) -> list[Storing]:
    """Of each ring: one for every device of the learner, if the blocks lie there."""
    if storing.storage != "device":
        return [replace(storing, shards=shards or 1)] * (shards or 1)
    if shards not in (None, len(devices) or 1):
        raise ValueError(
            f"shards={shards}: the learner's devices hold one each, {len(devices)} in all; "
            "set replay.shards=null, or learner.devices"
        )
    return [replace(storing, device=device) for device in devices or [None]]
