"""Prioritised sequence replay, as in R2D2.

From the paper: priority eta * max + (1 - eta) * mean of the absolute n-step TD errors of a sequence
(section 2.3); drawing in proportion to priority^0.9, importance exponent 0.6 (appendix); first
priorities from acting-time Q-values, the online network as its own target (as in Ape-X).
The importance is divided by its maximum, over the whole batch or over the whole replay.

DEPARTS: `priority_epsilon` is added to each priority, so that sequences without an error stay
drawable and importance is bounded; the paper has none (Schaul et al. 2016 do the same).
DEPARTS: draws are stratified, one from each equal part of the total: the same chances with less
variance (Schaul et al. 2016); the paper does not say how it draws.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, final

import numpy as np

from rlx.interfaces import InitialPriorities, ReplayContext, Ring
from rlx.problems import RunFailed
from rlx.replay.agreement import ring_clashes
from rlx.replay.held import Begin, HeldRing, Keeping
from rlx.replay.ring.ring import Draw
from rlx.replay.ring.saving import check_layout
from rlx.types import Batch, Blocks, Inline, OfTheRun, Range, Rollout, Runtime, Sample

NOT_VALID = -1.0  # the priority of a row that has none


@dataclass(frozen=True, kw_only=True)
class Priorities:
    """These settings of conf/replay give each sequence its chance to be drawn."""

    priority_exponent: Annotated[float, Range(ge=0)]
    priority_eta: Annotated[float, Range(ge=0, le=1)]
    priority_epsilon: Annotated[float, Range(gt=0)]
    initial_priority: Literal["acting", "max", "one"]

    def leaves(self, priority: np.ndarray) -> np.ndarray:
        """f64[B] of the priorities f64[B]: what each sequence is drawn in proportion to."""
        # A leaf of 0 would take the sequence out of the replay.
        leaves = (priority + self.priority_epsilon) ** self.priority_exponent
        return np.maximum(leaves, np.finfo(np.float64).tiny)

    def of_leaves(self, leaves: np.ndarray) -> np.ndarray:
        """The priorities f64[n] that gave these leaves; of an exponent above 0."""
        return np.maximum(0.0, leaves ** (1.0 / self.priority_exponent) - self.priority_epsilon)

    def check(self, initial_priorities: InitialPriorities | None) -> None:
        """Raises ValueError if the agent has none of the initial priorities that are needed."""
        needed = self.initial_priority == "acting" and self.priority_exponent > 0
        if initial_priorities is None and needed:
            raise ValueError(
                "this agent has no initial_priorities (interfaces.Prioritizing), which "
                "replay.initial_priority=acting draws by; choose replay=uniform or replay=online, "
                "or set replay.initial_priority to max or one if its updates give priorities."
            )


@dataclass(frozen=True, kw_only=True)
class Importance:
    """These settings of conf/replay say how far importance makes up for uneven chances."""

    importance_exponent: Annotated[float, Range(ge=0)]
    importance_exponent_final: Annotated[float, Range(ge=0)] | None
    anneal_env_steps: Annotated[int, Range(ge=1), OfTheRun()] | None
    importance_scale: Literal["batch", "replay"]

    def __post_init__(self) -> None:
        if (self.importance_exponent_final is None) != (self.anneal_env_steps is None):
            raise ValueError("set importance_exponent_final and anneal_env_steps both, or neither.")

    def exponent(self, env_steps: int) -> float:
        """The exponent then; it goes linearly from the first to the final one."""
        if self.importance_exponent_final is None or self.anneal_env_steps is None:
            return self.importance_exponent
        done = min(1.0, env_steps / self.anneal_env_steps)
        return (1.0 - done) * self.importance_exponent + done * self.importance_exponent_final


def sequence_priority(rows: np.ndarray, eta: float) -> np.ndarray:
    """f64[B] of the rows' f32[B, T]: eta * max + (1 - eta) * mean of the valid; 0 without any."""
    rows = np.asarray(rows, np.float64)
    valid = rows != NOT_VALID
    rows = np.where(valid, rows, 0.0)
    mean = rows.sum(axis=1) / np.maximum(1, valid.sum(axis=1))
    return eta * rows.max(axis=1) + (1.0 - eta) * mean


def importance_of(scaled_probability: np.ndarray, exponent: float, least: float) -> np.ndarray:
    """f32[B]: (N * P)^-exponent by the largest; N sequences, each drawn with chance P.

    The largest is that of the batch, or of a sequence with N * P = `least`.
    """
    return ((scaled_probability / least) ** -exponent).astype(np.float32)


@final
class Prioritized:
    """Draws sequences in proportion to (priority + epsilon)^priority_exponent."""

    ratio: float | None
    min_sequences: int
    min_env_steps: int
    changeable = ("importance_exponent", "priority_eta")
    clashes = staticmethod(ring_clashes)

    def __init__(
        self,
        *,
        begin: Inline[Begin],
        priorities: Inline[Priorities],
        importance: Inline[Importance],
        stratified: bool,
        keeping: Inline[Keeping],
        context: Runtime[ReplayContext],
    ) -> None:
        """Settings: conf/replay/prioritized.yaml. Raises ValueError for what cannot work."""
        priorities.check(context.initial_priorities)
        self._held = HeldRing(keeping, context, min_sequences=begin.min_sequences)
        self._ring = self._held.ring
        self.ratio = begin.ratio
        self.min_sequences = begin.min_sequences
        self.min_env_steps = begin.min_env_steps
        self._priorities, self._importance = priorities, importance
        self._stratified = stratified
        self._initial_priorities = context.initial_priorities
        self._largest_priority = 1.0  # ever written; read by initial_priority=max only
        self._stale_updates = 0
        self._env_steps_before = context.env_steps  # this replay, which was not restored
        self._added: Callable[[], int] = lambda: self._ring.env_steps

    def follow(self, played: Callable[[], int]) -> None:
        """Anneals by this count of env steps and not by those that were added."""
        self._added = played

    def change(self, values: Mapping[str, float]) -> None:
        """Uses other values from now on: of batches to come, and of priorities to come."""
        if (exponent := values.get("importance_exponent")) is not None:
            self._importance = replace(self._importance, importance_exponent=exponent)
        if (eta := values.get("priority_eta")) is not None:
            self._priorities = replace(self._priorities, priority_eta=eta)

    def add(self, rollout: Rollout) -> None:
        """Stores a rollout's blocks and gives the sequences they complete a first priority."""
        self._held.add(rollout, self._first_leaves)

    def _draw(self, batch_size: int, buffers: Batch | None) -> Sample:
        over_all = self._importance.importance_scale == "replay"
        how = Draw(batch_size=batch_size, stratified=self._stratified, find_least=over_all)
        drawn = self._ring.draw(how, self._held.rng, buffers)
        scaled = drawn.scaled_probability
        least = drawn.least_scaled_probability if over_all else float(scaled.min())
        exponent = self.importance_exponent
        importance = importance_of(scaled, exponent, least)
        return drawn.sample(importance, least=least, exponent=exponent)

    @property
    def importance_exponent(self) -> float:
        """The exponent now."""
        return self._importance.exponent(self._env_steps_before + self._added())

    @property
    def needs_priorities(self) -> bool:
        """Says whether drawing depends on priorities."""
        return self._priorities.priority_exponent > 0

    def update_priorities(self, keys: np.ndarray, priorities: np.ndarray) -> None:
        """New priorities f32[B, T] of the rows (-1 = not valid) of the sequences with keys i64[B].

        Keys overwritten since they were sampled are ignored and counted. Raises
        FloatingPointError, naming the keys, if one is not finite.
        """
        self._stale_updates += self._ring.set_leaves(keys, self._leaves(keys, priorities))

    def stats(self) -> dict[str, float]:
        """Metrics: the ring's, and the updates that came too late."""
        return {
            **self._held.stats(),
            "replay/stale_updates": float(self._stale_updates),
            "replay/importance_exponent": self.importance_exponent,
            **self._spread(),
        }

    def _spread(self) -> dict[str, float]:
        """Metrics of the priorities of all sequences that can be drawn now."""
        leaves = np.concatenate([ring.all_leaves for ring in self._ring.rings])
        leaves = leaves[leaves > 0]
        if not (len(leaves) and self.needs_priorities):
            return {}
        priorities = self._priorities.of_leaves(leaves)
        return {
            "replay/priority_mean": float(priorities.mean()),
            "replay/priority_std": float(priorities.std()),
            "replay/priority_min": float(priorities.min()),
            "replay/priority_max": float(priorities.max()),
        }

    def state(self) -> dict[str, Any]:
        """Arrays and JSON scalars: all but the blocks."""
        return {
            **self._held.state(),
            **self._counts(),
        }

    def restore(self, state: Mapping[str, Any], blocks: Sequence[Iterable[Blocks]]) -> None:
        """Goes on from a saved state and its blocks; raises ValueError if they do not fit."""
        self._held.restore(state, blocks)
        self._restore_counts(state)

    def drawing_state(self) -> dict[str, Any]:
        """The part of `state` that does not follow from the blocks."""
        return {
            "layout": self._ring.rings[0].layout,
            "rng": json.dumps(self._held.rng.bit_generator.state),
            "leaves": np.array(self._ring.rings[0].all_leaves),
            **self._counts(),
        }

    def _counts(self) -> dict[str, Any]:
        return {
            "largest_priority": self._largest_priority,
            "stale_updates": self._stale_updates,
            "env_steps_before": self._env_steps_before,
        }

    def _restore_counts(self, state: Mapping[str, Any]) -> None:
        self._largest_priority = float(state["largest_priority"])
        self._stale_updates = int(state["stale_updates"])
        self._env_steps_before = int(state.get("env_steps_before", 0))  # earlier ones lack it

    def restore_drawing(self, state: Mapping[str, Any]) -> None:
        """Goes on from `drawing_state` with the same blocks; raises ValueError for other starts."""
        if "layout" in state:  # earlier ones lack it
            check_layout(state["layout"], self._ring.rings[0].layout)
        self._ring.rings[0].load_leaves(np.asarray(state["leaves"]))
        self._held.rng.bit_generator.state = json.loads(state["rng"])
        self._restore_counts(state)

    def _first_leaves(self, keys: np.ndarray) -> np.ndarray:
        if self._priorities.initial_priority == "one":
            return self._priorities.leaves(np.ones(len(keys)))
        largest = self._priorities.initial_priority == "max"
        if largest or self._initial_priorities is None:
            return self._priorities.leaves(np.full(len(keys), self._largest_priority))
        return self._leaves(keys, self._initial_priorities(self._ring.scalars(keys)))

    def _leaves(self, keys: np.ndarray, priorities: np.ndarray) -> np.ndarray:
        """f64[B] of priorities f32[B, T]."""
        check_priorities(keys, priorities)
        priority = sequence_priority(priorities, self._priorities.priority_eta)
        self._largest_priority = max(self._largest_priority, float(priority.max(initial=0.0)))
        return self._priorities.leaves(priority)

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


class NotFinite(RunFailed, FloatingPointError):
    """Priorities that are NaN or infinite."""


def check_priorities(keys: np.ndarray, priorities: np.ndarray) -> None:
    """Raises where they are not f32[B, T], >= 0, or finite (FloatingPointError with the keys)."""
    priorities = np.asarray(priorities)
    if priorities.ndim != 2 or len(priorities) != len(keys):
        raise ValueError(
            f"Priorities must be f32[{len(keys)}, T], one line per key, "
            f"got {list(priorities.shape)}."
        )
    bad = ~np.isfinite(priorities).all(axis=1)
    if bad.any():
        named = ", ".join(str(key) for key in np.asarray(keys)[bad][:4].tolist())
        raise NotFinite(
            f"Priorities of {bad.sum()} of {len(bad)} sequences are not finite (keys {named}"
            f"{', ...' if bad.sum() > 4 else ''}); look at the learner's loss and the rewards."
        )
    if ((priorities < 0) & (priorities != NOT_VALID)).any():
        least = float(priorities.min())
        raise ValueError(f"Priorities must be >= 0 (or -1 = not valid), got {least}.")
