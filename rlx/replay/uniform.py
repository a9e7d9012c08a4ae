"""Uniform sequence replay: every startable sequence is drawn with the same chance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, final

import numpy as np

from rlx.replay.ring.drawing import Draw
from rlx.replay.ring.storage import Storing
from rlx.replay.ring_replay import RingReplay
from rlx.types import Batch, Carry, Range, Rollout, Row, Runtime, Sample, SequenceSpec


@final
class Uniform(RingReplay):
    """Draws every startable sequence with the same chance; importance is 1."""

    def __init__(
        self,
        *,
        capacity: Annotated[int, Range(ge=1)],
        ratio: Annotated[float, Range(gt=0)] | None,
        min_sequences: Annotated[int, Range(ge=1)],
        min_env_steps: Annotated[int, Range(ge=0)],
        storage: Literal["memory", "mmap", "device"],
        folder: str | None,
        compress: Literal["none", "lz4"],
        gather_threads: Annotated[int, Range(ge=1)],
        shards: Annotated[int, Range(ge=1)] | None,
        record: str | None,
        where: Literal["thread", "process"],
        prefetch: Annotated[int, Range(ge=0)],
        sequence: Runtime[SequenceSpec],
        row_spec: Runtime[Row],
        carry_spec: Runtime[Carry],
        lanes: Runtime[int],
        seed: Runtime[int],
        devices: Runtime[Sequence[Any]],
    ) -> None:
        """Settings: conf/replay/uniform.yaml. Raises ValueError for what cannot work."""
        super().__init__(
            capacity=capacity,
            ratio=ratio,
            min_sequences=min_sequences,
            min_env_steps=min_env_steps,
            storing=Storing(
                storage=storage,
                folder=folder,
                compress=compress,
                gather_threads=gather_threads,
            ),
            shards=shards,
            devices=devices,
            record=record,
            where=where,
            prefetch=prefetch,
            sequence=sequence,
            row_spec=row_spec,
            carry_spec=carry_spec,
            lanes=lanes,
            seed=seed,
        )

    def _store(self, rollout: Rollout) -> None:
        """Stores a rollout's blocks."""
        self._ring.add(rollout, lambda keys: np.ones(len(keys)))

    def _draw(self, batch_size: int, buffers: Batch | None) -> Sample:
        return self._ring.draw(Draw(batch_size=batch_size), self._rng, buffers).evenly()
