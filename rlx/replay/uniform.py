"""Uniform sequence replay: every startable sequence is drawn with the same chance."""

from __future__ import annotations

import json
from typing import Annotated, Any, final

import numpy as np

from rlx.interfaces import FirstTD
from rlx.replay.blocks import BlockRing, check_td
from rlx.seeding import spawn_rng
from rlx.types import Batch, Carry, Range, Rollout, Row, Runtime, Sample, SequenceSpec


@final
class Uniform:
    """Draws every startable sequence with the same chance; importance is 1."""

    def __init__(
        self,
        *,
        capacity: Annotated[int, Range(ge=1)],
        ratio: Annotated[float, Range(gt=0)] | None,
        min_sequences: Annotated[int, Range(ge=1)],
        sequence: Runtime[SequenceSpec],
        row_spec: Runtime[Row],
        carry_spec: Runtime[Carry],
        lanes: Runtime[int],
        first_td: Runtime[FirstTD],
        seed: Runtime[int],
    ) -> None:
        """Settings: conf/replay/uniform.yaml. Raises ValueError for what cannot work."""
        del first_td  # every replay is built alike; there are no priorities here
        self.ratio = ratio
        self.min_sequences = min_sequences
        self._rng = spawn_rng(seed, "replay", "sample")
        self._ring = BlockRing(
            capacity_rows=capacity,
            sequence=sequence,
            row_spec=row_spec,
            carry_spec=carry_spec,
            lanes=lanes,
        )
        self._ring.budget.check_min_sequences(min_sequences)

    @property
    def startable(self) -> int:
        return self._ring.startable

    @property
    def rows(self) -> int:
        return self._ring.rows

    @property
    def env_steps(self) -> int:
        return self._ring.env_steps

    @property
    def nbytes(self) -> int:
        return self._ring.nbytes

    def add(self, rollout: Rollout) -> None:
        """Stores a rollout's blocks."""
        self._ring.add(rollout, lambda keys: np.ones(len(keys)))

    def buffers(self, batch_size: int) -> Batch:
        """Arrays that `sample` can fill again and again."""
        return self._ring.buffers(batch_size)

    def sample(self, batch_size: int, *, buffers: Batch | None = None) -> Sample:
        """Draws with replacement; the batch lies in the buffers, or in fresh arrays without."""
        drawn = self._ring.draw(batch_size, self._rng, buffers=buffers)
        importance = np.ones(batch_size, np.float32)
        return Sample(
            batch=Batch(rows=drawn.rows, carry=drawn.carry, importance=importance),
            keys=drawn.keys,
            weights_version=drawn.weights_version,
        )

    def update_td(self, keys: np.ndarray, td: np.ndarray) -> None:
        """Only checks td f32[B, T], one line per key: nothing depends on it."""
        check_td(keys, td)

    def stats(self) -> dict[str, float]:
        """Metrics of the ring."""
        return self._ring.stats()

    def state(self, *, copy: bool = True) -> dict[str, Any]:
        """Arrays and JSON scalars; copy=False: views, to be written out before the next add."""
        rng = json.dumps(self._rng.bit_generator.state)
        return {**self._ring.state(copy=copy), "rng": rng}

    def restore(self, state: dict[str, Any]) -> None:
        self._ring.restore(state)
        self._rng.bit_generator.state = json.loads(state["rng"])
