"""Measures where the time of the training loop goes, stage by stage."""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter
from typing import Any

# What each stage of the loop waits for, and the setting to turn when it takes most of the time.
STAGES: Mapping[str, str] = {
    "acting": "the environments are the bottleneck; try acting.envs_per_actor or env.threads",
    "replay_add": "adding blocks is the bottleneck; try a larger agent.block_rows",
    "sample": "sampling is the bottleneck; try a smaller learner.batch_size",
    "wait_peers": "the other learner processes are the bottleneck; see learners/*/metrics.jsonl",
    "learner_put": "copying batches to the device is the bottleneck; try learner.batch_size",
    "learner_update": "the learner is the bottleneck; try learner.devices or replay.ratio",
    "wait_learner": "the learner is the bottleneck; try learner.devices or replay.ratio",
    "publish": "publishing weights is the bottleneck; try learner.publish_every_updates",
    "evaluation": "evaluations take most of the time; try evaluation.every_env_steps",
    "checkpoint": "checkpoints take most of the time; try checkpoint.every_env_steps",
    "logging": "logging takes most of the time; try logging.every_env_steps",
    "other": "time outside all stages; profile the loop",
}


class _Timer:
    """The seconds spent in one stage; enters and leaves in well under a microsecond."""

    __slots__ = ("since", "spent")

    def __init__(self) -> None:
        self.since: float | None = None
        self.spent = 0.0

    def __enter__(self) -> None:
        self.since = perf_counter()

    def __exit__(self, *exception: object) -> None:
        if self.since is not None:
            self.spent += perf_counter() - self.since
        self.since = None

    def take(self, now: float) -> float:
        """The seconds until now, those of a stage still running among them; starts anew."""
        spent, self.spent = self.spent, 0.0
        if self.since is not None:
            spent += now - self.since
            self.since = now
        return spent


class StageTimes:
    """A stopwatch for the loop's thread: `with stages.measure("acting"): ...`; not nested."""

    def __init__(self) -> None:
        self._timers = {name: _Timer() for name in STAGES}
        self._begun = perf_counter()

    def measure(self, name: str) -> _Timer:
        """Counts the time of a `with` block to a stage of STAGES."""
        try:
            return self._timers[name]
        except KeyError:
            raise ValueError(f"stage {name!r}: must be one of {', '.join(STAGES)}.") from None

    def fractions(self) -> dict[str, float]:
        """{"time/acting": 0.71, ...} since the last call, 0 .. 1; "time/other" is the rest."""
        now = perf_counter()
        total = max(now - self._begun, 1e-9)
        spent = {name: timer.take(now) for name, timer in self._timers.items()}
        spent["other"] += max(0.0, total - sum(spent.values()))
        self._begun = now
        return {f"time/{name}": seconds / total for name, seconds in spent.items()}


def bottleneck(fractions: Mapping[str, Any]) -> str:
    """One line on the stage that takes most of the time, from `StageTimes.fractions()` or a row."""
    known = {name: fractions.get(f"time/{name}") or 0.0 for name in STAGES}
    name = max(known, key=lambda stage: known[stage])
    if known[name] <= 0:
        return ""
    return f"{name} {100 * known[name]:.0f} % of the time: {STAGES[name]}"
