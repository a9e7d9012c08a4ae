"""Each lane explores by its place among all lanes, and by progress."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import optax
import pytest
import yaml

from rlx.acting.exploration import (
    Amounts,
    Constant,
    DecayingLadder,
    Exponential,
    Ladder,
    Linear,
    Mixed,
    Redrawn,
)
from rlx.config.build import build
from rlx.interfaces import PerEpisode
from rlx.problems import ConfigError
from rlx.seeding import uniforms

LANES, SEED = np.arange(8), 5
CONF = Path(__file__).parents[2] / "conf/exploration"
# Of each YAML: what is set otherwise, and the amounts of lanes 0 and 7 of 8 at TIMES.
TIMES = (0, 500, 1000, 5000)
ENDS_AT_1000 = {"decay_env_steps": 1000}
SCHEDULES = {
    "constant": ({}, [(0.1, 0.1)] * 4),
    "greedy": ({}, [(0, 0)] * 4),
    "ladder": (
        ENDS_AT_1000 | {"final_scale": 0.5},
        [(0.4, 0.0256), (0.3, 0.0192), (0.2, 0.0128), (0.2, 0.0128)],
    ),
    "decaying_ladder": (
        ENDS_AT_1000 | {"minimum": 0.001},
        [(0.4, 0.001), (0.205, 0.001), (0.01, 0.001), (0.01, 0.001)],
    ),
    "exponential": (ENDS_AT_1000, [(1, 1), (0.1, 0.1), (0.01, 0.01), (0.01, 0.01)]),
    "mixed": (
        ENDS_AT_1000 | {"weights": [0.0, 1, 0.0]},
        [(1, 1), (0.505, 0.505), (0.01, 0.01), (0.01, 0.01)],
    ),
    "piecewise": (
        {"points": [[0, 1.0], [1000, 0.1]]},
        [(1, 1), (0.55, 0.55), (0.1, 0.1), (0.1, 0.1)],
    ),
    "redrawn": ({"lowest": 0.1}, [(0.1, 0.1)] * 4),
    "linear": (ENDS_AT_1000, [(1, 1), (0.525, 0.525), (0.05, 0.05), (0.05, 0.05)]),
    "sample": ({}, [(1, 1)] * 4),
}


def made(name, **changes):
    settings = yaml.safe_load((CONF / f"{name}.yaml").read_text()) | changes
    return build(settings, "exploration", seed=SEED)


def ladder(**changes):
    settings = {
        "base": 0.4,
        "exponent": 7.0,
        "minimum": 0.0,
        "final_scale": 1.0,
        "decay_env_steps": None,
    }
    return Ladder(**settings | changes)


@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("*.yaml")))
def test_every_schedule_is_known_at_its_start_in_between_at_its_end_and_after_it(name):
    changes, expected = SCHEDULES[name]
    schedule = made(name, **changes)
    found = [schedule.amount(LANES, 8, env_steps)[[0, 7]] for env_steps in TIMES]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_ladder_is_the_papers():
    found = ladder().amount(np.arange(256), 256, 0)
    assert found.dtype == np.float32
    expected = [0.4 ** (1 + 7 * i / 255) for i in range(256)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_one_lane_stands_on_the_first_rung():
    np.testing.assert_allclose(ladder().amount(np.arange(1), 1, 0), [0.4])


def test_a_rung_is_a_lanes_own_however_the_lanes_are_shared_out():
    whole = ladder().amount(LANES, 8, 0)
    halves = [ladder().amount(part, 8, 0) for part in (LANES[:4], LANES[4:])]
    np.testing.assert_array_equal(np.concatenate(halves), whole)


def test_every_rung_shrinks_to_its_final_scale_and_stays():
    shrinking = ladder(final_scale=0.25, decay_env_steps=1000)
    first, half, end, later = (shrinking.amount(LANES, 8, n) for n in (0, 500, 1000, 9000))
    np.testing.assert_allclose(half, first * 0.625, rtol=1e-6)
    np.testing.assert_allclose(end, first * 0.25, rtol=1e-6)
    np.testing.assert_array_equal(later, end)


def test_no_rung_lies_below_the_minimum():
    found = ladder(minimum=0.05, final_scale=0.01, decay_env_steps=10).amount(LANES, 8, 10)
    np.testing.assert_allclose(found, 0.05)


def test_a_constant_is_the_same_for_all_and_for_ever():
    for env_steps in (0, 10**9):
        np.testing.assert_allclose(Constant(value=0.3).amount(LANES, 8, env_steps), 0.3)


@pytest.mark.parametrize(("env_steps", "expected"), [(0, 1.0), (50, 0.55), (100, 0.1), (999, 0.1)])
def test_a_line_falls_from_start_to_final(env_steps, expected):
    line = Linear(start=1.0, final=0.1, decay_env_steps=100)
    np.testing.assert_allclose(line.amount(LANES, 8, env_steps), expected, rtol=1e-6)


# --- falls ---------------------------------------------------------------------------------------

MOMENTS = (0, 1, 137, 500, 999, 1000, 1001, 10**9)


@pytest.mark.parametrize("lanes", [1, 2, 8, 256])
@pytest.mark.parametrize("env_steps", MOMENTS)
def test_rltimes_ladder_takes_the_power_of_the_falling_base(env_steps, lanes):
    """The oracle is rltime's arithmetic, a lane at a time (there, one lane is not allowed)."""
    decaying = DecayingLadder(
        start_base=0.4, final_base=0.01, exponent=7.0, minimum=0.005, decay_env_steps=1000
    )
    found = decaying.amount(np.arange(lanes), lanes, env_steps)
    part = env_steps / 1000
    base = 0.01 if part >= 1 else 0.4 - part * (0.4 - 0.01)
    expected = []
    for i in range(lanes):
        value = base if lanes == 1 else base ** (1 + (i / (lanes - 1)) * 7.0)
        expected.append(0.005 if value < 0.005 else value)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_two_falling_ladders_differ_on_low_rungs_only():
    shrinking = ladder(final_scale=0.25, decay_env_steps=1000).amount(LANES, 8, 1000)
    falling = DecayingLadder(
        start_base=0.4, final_base=0.1, exponent=7.0, minimum=0.0, decay_env_steps=1000
    ).amount(LANES, 8, 1000)
    assert falling[0] == pytest.approx(shrinking[0])
    assert (falling[1:] < 0.3 * shrinking[1:]).all()


@pytest.mark.parametrize("env_steps", MOMENTS)
def test_an_exponential_fall_is_optaxs(env_steps):
    fall = Exponential(start=0.8, final=0.02, decay_env_steps=1000)
    curve = optax.exponential_decay(0.8, 1000, 0.02 / 0.8, end_value=0.02)
    np.testing.assert_allclose(fall.amount(LANES, 8, env_steps), curve(env_steps), rtol=2e-6)


# --- draws ---------------------------------------------------------------------------------------


def mixed(**changes):
    a3c = {"start": 1.0, "finals": (0.1, 0.01, 0.5), "weights": (0.4, 0.3, 0.3)}
    return Mixed(**a3c | {"decay_env_steps": 1000, "seed": SEED} | changes)


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_final_values_are_drawn_by_their_weights(scale):
    lanes = np.arange(30_000)
    found = mixed(weights=(0.4 * scale, 0.3 * scale, 0.3 * scale)).amount(lanes, 30_000, 1000)
    counts = {value: int((found == np.float32(value)).sum()) for value in (0.1, 0.01, 0.5)}
    assert sum(counts.values()) == 30_000
    wanted = {0.1: 12_000, 0.01: 9_000, 0.5: 9_000}
    # Two degrees of freedom: above 13.8 with a chance of 0.001.
    assert sum((counts[v] - n) ** 2 / n for v, n in wanted.items()) < 13.8


def test_a_lane_falls_linearly_to_the_value_that_its_number_draws():
    u = uniforms(SEED, "exploration", LANES)
    expected = np.array([0.1 if x < 0.4 else 0.01 if x < 0.7 else 0.5 for x in u])
    assert len(set(expected)) == 3
    for env_steps in MOMENTS:
        fallen = 1 + (expected - 1) * min(1, env_steps / 1000)
        np.testing.assert_allclose(mixed().amount(LANES, 8, env_steps), fallen, rtol=1e-6)


def test_a_lanes_draw_is_its_own_however_the_lanes_are_shared_out():
    whole = mixed().amount(LANES, 8, 1000)
    parts = [mixed().amount(LANES[at : at + 2], 8, 1000) for at in range(0, 8, 2)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert (mixed(seed=SEED + 1).amount(LANES, 8, 1000) != whole).any()


def test_a_value_without_weight_is_never_drawn():
    lanes = np.arange(5000)
    for at in range(3):
        weights = tuple(0.0 if i == at else 1.0 for i in range(3))
        found = mixed(weights=weights).amount(lanes, 5000, 1000)
        assert not (found == np.float32((0.1, 0.01, 0.5)[at])).any()


def redrawn(**changes):
    return Redrawn(**{"highest": 0.1, "lowest": 0.001, "count": 256, "seed": SEED} | changes)


def test_each_of_acmes_256_values_is_drawn_as_often():
    n = 256 * 100
    number = np.arange(n)
    found = redrawn().episode_amount(number % 16, 16, 0, number % 5, number)
    acmes = np.logspace(1, 3, 256, base=0.1).astype(np.float32)
    at = np.abs(np.log(acmes)[None] - np.log(found)[:, None]).argmin(axis=1)
    np.testing.assert_allclose(found, acmes[at], rtol=1e-5)
    counts = np.bincount(at, minlength=256)
    # 255 degrees of freedom: above 330.5 with a chance of 0.001.
    assert ((counts - 100) ** 2 / 100).sum() < 330.5


def test_draws_differ_by_lane_chain_episode_and_seed():
    zero = np.zeros(8, int)
    first = redrawn().episode_amount(LANES, 8, 0, zero, zero)
    assert len(set(first.tolist())) > 4
    for other in (
        redrawn().episode_amount(LANES, 8, 0, zero + 1, zero),
        redrawn().episode_amount(LANES, 8, 0, zero, zero + 1),
        redrawn(seed=6).episode_amount(LANES, 8, 0, zero, zero),
    ):
        assert (first != other).sum() >= 6
    np.testing.assert_array_equal(redrawn().amount(LANES, 8, 999), first)


def test_one_value_is_the_highest():
    np.testing.assert_allclose(redrawn(count=1).amount(LANES, 8, 0), 0.1, rtol=1e-6)


def test_amounts_change_where_episodes_begin_and_stay_for_those_who_read_them():
    amounts, chain = Amounts(redrawn(), np.arange(4, 8, dtype=np.int32), 8), np.full(4, 3)

    def drawn(lane, number, chain=3):
        one = np.array([lane])
        return redrawn().episode_amount(one, 8, 0, np.array([chain]), np.array([number]))[0]

    amounts.begin(0)
    amounts.begin_episodes(np.arange(4), chain)
    first = amounts.now
    assert first.tolist() == [drawn(lane, 0) for lane in (4, 5, 6, 7)]
    amounts.begin(100)
    assert amounts.now is first
    amounts.begin_episodes(np.array([2, 0]), chain)
    assert first.tolist() == [drawn(lane, 0) for lane in (4, 5, 6, 7)]
    assert amounts.now.tolist() == [drawn(4, 1), drawn(5, 0), drawn(6, 1), drawn(7, 0)]
    amounts.restart(np.array([2]))
    chain[2] = 4
    amounts.begin_episodes(np.array([2]), chain)
    assert amounts.now[2] == drawn(6, 0, chain=4)


def test_explorations_say_whether_they_follow_episodes():
    follow = {name: isinstance(made(name), PerEpisode) for name in SCHEDULES}
    assert {name for name in follow if follow[name]} == {"redrawn"}


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("mixed", {"weights": [0.5, 0.5]}, r"weights has 2 numbers, .*finals has 3; give each"),
        ("mixed", {"weights": [0.0, 0.0, 0.0]}, r"weights=\[0.0, 0.0, 0.0\] sum to 0; give a"),
        ("mixed", {"weights": [1.0, -1.0, 1.0]}, r"weights"),
        ("mixed", {"finals": [], "weights": []}, r"weights=\[\] sum to 0"),
        ("mixed", {"finals": [0.1, 2.0, 0.5]}, r"finals"),
        ("mixed", {"start": 0.3}, r"finals has 0.5, above exploration.start=0.3; give at most 0.3"),
        ("exponential", {"final": 0.0}, r"final"),
        ("exponential", {"start": 0.001}, r"final has 0.01, above exploration.start=0.001"),
        ("decaying_ladder", {"final_base": 0.5}, r"final_base has 0.5, above .*start_base=0.4"),
        ("redrawn", {"lowest": 0.2}, r"lowest has 0.2, above exploration.highest=0.1"),
        ("redrawn", {"lowest": 0.0}, r"lowest"),
        ("redrawn", {"count": 0}, r"count"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_one_line(name, changes, says):
    with pytest.raises(ConfigError, match=says) as caught:
        made(name, **changes)
    assert [problem.path.partition(".")[0] for problem in caught.value.problems] == ["exploration"]
    assert "\n" not in caught.value.problems[0].says
