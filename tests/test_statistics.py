"""Statistics against scipy and brute force."""

import itertools

import numpy as np
import pytest
from scipy import stats

from rlx.statistics import iqm, iqm_interval, summarize

RNG = np.random.default_rng(5)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 11, 100])
def test_iqm_is_the_trimmed_mean_of_scipy(n: int) -> None:
    scores = RNG.standard_normal((n, 3))
    for axis, expected in ((None, scores.ravel()), (0, scores)):
        np.testing.assert_allclose(iqm(scores, axis=axis), stats.trim_mean(expected, 0.25))


def test_iqm_ignores_outliers_in_the_outer_quarters() -> None:
    assert iqm([1, 2, 3, 1e9]) == 2.5
    assert iqm([-1e9, 2, 3, 4]) == 2.5


def test_interval_converges_to_all_possible_resamples() -> None:
    scores = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    every = [iqm(list(drawn)) for drawn in itertools.product(scores, repeat=len(scores))]
    low, high = iqm_interval(scores, seed=0, resamples=50_000, confidence=0.8)
    assert low == pytest.approx(np.quantile(every, 0.1), abs=0.15)
    assert high == pytest.approx(np.quantile(every, 0.9), abs=0.15)


def test_interval_agrees_with_scipy_bootstrap() -> None:
    scores = RNG.gamma(2.0, size=40)
    expected = stats.bootstrap(
        (scores,),
        lambda x, axis: stats.trim_mean(x, 0.25, axis=axis),
        method="percentile",
        n_resamples=5000,
        rng=np.random.default_rng(0),
    ).confidence_interval
    assert iqm_interval(scores, seed=1) == pytest.approx(tuple(expected), abs=0.05)


def test_runs_are_drawn_within_their_task() -> None:
    # Constant tasks far apart: drawn within tasks the IQM never moves, across tasks it does.
    scores = np.tile([0.0, 10.0, 20.0, 30.0], (5, 1))
    assert iqm_interval(scores, seed=0) == (15.0, 15.0)


def test_interval_is_seeded_and_does_not_depend_on_the_chunks(monkeypatch) -> None:
    scores = RNG.standard_normal((10, 3))
    first = iqm_interval(scores, seed=3)
    assert iqm_interval(scores, seed=3) == first
    assert iqm_interval(scores, seed=4) != first
    monkeypatch.setattr("rlx.statistics._ELEMENTS", 7 * scores.size)
    assert iqm_interval(scores, seed=3) == first


def test_summary() -> None:
    returns = [3.0, 1.0, 2.0, 10.0, 4.0]
    summary = summarize(returns)
    assert {k: summary[k] for k in ("mean", "median", "min", "max", "iqm", "episodes")} == {
        "mean": 4.0, "median": 3.0, "min": 1.0, "max": 10.0, "iqm": 3.0, "episodes": 5,
    }  # fmt: skip
    assert 1.0 <= summary["iqm_low"] <= 3.0 <= summary["iqm_high"] <= 10.0


def test_no_episodes_and_one_episode() -> None:
    nothing = summarize([])
    assert nothing.pop("episodes") == 0
    assert all(np.isnan(value) for value in nothing.values())
    one = summarize([7.0])
    assert one.pop("episodes") == 1
    assert set(one.values()) == {7.0}


def test_scores_that_are_not_finite_are_refused_with_their_number() -> None:
    with pytest.raises(ValueError, match="2 of 3 scores are not finite"):
        iqm([1.0, np.nan, np.inf])
    with pytest.raises(ValueError, match="no scores"):
        iqm([])
    with pytest.raises(ValueError, match=r"confidence=95.*between 0 and 1"):
        iqm_interval([1.0, 2.0], seed=0, confidence=95)
