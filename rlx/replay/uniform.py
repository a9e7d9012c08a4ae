"""Uniform sequence replay: every startable sequence is drawn with the same chance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, final

import numpy as np

from rlx.interfaces import ReplayContext, Ring
from rlx.replay.agreement import ring_clashes
from rlx.replay.held import Begin, HeldRing, Keeping
from rlx.replay.ring.ring import Draw
from rlx.types import Batch, Blocks, Inline, Rollout, Runtime, Sample


@final
class Uniform:
    """Draws every startable sequence with the same chance; importance is 1."""

    ratio: float | None
    min_sequences: int
    min_env_steps: int
    clashes = staticmethod(ring_clashes)

    def __init__(
        self, *, begin: Inline[Begin], keeping: Inline[Keeping], context: Runtime[ReplayContext]
    ) -> None:
        """Settings: conf/replay/uniform.yaml. Raises ValueError for what cannot work."""
        self._held = HeldRing(keeping, context, min_sequences=begin.min_sequences)
        self._ring = self._held.ring
        self.ratio = begin.ratio
        self.min_sequences = begin.min_sequences
        self.min_env_steps = begin.min_env_steps

    def add(self, rollout: Rollout) -> None:
        """Stores a rollout's blocks."""
        self._held.add(rollout, lambda keys: np.ones(len(keys)))

    def _draw(self, batch_size: int, buffers: Batch | None) -> Sample:
        return self._ring.draw(Draw(batch_size=batch_size), self._held.rng, buffers).evenly()

    def stats(self) -> dict[str, float]:
        """Metrics: the ring's."""
        return self._held.stats()

    def state(self) -> dict[str, Any]:
        """Arrays and JSON scalars: all but the blocks."""
        return self._held.state()

    def restore(self, state: Mapping[str, Any], blocks: Sequence[Iterable[Blocks]]) -> None:
        """Goes on from a saved state and its blocks; raises ValueError if they do not fit."""
        self._held.restore(state, blocks)

    @property
    def startable(self) -> int:
        """Sequences that can be sampled now."""
        return self._ring.startable

    @property
    def has_enough(self) -> bool:
        """Never: the ratio alone decides who waits."""
        return False

    # --- of the ring -----------------------------------------------------------------------------

    def sample(self, batch_size: int, *, buffers: Batch | None = None) -> Sample:
        """See HeldRing.sample."""
        return self._held.sample(batch_size, buffers, self._draw)

    def buffers(self, batch_size: int) -> Batch:
        """Arrays that `sample` can fill again and again."""
        return self._ring.buffers(batch_size)

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
        """Bytes taken now."""
        return self._ring.nbytes

    @property
    def capacity(self) -> int:
        """Rows that it can hold."""
        return self._ring.capacity_rows

    @property
    def rings(self) -> Sequence[Ring]:
        """Lists the rings in which the blocks lie."""
        return self._ring.rings

    def flush(self) -> None:
        """Writes what is recorded; it is on the disk when this returns."""
        self._held.flush()

    def close(self) -> None:
        """Ends what was recorded, and drawing ahead."""
        self._held.close()
