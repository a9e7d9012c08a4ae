"""A replay of recorded experience: `replay=dataset replay.path=DIR` trains without actors."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, final

import numpy as np

from rlx.interfaces import ReplayContext, Ring
from rlx.replay.files.experience import (
    Layout,
    env_differences,
    files,
    read,
    read_layout,
    rollouts,
)
from rlx.replay.held import Begin, Keeping
from rlx.replay.prioritized import Importance, Priorities, Prioritized
from rlx.types import (
    AloneOnly,
    Batch,
    Blocks,
    Inline,
    IsPath,
    OfTheRun,
    Range,
    Rollout,
    Runtime,
    Sample,
)

log = logging.getLogger(__name__)


@final
class Dataset:
    """Holds all of a dataset; nothing is added to it. `priority_exponent=0` draws uniformly.

    A run needs a clock all the same: the pool of such a run (rlx.acting.recorded) counts the env
    steps of the record as they are played once more, at `ratio` trained rows each.
    """

    is_recorded = True  # it is full from the start, and no actor adds to it
    min_env_steps = 0
    changeable = Prioritized.changeable

    def __init__(
        self,
        *,
        path: Annotated[str | None, AloneOnly(), IsPath()],
        ratio: Annotated[float, Range(gt=0)],
        min_sequences: Annotated[int, Range(ge=1), OfTheRun()],
        priorities: Inline[Priorities],
        importance: Inline[Importance],
        stratified: bool,
        storage: Literal["memory", "mmap"],
        folder: Annotated[str | None, IsPath()],
        compress: Literal["none", "lz4"],
        gather_threads: Annotated[int, Range(ge=1)],
        prefetch: Annotated[int, Range(ge=0)],
        context: Runtime[ReplayContext],
    ) -> None:
        """Settings: conf/replay/dataset.yaml. Raises ValueError for what cannot work."""
        if path is None:
            raise ValueError("set its path to a folder that replay.record has filled.")
        recorded = Path(path)
        context = replace(context, lanes=_lanes_of(recorded, context))
        keeping = Keeping(
            capacity=_capacity(recorded, context),
            storage=storage,
            folder=folder,
            compress=compress,
            gather_threads=gather_threads,
            shards=1,
            where="thread",
            prefetch=prefetch,
            record=None,
        )
        self._all = Prioritized(
            begin=Begin(ratio=ratio, min_sequences=1, min_env_steps=0),  # checked below
            priorities=priorities,
            importance=importance,
            stratified=stratified,
            keeping=keeping,
            context=context,
        )
        self._files = [[file.name, file.stat().st_size] for file in files(recorded)]
        self._played_env_steps = 0
        self._all.follow(lambda: self._played_env_steps)
        self.ratio, self.min_sequences = ratio, min_sequences
        for rollout in rollouts(recorded, context.row_spec, context.carry_spec):
            self._all.add(rollout)
        if self.startable < min_sequences:
            raise ValueError(
                f"{path}: has {self.startable} sequences, min_sequences={min_sequences}."
            )

    @property
    def env_steps(self) -> int:
        """Env steps of the record that were played so far."""
        return self._played_env_steps

    def add(self, rollout: Rollout) -> None:
        """Counts what was played; the blocks are here already."""
        self._played_env_steps += rollout.env_steps

    def change(self, values: Mapping[str, float]) -> None:
        """See Prioritized.change."""
        self._all.change(values)

    def state(self) -> dict[str, Any]:
        """All but the blocks and their tables, which are in the dataset."""
        played = {"files": self._files, "env_steps": self._played_env_steps}
        return {**self._all.drawing_state(), **played}

    @property
    def rings(self) -> Sequence[Ring]:
        """A snapshot has no blocks to write."""
        return []

    def restore(self, state: Mapping[str, Any], blocks: Sequence[Iterable[Blocks]]) -> None:
        """Goes on from a saved state; raises ValueError if the dataset is another one."""
        if state["files"] != self._files:
            raise ValueError(
                "the dataset has changed since; resume with checkpoint.replay=false to read "
                "what it has now"
            )
        self._all.restore_drawing(state)
        self._played_env_steps = int(state["env_steps"])

    # --- of the replay of all blocks -------------------------------------------------------------

    def sample(self, batch_size: int, *, buffers: Batch | None = None) -> Sample:
        """See Prioritized.sample."""
        return self._all.sample(batch_size, buffers=buffers)

    def buffers(self, batch_size: int) -> Batch:
        """Arrays that `sample` can fill again and again."""
        return self._all.buffers(batch_size)

    @property
    def needs_priorities(self) -> bool:
        """Says whether drawing depends on priorities."""
        return self._all.needs_priorities

    def update_priorities(self, keys: np.ndarray, priorities: np.ndarray) -> None:
        """See Prioritized.update_priorities."""
        self._all.update_priorities(keys, priorities)

    @property
    def startable(self) -> int:
        """Sequences that can be sampled."""
        return self._all.startable

    @property
    def has_enough(self) -> bool:
        """Never: there is nothing to wait for."""
        return False

    @property
    def rows(self) -> int:
        """Rows stored."""
        return self._all.rows

    @property
    def nbytes(self) -> int:
        """Bytes taken."""
        return self._all.nbytes

    @property
    def capacity(self) -> int:
        """Rows that it can hold."""
        return self._all.capacity

    def stats(self) -> dict[str, float]:
        """Metrics: the replay's."""
        return self._all.stats()

    def flush(self) -> None:
        """Nothing is recorded."""

    def close(self) -> None:
        """Ends drawing ahead."""
        self._all.close()


def _lanes_of(recorded: Path, context: ReplayContext) -> int:
    """The lanes of the record; raises ValueError if its rows are none of this run's."""
    layout = read_layout(recorded)
    expected = Layout.of(context.sequence, context.row_spec, context.carry_spec, layout.lanes)
    if found := layout.differences(expected):
        raise ValueError(
            f"{recorded}: recorded with another environment, network or agent: {found}"
        )
    return layout.lanes


def _capacity(recorded: Path, context: ReplayContext) -> int:
    """Rows of a ring that holds all of the record; tells where those are of another environment."""
    blocks, told = 0, {""}
    for path, arrays, about in read(recorded):
        blocks += len(arrays["lane"])
        if (found := env_differences(about.get("env"), context.env)) not in told:
            says = "%s was recorded with %s; its rows are read as if they were of this environment"
            log.warning(says, path, found)
            told.add(found)
    least = 2 * context.lanes * context.sequence.blocks  # of any ring
    return max(blocks, least) * context.sequence.block_rows
