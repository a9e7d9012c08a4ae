"""Distributions equal float64 formulas, rlax's and sums over all actions, masks and ends too."""

from __future__ import annotations

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rlax

from rlx.networks import distributions
from rlx.networks.distributions import Categorical, Choices, Normal
from rlx.networks.policies import LOG_DEVIATIONS, Policy
from rlx.types import ArraySpec, BoxSpec, DiscreteSpec, MultiDiscreteSpec
from tests.networks import formulas

pytestmark = pytest.mark.usefixtures("quickly_compiled")

KEY = jax.random.PRNGKey(0)
UNEVEN = BoxSpec(shape=(2,), low=(-2.0, 0.5), high=(3.0, 0.75))
FREE = BoxSpec(shape=(2,), low=(-math.inf, 0.0), high=(math.inf, math.inf))
TABLE = BoxSpec(shape=(2, 2), low=(-2.0, 0.0, -1.0, 5.0), high=(3.0, 1.0, 1.0, 9.0))
BOXES = [(UNEVEN, True), (UNEVEN, False), (FREE, False), (TABLE, True)]


def policy(**changes: Any) -> Policy:
    settings: dict[str, Any] = {
        "layers": (),
        "activation": "tanh",
        "gain": 1.0,
        "deviation": "state",
        "initial_deviation": 1.0,
        "squash": True,
    }
    return Policy(**settings | changes)


def normal(box: BoxSpec, squashed: bool, *leading: int, seed: int = 0) -> Normal:
    shape, rng = (*leading, len(box.low)), np.random.default_rng(seed)
    mean, log_deviation = rng.normal(size=shape), 0.5 * rng.normal(size=shape)
    return Normal(jnp.float32(mean), jnp.float32(log_deviation), box=box, squashed=squashed)


# --- choices -------------------------------------------------------------------------------------


def masked_logits(spec: DiscreteSpec | MultiDiscreteSpec) -> tuple[np.ndarray, np.ndarray, Any]:
    """(logits f32[5, P], the mask, the policy's distribution of them)."""
    rng, width = np.random.default_rng(1), sum(distributions.choices(spec))
    logits = (3 * rng.normal(size=(5, width))).astype(np.float32)
    mask = rng.random((5, width)) < 0.6
    mask[0], mask[:, ::3] = True, True  # each choice keeps an action
    return logits, mask, policy().distribution(jnp.asarray(logits), spec, jnp.asarray(mask))


def test_one_choice_equals_the_float64_formula_and_a_masked_action_has_no_probability():
    logits, mask, found = masked_logits(DiscreteSpec(n=4))
    logs, entropy = np.asarray(found.log_probabilities()), found.entropy(KEY)
    assert not mask.all()
    assert np.isfinite(logs).all()
    for i in range(5):
        expected = formulas.log_softmax(logits[i].tolist(), mask[i])
        np.testing.assert_allclose(logs[i][mask[i]], np.asarray(expected)[mask[i]], atol=1e-6)
        np.testing.assert_array_equal(np.exp(logs[i][~mask[i]]), 0)
        assert entropy[i] == pytest.approx(formulas.choice_entropy(expected), abs=1e-6)
        assert found.mode()[i] == np.argmax(expected)
    action = jnp.asarray(mask.argmax(axis=1).astype(np.int32))
    np.testing.assert_array_equal(
        found.log_probability(action), np.take_along_axis(logs, action[:, None], 1)[:, 0]
    )


def test_several_choices_are_drawn_by_themselves():
    spec = MultiDiscreteSpec(counts=(3, 2))
    logits, mask, found = masked_logits(spec)
    mode, entropy = np.asarray(found.mode()), found.entropy(KEY)
    assert mode.shape == (5, 2)
    for i in range(5):
        first = formulas.log_softmax(logits[i, :3].tolist(), mask[i, :3])
        second = formulas.log_softmax(logits[i, 3:].tolist(), mask[i, 3:])
        for a, b in itertools.product(np.flatnonzero(mask[i, :3]), np.flatnonzero(mask[i, 3:])):
            draw = jnp.tile(jnp.asarray([a, b], jnp.int32), (5, 1))
            expected = first[a] + second[b]
            assert found.log_probability(draw)[i] == pytest.approx(expected, abs=1e-5)
        together = formulas.choice_entropy(first) + formulas.choice_entropy(second)
        assert entropy[i] == pytest.approx(together, abs=1e-6)
        assert mode[i].tolist() == [np.argmax(first), np.argmax(second)]


@pytest.mark.parametrize("spec", [DiscreteSpec(n=4), MultiDiscreteSpec(counts=(3, 2))])
def test_choices_come_as_often_as_they_are_likely_and_masked_ones_never(spec):
    logits, mask, _ = masked_logits(spec)
    many = [jnp.broadcast_to(jnp.asarray(x[1]), (40_000, x.shape[1])) for x in (logits, mask)]
    drawn = np.asarray(policy().distribution(many[0], spec, many[1]).draw(KEY))
    assert drawn.dtype == np.int32
    begin = 0
    for i, n in enumerate(distributions.choices(spec)):
        own = slice(begin, begin + n)
        counts = np.bincount(drawn.reshape(40_000, -1)[:, i], minlength=n) / 40_000
        chances = np.exp(formulas.log_softmax(logits[1, own].tolist(), mask[1, own]))
        np.testing.assert_allclose(counts, chances, atol=0.015)
        np.testing.assert_array_equal(counts[~mask[1, own]], 0)
        begin += n


def test_choices_know_nothing_of_each_other():
    even = jnp.zeros((40_000, 4))
    drawn = np.asarray(distributions.of_logits(MultiDiscreteSpec(counts=(2, 2)), even).draw(KEY))
    assert abs(np.corrcoef(drawn.T.astype(float))[0, 1]) < 0.02


def test_gradients_of_masked_choices_are_finite_and_0():
    logits, mask, _ = masked_logits(DiscreteSpec(n=4))
    action = jnp.asarray(mask.argmax(axis=1).astype(np.int32))

    def told(logits: Any) -> Any:
        found = policy().distribution(logits, DiscreteSpec(n=4), jnp.asarray(mask))
        return (found.log_probability(action) + found.entropy(KEY)).sum()

    slope = np.asarray(jax.grad(told)(jnp.asarray(logits)))
    assert np.isfinite(slope).all()
    np.testing.assert_array_equal(slope[~mask], 0)
    assert (slope[mask] != 0).any()


def test_logits_of_every_kind_of_choice_are_split_where_choices_end():
    found = distributions.of_logits(MultiDiscreteSpec(counts=(1, 3, 2)), jnp.arange(6.0)[None])
    assert isinstance(found, Choices)
    sizes = [part.logits.tolist() for part in found.parts]
    assert sizes == [[[0.0]], [[1.0, 2.0, 3.0]], [[4.0, 5.0]]]
    assert isinstance(distributions.of_logits(DiscreteSpec(n=6), jnp.arange(6.0)), Categorical)


# --- real numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize(("box", "squashed"), BOXES)
def test_real_actions_equal_the_float64_formula(box, squashed):
    found = normal(box, squashed, 6)
    draw = jnp.asarray(np.random.default_rng(2).normal(size=found.mean.shape), jnp.float32)
    logs, actions = found.log_probability(draw), found.action(draw)
    assert actions.shape == (6, *box.shape)
    for i in range(6):
        x, mean, deviation = (
            np.asarray(one[i], np.float64).tolist()
            for one in (draw, found.mean, found.log_deviation)
        )
        expected = formulas.box_log(x, mean, deviation, box, squashed)
        assert logs[i] == pytest.approx(expected, rel=1e-5, abs=1e-5)
        np.testing.assert_allclose(
            actions[i], formulas.box_action(x, box, squashed), rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(
            found.action(found.mode())[i], formulas.box_action(mean, box, squashed), atol=1e-5
        )
        if not squashed:
            entropy = formulas.box_entropy(deviation, box)
            assert found.entropy(KEY)[i] == pytest.approx(entropy, abs=1e-5)


@pytest.mark.parametrize("squashed", [True, False])
@pytest.mark.parametrize(("low", "high"), [(-2.0, 3.0), (0.5, 0.75)])
def test_the_density_of_an_action_integrates_to_1(low, high, squashed):
    """The sum is over actions, with the draw that makes each, by the midpoint rule."""
    box = BoxSpec(shape=(1,), low=(low,), high=(high,))
    found = Normal(jnp.asarray([0.3]), jnp.asarray([-0.5]), box=box, squashed=squashed)
    beyond = 0.0 if squashed else 3 * (high - low)
    edges = np.linspace(low - beyond, high + beyond, 200_001)
    middles = (edges[1:] + edges[:-1]) / 2
    unit = (middles - (low + high) / 2) / ((high - low) / 2)
    draw = np.arctanh(unit) if squashed else unit
    wide = Normal(
        jnp.broadcast_to(found.mean, (200_000, 1)),
        jnp.broadcast_to(found.log_deviation, (200_000, 1)),
        box=box,
        squashed=squashed,
    )
    density = np.exp(np.asarray(wide.log_probability(jnp.float32(draw)[:, None]), np.float64))
    assert (density * np.diff(edges)).sum() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("x", [20.0, -20.0, 8.5, -60.0])
def test_the_correction_of_tanh_stays_exact_where_tanh_is_1_in_float32(x):
    box = BoxSpec(shape=(1,), low=(-2.0,), high=(3.0,))
    found = Normal(jnp.asarray([x]), jnp.asarray([0.0]), box=box, squashed=True)
    draw = jnp.asarray([x + 0.5])
    expected = formulas.box_log([x + 0.5], [x], [0.0], box, True)
    assert found.log_probability(draw) == pytest.approx(expected, rel=1e-6)
    slope = jax.grad(lambda d: found.log_probability(d))(draw)
    np.testing.assert_allclose(slope, [-0.5 + 2 * math.tanh(x + 0.5)], rtol=1e-5)
    assert -2 <= found.action(draw)[0] <= 3


@pytest.mark.parametrize(("box", "squashed"), BOXES)
def test_draws_have_the_mean_deviation_and_entropy_that_they_should(box, squashed):
    one = normal(box, squashed)
    many = (20_000, len(box.low))
    wide = Normal(
        jnp.broadcast_to(one.mean, many),
        jnp.broadcast_to(one.log_deviation, many),
        box=box,
        squashed=squashed,
    )
    draw = np.asarray(wide.draw(KEY))
    np.testing.assert_allclose(draw.mean(axis=0), one.mean, atol=0.06)
    np.testing.assert_allclose(draw.std(axis=0), np.exp(one.log_deviation), rtol=0.03)
    sampled = -np.asarray(wide.log_probability(jnp.asarray(draw)))
    told = np.asarray(wide.entropy(jax.random.PRNGKey(1)))
    assert told.mean() == pytest.approx(sampled.mean(), abs=0.06)
    if squashed:  # an estimate with a draw of its own
        assert told.std() > 0.1
        actions = np.asarray(wide.action(jnp.asarray(draw))).reshape(many)
        assert (actions >= np.asarray(box.low) - 1e-6).all()
        assert (actions <= np.asarray(box.high) + 1e-6).all()


def test_gradients_flow_through_draws():
    """An action moves with its mean by da/dx, and with ln deviation by da/dx * (x - mean)."""
    box, mean, log_deviation = UNEVEN, jnp.asarray([0.3, -0.2]), jnp.asarray([-0.5, 0.1])

    def action(mean: Any, log_deviation: Any) -> Any:
        found = Normal(mean, log_deviation, box=box, squashed=True)
        return found.action(found.draw(KEY)).sum()

    by_mean, by_deviation = jax.grad(action, argnums=(0, 1))(mean, log_deviation)
    draw = np.asarray(Normal(mean, log_deviation, box=box, squashed=True).draw(KEY), np.float64)
    half = np.asarray([half for _, half in formulas.units(box)])
    stretch = half / np.cosh(draw) ** 2
    np.testing.assert_allclose(by_mean, stretch, rtol=1e-5)
    np.testing.assert_allclose(by_deviation, stretch * (draw - np.asarray(mean)), rtol=1e-4)


@pytest.mark.parametrize("bounds", [None, (-2.0, 3.0)])
def test_squashed_actions_equal_rlax(bounds):
    """rlax takes tanh of what it is given as the mean, and exp(tanh) of it as the deviation."""
    low, high = bounds or (-1.0, 1.0)
    box = BoxSpec(shape=(2,), low=(low, low), high=(high, high))
    given = np.random.default_rng(3).normal(size=(2, 5, 2)).astype(np.float32)
    mean, log_deviation = np.tanh(given[0]), -2 + 2 * (np.tanh(given[1]) + 1)
    found = Normal(jnp.asarray(mean), jnp.asarray(log_deviation - 2), box=box, squashed=True)
    with pytest.warns(PendingDeprecationWarning):
        known = rlax.squashed_gaussian(sigma_min=-4, sigma_max=0)
    draw = found.draw(KEY)
    spec = None if bounds is None else Bounds(minimum=low, maximum=high)
    expected = known.logprob(found.action(draw), given[0], given[1], spec)
    np.testing.assert_allclose(found.log_probability(draw), expected, rtol=2e-3, atol=2e-3)


class Bounds:
    """rlax reads these of an action spec."""

    def __init__(self, minimum: float, maximum: float) -> None:
        self.minimum, self.maximum = minimum, maximum


# --- policies ------------------------------------------------------------------------------------


def test_parameters_of_a_box_are_means_then_limited_deviations():
    parameters = jnp.asarray([[0.1, 0.2, -50.0, 50.0]])
    found = policy().distribution(parameters, UNEVEN, None)
    assert isinstance(found, Normal)
    np.testing.assert_allclose(found.mean, [[0.1, 0.2]])
    np.testing.assert_allclose(found.log_deviation, [LOG_DEVIATIONS])


@pytest.mark.parametrize("at", [-50.0, 0.3, 50.0])
def test_a_deviation_beyond_its_limits_can_come_back(at):
    """Clipped alone it would have no gradient there, and would stay for ever."""

    def limited(x: Any) -> Any:
        found = policy().distribution(jnp.stack([0.0, 0.0, x, 2 * x]), UNEVEN, None)
        assert isinstance(found, Normal)
        return found.log_deviation.sum()

    assert jax.grad(limited)(at) == pytest.approx(3)


@pytest.mark.parametrize("deviation", ["free", "state"])
def test_a_fresh_policy_has_the_initial_deviation_where_its_features_are_0(deviation):
    head = policy(deviation=deviation, initial_deviation=0.3, layers=(4,))
    features = jnp.zeros((3, 7))
    params = head.init(KEY, features, UNEVEN, jnp.float32)
    told = head.apply(params, features, UNEVEN, jnp.float32)
    np.testing.assert_allclose(told, [[0, 0, math.log(0.3), math.log(0.3)]] * 3, rtol=1e-6)
    moved = head.apply(params, features + 1, UNEVEN, jnp.float32)
    same = np.allclose(moved[:, 2:], told[:, 2:])
    assert same == (deviation == "free")


def test_a_draw_of_a_box_is_flat_and_bounds_are_told_from_none():
    assert distributions.draw_spec(TABLE) == ArraySpec(shape=(4,), dtype="float32")
    assert distributions.draw_spec(MultiDiscreteSpec(counts=(3, 2))).shape == (2,)
    assert distributions.is_bounded(TABLE)
    assert not distributions.is_bounded(FREE)
    flat = BoxSpec(shape=(1,), low=(1.0,), high=(1.0,))
    assert not distributions.is_bounded(flat)
