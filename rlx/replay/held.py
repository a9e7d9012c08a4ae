"""Holds what every replay has: a ring, its generator, batches, and what is recorded."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, final

from rlx.interfaces import ReplayContext
from rlx.machine.memory import available_bytes
from rlx.replay.files.experience import Layout, Recorder
from rlx.replay.prefetch import SPARE, Prefetcher
from rlx.replay.ring.block_spec import BlockSpec
from rlx.replay.ring.budget import budget
from rlx.replay.ring.ring import BlockRing, LeafOf
from rlx.replay.ring.shards import ShardedRing
from rlx.replay.ring.storage import Storing
from rlx.seeding import spawn_rng
from rlx.types import AloneOnly, Batch, Blocks, IsPath, OfTheRun, Range, Rollout, Sample

log = logging.getLogger(__name__)

Draw = Callable[[int, Batch | None], Sample]  # how the replay draws a batch into buffers


@dataclass(frozen=True, kw_only=True)
class Begin:
    """These settings of conf/replay say when learning may begin, and how much it may learn."""

    ratio: Annotated[float, Range(gt=0)] | None
    min_sequences: Annotated[int, Range(ge=1), OfTheRun()]
    min_env_steps: Annotated[int, Range(ge=0), OfTheRun()]


@dataclass(frozen=True, kw_only=True)
class Keeping:
    """These settings of conf/replay say where rows are kept and how batches leave the replay."""

    capacity: Annotated[int, Range(ge=1), OfTheRun()]
    storage: Literal["memory", "mmap", "device"]
    folder: Annotated[str | None, IsPath()]
    compress: Literal["none", "lz4"]
    gather_threads: Annotated[int, Range(ge=1)]
    shards: Annotated[int, Range(ge=1)] | None
    where: Literal["thread", "process"]
    prefetch: Annotated[int, Range(ge=0)]
    record: Annotated[str | None, AloneOnly(), IsPath()]


@final
class HeldRing:
    """A ring, or several side by side, with all that does not depend on how a replay draws."""

    def __init__(
        self, keeping: Keeping, context: ReplayContext, *, min_sequences: int | None
    ) -> None:
        """Says the bytes it will take; raises ValueError for what cannot work.

        min_sequences: before learning begins; None: how many sequences there will be is known.
        """
        storings = _storings(keeping, context.devices)
        self.ring = _make_ring(keeping.capacity, context, storings, min_sequences)
        self.rng = spawn_rng(context.seed, "replay", "sample")
        self._envs = [dict(context.env)]  # of all rows; those of a saved replay may be of others
        self._min_sequences = min_sequences or 1
        self._prefetch = keeping.prefetch
        self._prefetcher: Prefetcher | None = None  # once the batch size is known
        self._batch_size = 0  # of the buffers
        self._buffers: list[Batch] = []
        self._recorder = None
        if keeping.record is not None:
            self._recorder = Recorder(Path(keeping.record), _layout(context), context.env)

    def add(self, rollout: Rollout, leaf_of: LeafOf) -> None:
        """Stores a rollout's blocks, and writes them down if they are recorded."""
        self.ring.add(rollout, leaf_of)
        if self._recorder is not None:
            self._recorder.add(rollout)

    def sample(self, batch_size: int, buffers: Batch | None, draw: Draw) -> Sample:
        """A batch, drawn into the buffers if there are any.

        Else its arrays are overwritten after two more samples have been taken: an update may still
        read the one before. With `prefetch` it was drawn before.
        """
        if not self._prefetch:
            return draw(batch_size, buffers or self._next_buffers(batch_size))
        if self._prefetcher is None:
            self._batch_size = batch_size
            self._prefetcher = Prefetcher(
                ahead=self._prefetch,
                draw=partial(draw, batch_size),
                make_buffers=partial(self.ring.buffers, batch_size),
                may_draw=lambda: self.ring.startable >= self._min_sequences,
            )
        if batch_size != self._batch_size:
            raise ValueError(f"prefetched batches have {self._batch_size} sequences always.")
        return self._prefetcher.take()

    def _next_buffers(self, batch_size: int) -> Batch | None:
        """Buffers used again: fresh memory for each batch costs more than all the copying."""
        if not self.ring.copies_into_buffers:
            return None
        if batch_size != self._batch_size:
            self._batch_size = batch_size
            self._buffers = [self.ring.buffers(batch_size) for _ in range(SPARE + 1)]
        self._buffers.append(self._buffers.pop(0))
        return self._buffers[-1]

    def flush(self) -> None:
        """Writes what is recorded; it is on the disk when this returns."""
        if self._recorder is not None:
            self._recorder.flush()

    def close(self) -> None:
        """Ends what was recorded, and drawing ahead."""
        if self._prefetcher is not None:
            self._prefetcher.close()
        if self._recorder is not None:
            self._recorder.close()

    def stats(self) -> dict[str, float]:
        """Metrics of the ring, and how many updates ago the last batch was drawn."""
        lag = self._prefetcher.lag if self._prefetcher else 0
        return {**self.ring.stats(), "replay/prefetch_lag_updates": float(lag)}

    def state(self) -> dict[str, Any]:
        """Arrays and JSON scalars: all but the blocks."""
        rng, envs = json.dumps(self.rng.bit_generator.state), json.dumps(self._envs)
        return {**self.ring.state(), "rng": rng, "envs": envs}

    def restore(self, state: Mapping[str, Any], blocks: Sequence[Iterable[Blocks]]) -> None:
        """Goes on from a saved state and its blocks; raises ValueError if they do not fit."""
        self.ring.restore(state, blocks)
        self.rng.bit_generator.state = json.loads(state["rng"])
        before = json.loads(state.get("envs", "[]"))  # none: saved by an earlier rlx
        self._envs = [env for env in before if env not in self._envs] + self._envs


def _make_ring(
    capacity: int, context: ReplayContext, storings: Sequence[Storing], min_sequences: int | None
) -> BlockRing | ShardedRing:
    spec = BlockSpec(sequence=context.sequence, row=context.row_spec, carry=context.carry_spec)
    size: dict[str, Any] = {"capacity_rows": capacity, "spec": spec, "lanes": context.lanes}
    planned = budget(**size, storing=storings[0], shards=len(storings))
    log.info("replay: %s; %.2f GB are available", planned, available_bytes() / 1e9)
    if min_sequences is not None:
        planned.check_min_sequences(min_sequences)
    planned.check(available_bytes())  # each shard looks at its own share only
    if len(storings) > 1:
        return ShardedRing(**size, storings=storings)
    return BlockRing(**size, storing=storings[0])


def _layout(context: ReplayContext) -> Layout:
    return Layout.of(context.sequence, context.row_spec, context.carry_spec, context.lanes)


def _storings(keeping: Keeping, devices: Sequence[Any]) -> list[Storing]:
    """The storing of each ring: one for every device of the learner, if the blocks lie there."""
    shards = keeping.shards
    storing = Storing(
        storage=keeping.storage,
        folder=keeping.folder,
        compress=keeping.compress,
        gather_threads=keeping.gather_threads,
    )
    if keeping.where == "process":
        raise ValueError("where=process: only a run starts a process for its replay; set thread.")
    if keeping.storage != "device":
        return [replace(storing, shards=shards or 1)] * (shards or 1)
    if shards not in (None, len(devices) or 1):
        raise ValueError(
            f"shards={shards}: the learner's devices hold one each, {len(devices)} in all; "
            "set replay.shards=null, or learner.devices"
        )
    return [replace(storing, device=device) for device in devices or [None]]
