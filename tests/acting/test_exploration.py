"""How much each lane explores: by its place among all lanes, and by progress."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from rlx.acting.exploration import Constant, Ladder, Linear
from rlx.config.build import build

LANES = np.arange(8)
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
    "linear": (ENDS_AT_1000, [(1, 1), (0.525, 0.525), (0.05, 0.05), (0.05, 0.05)]),
    "sample": ({}, [(1, 1)] * 4),
}


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
    schedule = build(yaml.safe_load((CONF / f"{name}.yaml").read_text()) | changes, "exploration")
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
