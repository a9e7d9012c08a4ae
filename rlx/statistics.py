"""Summaries of few runs: the interquartile mean and its bootstrap interval, in NumPy.

After Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice":
the IQM drops the lowest and the highest quarter of the scores; the interval is a percentile
bootstrap that draws runs anew within each task (stratified, section 4.1).
"""

from __future__ import annotations

from collections.abc import Sequence
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


def _finite(scores: Any) -> np.ndarray:
    values = np.asarray(scores, dtype=np.float64)
    if not values.size:
        raise ValueError("no scores were given: give at least one.")
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise ValueError(f"{bad} of {values.size} scores are not finite: leave them out.")
    return values
