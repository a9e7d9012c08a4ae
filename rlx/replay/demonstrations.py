"""Demonstrations beside new experience: a share of each batch is of a recorded dataset.

As in R2D3 (Paine et al. 2019), two replays are drawn from, each by its own priorities.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Annotated, Any, final

import numpy as np

from rlx import trees
from rlx.interfaces import ReplayContext, Ring
from rlx.problems import Problem
from rlx.replay.agreement import ring_clashes
from rlx.replay.dataset import Dataset
from rlx.replay.held import Begin, Keeping
from rlx.replay.prefetch import SPARE
from rlx.replay.prioritized import Importance, Priorities, Prioritized
from rlx.seeding import spawn_int
from rlx.types import Batch, Blocks, Inline, Range, Rollout, Runtime, Sample

SAVED = "demonstrations"  # of the settings and of the state


@final
class Demonstrations:
    """Draws a share of each batch from a dataset, and the rest from the run's own replay."""

    ratio: float | None
    min_sequences: int
    min_env_steps: int
    changeable = (
        "share",
        *Prioritized.changeable,
        *(f"{SAVED}.{name}" for name in Dataset.changeable),
    )

    def __init__(
        self,
        *,
        share: Annotated[float, Range(ge=0, lt=1)],
        demonstrations: Dataset,
        begin: Inline[Begin],
        priorities: Inline[Priorities],
        importance: Inline[Importance],
        stratified: bool,
        keeping: Inline[Keeping],
        context: Runtime[ReplayContext],
    ) -> None:
        """Settings: conf/replay/demonstrations.yaml. Raises ValueError for what cannot work."""
        self._share, self._recorded = share, demonstrations
        self._own = Prioritized(
            begin=begin,
            priorities=priorities,
            importance=importance,
            stratified=stratified,
            keeping=keeping,
            # Other draws than those of the record, which has the run's own seed.
            context=replace(context, seed=spawn_int(context.seed, "beside demonstrations")),
        )
        self.ratio, self.min_env_steps = begin.ratio, begin.min_env_steps
        self.min_sequences = begin.min_sequences
        self._buffers: list[Batch] = []
        self._batch_size = 0  # of the buffers

    @staticmethod
    def clashes(settings: Mapping[str, Any]) -> list[Problem]:
        """Each part of a batch has a sequence, and is drawn when it is asked for."""
        replay, batch_size = settings["replay"], settings["learner"]["batch_size"]
        count = _of_the_record(replay["share"], batch_size)
        found = ring_clashes(settings)
        if not 0 < count < batch_size:
            says = f"gives {count} of the {batch_size} sequences of a batch (learner.batch_size); "
            says += f"accepted: at least {1 / batch_size:.3g}, and less than 1"
            found.append(Problem(path="replay.share", given=f"{replay['share']:g}", says=says))
        for name, value, says in (
            ("storage", "device", "a batch is put together in the host's memory; set memory"),
            ("where", "process", "both replays lie in the learner's process; set thread"),
        ):
            if replay[name] == value:
                found.append(Problem(path=f"replay.{name}", given=value, says=says))
        if (replay["shards"] or 1) > 1:
            says = "the run's own part of a batch is drawn from one ring; set it to null"
            found.append(Problem(path="replay.shards", given=str(replay["shards"]), says=says))
        record, path = replay["record"], replay[SAVED]["path"]
        if None not in (record, path) and os.path.realpath(record) == os.path.realpath(path):
            says = "the demonstrations lie there, and stay as they are; give another folder"
            found.append(Problem(path="replay.record", given=record, says=says))
        ahead = {"replay.prefetch": replay, "replay.demonstrations.prefetch": replay[SAVED]}
        for path, node in ahead.items():
            if node["prefetch"]:
                says = "both replays give their part when a batch is drawn; set it to 0"
                found.append(Problem(path=path, given=str(node["prefetch"]), says=says))
        return found

    def change(self, values: Mapping[str, float]) -> None:
        """Uses other values from now on; a share may come to 0."""
        self._share = values.get("share", self._share)
        prefix = f"{SAVED}."
        self._own.change(values)
        self._recorded.change(
            {name.removeprefix(prefix): v for name, v in values.items() if name.startswith(prefix)}
        )

    def add(self, rollout: Rollout) -> None:
        """Adds what the run's actors made."""
        self._own.add(rollout)
        self._recorded.add(rollout)  # which only counts: its importance may be annealed

    def sample(self, batch_size: int) -> Sample:
        """A batch whose first sequences are the run's own; keys of demonstrations are negative.

        Its arrays are overwritten after two more samples. `weights_version` is of the run's own
        sequences alone: those of the record count the updates of another run.
        """
        count = _of_the_record(self._share, batch_size)
        own = batch_size - count
        whole = self._next_buffers(batch_size)
        if not count:  # of a share that came to 0
            return self._own.sample(batch_size, buffers=whole)
        mine = self._own.sample(own, buffers=trees.tree_map(lambda x: x[:own], whole))
        theirs = self._recorded.sample(count, buffers=trees.tree_map(lambda x: x[own:], whole))
        importance = np.concatenate([mine.batch.importance, theirs.batch.importance])
        return replace(
            mine,
            batch=replace(whole, importance=importance),
            keys=np.concatenate([mine.keys, -1 - theirs.keys]),
        )

    def _next_buffers(self, batch_size: int) -> Batch:
        if batch_size != self._batch_size:
            self._buffers = [self._own.buffers(batch_size) for _ in range(SPARE + 1)]
            self._batch_size = batch_size
        self._buffers.append(self._buffers.pop(0))
        return self._buffers[-1]

    @property
    def needs_priorities(self) -> bool:
        """Says whether drawing from either depends on priorities."""
        return self._own.needs_priorities or self._recorded.needs_priorities

    def update_priorities(self, keys: np.ndarray, priorities: np.ndarray) -> None:
        """Gives each replay the priorities f32[B, T] of its sequences."""
        recorded = keys < 0
        self._own.update_priorities(keys[~recorded], priorities[~recorded])
        self._recorded.update_priorities(-1 - keys[recorded], priorities[recorded])

    def state(self) -> dict[str, Any]:
        """All of both but the blocks."""
        return {**self._own.state(), SAVED: self._recorded.state()}

    def restore(self, state: Mapping[str, Any], blocks: Sequence[Iterable[Blocks]]) -> None:
        """Goes on from a saved state; raises ValueError if the dataset is another one."""
        self._recorded.restore(state[SAVED], [])
        self._own.restore(state, blocks)

    def stats(self) -> dict[str, float]:
        """Metrics: those of the run's own replay, and the priorities of the demonstrations."""
        of_record = {
            name.replace("replay/", "replay/demonstrations_"): value
            for name, value in self._recorded.stats().items()
            if name.startswith("replay/priority_")
        }
        return {**self._own.stats(), **of_record}

    # --- of the run's own ------------------------------------------------------------------------

    @property
    def startable(self) -> int:
        """Sequences that can be sampled of the run's own."""
        return self._own.startable

    @property
    def has_enough(self) -> bool:
        """Says whether acting should wait for the learner."""
        return self._own.has_enough

    @property
    def rows(self) -> int:
        """Rows of the run's own."""
        return self._own.rows

    @property
    def env_steps(self) -> int:
        """Valid rows ever added."""
        return self._own.env_steps

    @property
    def nbytes(self) -> int:
        """Bytes taken by both."""
        return self._own.nbytes + self._recorded.nbytes

    @property
    def rings(self) -> Sequence[Ring]:
        """Lists the rings that a snapshot writes: the dataset has its own files."""
        return self._own.rings

    def flush(self) -> None:
        """Writes what the run's own replay records."""
        self._own.flush()

    def close(self) -> None:
        """Ends both."""
        with closing(self._recorded):
            self._own.close()


def _of_the_record(share: float, batch_size: int) -> int:
    """The demonstrations of a batch."""
    return round(share * batch_size)
