"""Summaries of few runs: the interquartile mean and its bootstrap interval, in NumPy.

After Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice":
the IQM drops the lowest and the highest quarter of the scores; the interval is a percentile
bootstrap that draws runs anew within each task (stratified, section 4.1). Where tasks may have
different numbers of runs, scores are a list with one array per task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlx.seeding import spawn_rng

RESAMPLES = 2000
CONFIDENCE = 0.95
_ELEMENTS = 1 << 20  # resampled scores held in memory at a time


def iqm(scores: Any, axis: int | None = None) -> Any:
    """The mean of what remains when floor(n / 4) scores are cut from each end.

    axis: where the n scores lie; None: all of them together, which gives a float.
    """
    values = _finite(scores)
    flat = values.reshape(-1) if axis is None else np.moveaxis(values, axis, -1)
    ordered = np.sort(flat, axis=-1)
    cut = ordered.shape[-1] // 4
    mean = ordered[..., cut : ordered.shape[-1] - cut].mean(axis=-1)
    return float(mean) if mean.ndim == 0 else mean


def iqm_interval(
    scores: Any, *, seed: int, resamples: int = RESAMPLES, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """The bootstrap interval (low, high) of the IQM over all runs and tasks.

    scores: f64[runs] or f64[runs, tasks]; runs are drawn with replacement within each task.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: must lie between 0 and 1.")
    values = _finite(scores)
    if values.ndim not in (1, 2):
        raise ValueError(f"scores have shape {values.shape}: give [runs] or [runs, tasks].")
    values = values.reshape(len(values), -1)
    rng = spawn_rng(seed, "bootstrap")
    chunk = max(1, _ELEMENTS // values.size)
    means = np.concatenate(
        [
            _resampled_iqm(values, rng, min(chunk, resamples - done))
            for done in range(0, resamples, chunk)
        ]
    )
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value, or f64[points] of them, with the bounds of its interval."""

    value: Any
    low: Any
    high: Any


def stratified(
    tasks: Sequence[Any],
    statistic: Callable[[np.ndarray], Any],
    *,
    seed: int,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """A statistic of all scores together, and its bootstrap interval.

    tasks: f64[runs] of each task. statistic: of f64[..., scores] over its last axis.
    """
    strata = [_finite(scores) for scores in tasks]
    value = statistic(np.concatenate(strata)[None])[0]
    drawn = [statistic(np.concatenate(d, axis=1)) for d in _draws(strata, seed, resamples)]
    return _estimate(value, np.concatenate(drawn), confidence)


def stratified_means(
    tasks: Sequence[Any],
    statistic: Callable[[np.ndarray], Any],
    *,
    seed: int,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """A statistic of the tasks' mean scores, and its bootstrap interval; tasks weigh alike.

    tasks: f64[runs] of each task. statistic: of f64[..., tasks] over its last axis.
    """
    strata = [_finite(scores) for scores in tasks]

    def of_means(draws: Sequence[np.ndarray]) -> Any:  # f64[times, runs] of each task
        return statistic(np.stack([runs.mean(axis=1) for runs in draws], axis=-1))

    drawn = [of_means(draws) for draws in _draws(strata, seed, resamples)]
    value = of_means([scores[None] for scores in strata])[0]
    return _estimate(value, np.concatenate(drawn), confidence)


def iqm_curve(
    tasks: Sequence[Any],
    *,
    seed: int,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """The IQM at each point of curves, f64[points], with a pointwise interval.

    tasks: f64[runs, points] of each task, NaN where a run has no value there. Whole runs are
    drawn; a point without any value is NaN.
    """
    strata = [np.asarray(curves, dtype=np.float64) for curves in tasks]
    drawn = [_iqm_of_known(np.concatenate(d, axis=1)) for d in _draws(strata, seed, resamples)]
    value = _iqm_of_known(np.concatenate(strata)[None])[0]
    return _estimate(value, np.concatenate(drawn), confidence)


def performance_profile(
    tasks: Sequence[Any],
    taus: Any,
    *,
    seed: int,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """The share of runs with a score above each tau, f64[points]; each task counts the same."""
    strata, levels = [_finite(scores) for scores in tasks], np.asarray(taus, dtype=np.float64)

    def share(drawn: Sequence[np.ndarray]) -> np.ndarray:
        above = [(scores[..., None] > levels).mean(axis=1) for scores in drawn]
        return np.mean(above, axis=0)

    many = [share(drawn) for drawn in _draws(strata, seed, resamples, width=levels.size)]
    value = share([scores[None] for scores in strata])[0]
    return _estimate(value, np.concatenate(many), confidence)


def probability_of_improvement(
    first: Sequence[Any],
    second: Sequence[Any],
    *,
    seed: int,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """Gives the chance that a run of `first` beats one of `second` on a task; ties count half.

    Both: f64[runs] of each task, in the same order of tasks; each task counts the same.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} tasks: give both the same tasks.")
    strata = [_finite(scores) for scores in (*first, *second)]
    width = max(len(scores) for scores in strata)

    def better(drawn: Sequence[np.ndarray]) -> np.ndarray:
        pairs = zip(drawn[: len(first)], drawn[len(first) :], strict=True)
        signs = [np.sign(a[:, :, None] - b[:, None, :]).mean(axis=(1, 2)) for a, b in pairs]
        return 0.5 + 0.5 * np.mean(signs, axis=0)

    many = [better(drawn) for drawn in _draws(strata, seed, resamples, width=width)]
    return _estimate(better([s[None] for s in strata])[0], np.concatenate(many), confidence)


def optimality_gap(
    tasks: Sequence[Any],
    target: float = 1.0,
    *,
    seed: int,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """Gives how far scores stay below a target on average; those above it count as the target."""

    def gap(scores: np.ndarray) -> Any:
        return target - np.minimum(scores, target).mean(axis=-1)

    return stratified(tasks, gap, seed=seed, resamples=resamples, confidence=confidence)


def summarize(returns: Sequence[float], *, seed: int = 0) -> dict[str, float]:
    """Mean, median, min, max, IQM with its 95 % interval, and number of episode returns.

    Without episodes every value but `episodes` is NaN.
    """
    names = ("mean", "median", "min", "max", "iqm", "iqm_low", "iqm_high")
    if not len(returns):
        return {name: float("nan") for name in names} | {"episodes": 0}
    values = _finite(returns)
    low, high = iqm_interval(values, seed=seed)
    found = (values.mean(), np.median(values), values.min(), values.max(), iqm(values), low, high)
    summary = {name: float(value) for name, value in zip(names, found, strict=True)}
    return summary | {"episodes": len(values)}


def _resampled_iqm(values: np.ndarray, rng: np.random.Generator, times: int) -> np.ndarray:
    """f64[times]: the IQM of resampled f64[runs, tasks]."""
    runs, tasks = values.shape
    drawn = rng.integers(runs, size=(times, runs, tasks))
    return iqm(values[drawn, np.arange(tasks)].reshape(times, -1), axis=-1)


def _draws(
    strata: Sequence[np.ndarray], seed: int, resamples: int, width: int = 1
) -> Iterator[list[np.ndarray]]:
    """Yields for each f64[runs, ...] a [times, runs, ...] of runs drawn anew, a few at once.

    width: elements that the statistic makes of each score, which bounds how many.
    """
    if not strata or not all(len(values) for values in strata):
        raise ValueError("a task has no runs: give at least one of each, and at least one task.")
    rng = spawn_rng(seed, "bootstrap")
    drawn = [rng.integers(len(values), size=(resamples, len(values))) for values in strata]
    chunk = max(1, _ELEMENTS // (width * sum(values.size for values in strata)))
    for begin in range(0, resamples, chunk):
        rows = slice(begin, begin + chunk)
        yield [values[index[rows]] for values, index in zip(strata, drawn, strict=True)]


def _iqm_of_known(values: np.ndarray) -> np.ndarray:
    """f64[times, points]: the IQM over the runs of [times, runs, points] that are not NaN."""
    ordered = np.sort(values, axis=1)  # NaN last
    known = np.isfinite(ordered).sum(axis=1, keepdims=True)
    place, cut = np.arange(values.shape[1])[:, None], known // 4
    kept = (place >= cut) & (place < known - cut)
    count = kept.sum(axis=1)
    total = np.where(kept, ordered, 0.0).sum(axis=1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _estimate(value: Any, drawn: np.ndarray, confidence: float) -> Estimate:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: must lie between 0 and 1.")
    tail = (1 - confidence) / 2
    known = ~np.isnan(drawn).all(axis=0)
    bounds = np.full((2, *drawn.shape[1:]), np.nan)
    bounds[:, known] = np.nanquantile(drawn[:, known], [tail, 1 - tail], axis=0)
    if np.ndim(value) == 0:
        return Estimate(value=float(value), low=float(bounds[0]), high=float(bounds[1]))
    return Estimate(value=value, low=bounds[0], high=bounds[1])


def _finite(scores: Any) -> np.ndarray:
    values = np.asarray(scores, dtype=np.float64)
    if not values.size:
        raise ValueError("no scores were given: give at least one.")
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise ValueError(f"{bad} of {values.size} scores are not finite: leave them out.")
    return values
