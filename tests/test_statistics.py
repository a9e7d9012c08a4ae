"""Statistics against scipy and brute force."""

import itertools
import statistics
from typing import Any

import numpy as np
import pytest
from scipy import stats

from rlx.statistics import (
    iqm,
    iqm_curve,
    iqm_interval,
    optimality_gap,
    performance_profile,
    probability_of_improvement,
    stratified,
    stratified_means,
    summarize,
)

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


def last(scores: np.ndarray) -> np.ndarray:
    return iqm(scores, axis=-1)


def test_stratified_interval_is_that_of_equal_tasks_and_draws_within_each() -> None:
    scores = RNG.gamma(2.0, size=(40, 3))
    found = stratified(list(scores.T), last, seed=0, resamples=20_000)
    assert found.value == pytest.approx(stats.trim_mean(scores.ravel(), 0.25))
    assert (found.low, found.high) == pytest.approx(
        iqm_interval(scores, seed=1, resamples=20_000), abs=0.02
    )
    constant = stratified(
        [[0.0, 0.0], [10.0], [20.0, 20.0, 20.0]], lambda s: s.mean(axis=-1), seed=0
    )
    assert constant.low == constant.value == constant.high


def test_a_curve_is_the_iqm_of_the_runs_that_have_a_value() -> None:
    curves = RNG.standard_normal((9, 6))
    curves[:4, 3] = np.nan  # five runs are left
    curves[1:, 4] = np.nan  # one
    curves[:, 5] = np.nan  # none
    found = iqm_curve([curves[:5], curves[5:]], seed=0)
    expected = [stats.trim_mean(c[np.isfinite(c)], 0.25) for c in curves.T[:5]]
    np.testing.assert_allclose(found.value[:5], expected)
    assert np.isnan([found.value[5], found.low[5], found.high[5]]).all()
    assert (found.low[:3] < found.value[:3]).all()
    assert (found.value[:3] < found.high[:3]).all()


def test_a_curves_band_is_the_interval_of_each_of_its_points() -> None:
    curves = RNG.gamma(2.0, size=(10, 2))
    found = iqm_curve([curves], seed=3)
    for point in range(2):
        one = stratified([curves[:, point]], last, seed=3)
        assert (found.low[point], found.high[point]) == pytest.approx((one.low, one.high))


def test_a_profile_counts_runs_above_and_weighs_tasks_alike() -> None:
    found = performance_profile([[1.0, 2.0, 3.0], [4.0, 5.0]], [0.0, 1.0, 4.5, 5.0], seed=0)
    np.testing.assert_allclose(found.value, [1.0, (2 / 3 + 1) / 2, 0.25, 0.0])
    many = RNG.standard_normal(30)
    found = performance_profile([many], [0.0], seed=0, resamples=20_000)
    share = float((many > 0).mean())
    low, high = stats.binom(30, share).interval(0.95)
    assert (found.low[0], found.high[0]) == pytest.approx((low / 30, high / 30), abs=0.034)


def test_probability_of_improvement_is_mann_whitneys() -> None:
    first, second = [RNG.integers(0, 9, 12), RNG.integers(0, 9, 7)], [RNG.integers(0, 9, 8)] * 2
    found = probability_of_improvement(first, second, seed=0)
    expected = [
        stats.mannwhitneyu(a, b).statistic / (len(a) * len(b))
        for a, b in zip(first, second, strict=True)
    ]
    assert found.value == pytest.approx(np.mean(expected))
    assert found.low < found.value < found.high
    other = probability_of_improvement(second, first, seed=0)
    assert other.value == pytest.approx(1 - found.value)


def test_the_interval_of_improvement_converges_to_all_possible_resamples() -> None:
    first, second = [1.0, 3.0, 5.0], [2.0, 4.0]
    every = [
        np.mean([(a > b) + 0.5 * (a == b) for a in x for b in y])
        for x in itertools.product(first, repeat=3)
        for y in itertools.product(second, repeat=2)
    ]
    found = probability_of_improvement([first], [second], seed=0, resamples=50_000, confidence=0.7)
    assert found.value == 0.5
    assert (found.low, found.high) == pytest.approx(
        np.quantile(np.repeat(every, 500), [0.15, 0.85]), abs=1e-9
    )


def test_the_optimality_gap_counts_what_is_above_the_target_as_the_target() -> None:
    found = optimality_gap([[0.5, 2.0], [0.0]], seed=0)
    assert found.value == pytest.approx((0.5 + 0.0 + 1.0) / 3)
    assert optimality_gap([[3.0, 2.0]], target=2.0, seed=0).high == 0.0


def test_statistics_of_means_draw_runs_within_their_task() -> None:
    tasks = [[0.0, 1.0], [5.0, 9.0], [2.0, 2.0, 8.0]]

    def median(means: np.ndarray) -> Any:
        return np.median(means, axis=-1)

    found = stratified_means(tasks, median, seed=0, resamples=50_000, confidence=0.7)
    assert found.value == median(np.array([0.5, 7.0, 4.0]))
    means = [[np.mean(d) for d in itertools.product(t, repeat=len(t))] for t in tasks]
    every = [statistics.median(drawn) for drawn in itertools.product(*means)]
    expected = np.quantile(every, [0.15, 0.85], method="inverted_cdf")
    assert (found.low, found.high) == pytest.approx(tuple(expected))


def test_chunks_change_nothing_and_tasks_without_runs_are_refused(monkeypatch) -> None:
    tasks = [RNG.standard_normal((4, 5)), RNG.standard_normal((3, 5))]
    whole = iqm_curve(tasks, seed=0, resamples=100)
    monkeypatch.setattr("rlx.statistics._ELEMENTS", 200)
    parts = iqm_curve(tasks, seed=0, resamples=100)
    np.testing.assert_array_equal(whole.low, parts.low)
    with pytest.raises(ValueError, match="a task has no runs"):
        iqm_curve([np.zeros((1, 5)), np.zeros((0, 5))], seed=0)
    with pytest.raises(ValueError, match="1 and 2 tasks"):
        probability_of_improvement([[1.0]], [[1.0], [2.0]], seed=0)
