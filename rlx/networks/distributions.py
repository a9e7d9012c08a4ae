"""Distributions over actions of every kind, as a policy's head gives their parameters.

A draw is what a distribution draws: i32[...] of one choice, i32[..., k] of k choices, f32[..., D]
of a box with D elements. `action` makes the environment's action of it. Probabilities are those
of the action in the environment's own units: a density where actions are real numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from rlx.networks.actions import middle_and_half
from rlx.types import ActionSpec, Array, ArraySpec, BoxSpec, DiscreteSpec, MultiDiscreteSpec


class Distribution(Protocol):
    """Leading axes [...] are those of the parameters; `key` is consumed."""

    def mode(self) -> Array:
        """The draw of the likeliest action; of a squashed box, that of the middle of its draws."""

    def draw(self, key: Array) -> Array: ...
    def action(self, draw: Array) -> Array:
        """The action [..., *] of a draw."""

    def log_probability(self, draw: Array) -> Array:
        """f32[...] of the draw's action."""

    def entropy(self, key: Array) -> Array:
        """f32[...]; exact, but of a squashed box, whose entropy is estimated with one draw."""


@dataclass(frozen=True)
class Categorical:
    """One choice; an action that is not allowed has a probability of 0."""

    logits: Array  # f32[..., A]

    def mode(self) -> Array:
        return jnp.argmax(self.logits, axis=-1).astype(jnp.int32)

    def draw(self, key: Array) -> Array:
        return jax.random.categorical(key, self.logits).astype(jnp.int32)

    def action(self, draw: Array) -> Array:
        return draw

    def log_probability(self, draw: Array) -> Array:
        logs = self.log_probabilities()
        return jnp.take_along_axis(logs, draw[..., None], axis=-1)[..., 0]

    def entropy(self, key: Array) -> Array:
        del key
        logs = self.log_probabilities()
        return -(jnp.exp(logs) * logs).sum(axis=-1)

    def log_probabilities(self) -> Array:
        """f32[..., A] of all actions; finite, also where an action is not allowed."""
        return jax.nn.log_softmax(self.logits)


@dataclass(frozen=True)
class Choices:
    """Several choices at once, each drawn by itself."""

    parts: tuple[Categorical, ...]

    def mode(self) -> Array:
        return jnp.stack([part.mode() for part in self.parts], axis=-1)

    def draw(self, key: Array) -> Array:
        keys = jax.random.split(key, len(self.parts))
        return jnp.stack([p.draw(k) for p, k in zip(self.parts, keys, strict=True)], axis=-1)

    def action(self, draw: Array) -> Array:
        return draw

    def log_probability(self, draw: Array) -> Array:
        each = [part.log_probability(draw[..., i]) for i, part in enumerate(self.parts)]
        return jnp.stack(each).sum(axis=0)

    def entropy(self, key: Array) -> Array:
        return jnp.stack([part.entropy(key) for part in self.parts]).sum(axis=0)


@dataclass(frozen=True)
class Normal:
    """Real numbers, each normal by itself, in units in which a box's bounds are -1 and 1.

    Squashed, an action is tanh of its draw, so it lies between the bounds. Else it may lie outside,
    and the environment is given it clipped; its probability stays that of the unclipped one.
    """

    mean: Array  # f32[..., D]
    log_deviation: Array  # f32[..., D]
    box: BoxSpec
    squashed: bool

    def mode(self) -> Array:
        return self.mean

    def draw(self, key: Array) -> Array:
        return self.at(jax.random.normal(key, self.mean.shape))

    def at(self, noise: Array) -> Array:
        """The draw that lies so many deviations f32[..., D] from the mean."""
        return self.mean + jnp.exp(self.log_deviation) * noise

    def action(self, draw: Array) -> Array:
        middle, half = middle_and_half(self.box, draw.ndim)
        unit = jnp.tanh(draw) if self.squashed else draw
        return (middle + half * unit).reshape(*draw.shape[:-1], *self.box.shape)

    def log_probability(self, draw: Array) -> Array:
        scaled = (draw - self.mean) * jnp.exp(-self.log_deviation)
        each = -0.5 * jnp.square(scaled) - self.log_deviation - 0.5 * math.log(2 * math.pi)
        return (each - self._log_stretch(draw)).sum(axis=-1)

    def entropy(self, key: Array) -> Array:
        if self.squashed:
            return -self.log_probability(self.draw(key))
        each = self.log_deviation + 0.5 * math.log(2 * math.pi * math.e)
        return (each + self._log_stretch(self.mean)).sum(axis=-1)

    def _log_stretch(self, draw: Array) -> Array:
        """ln |d action / d draw|; of tanh it is ln (1 - tanh^2 x) = 2 (ln 2 - x - ln(1 + e^-2x)).

        The latter form is exact where tanh is 1 in float32.
        """
        _, half = middle_and_half(self.box, draw.ndim)
        log_half = jnp.broadcast_to(np.log(half), draw.shape)
        if not self.squashed:
            return log_half
        return 2 * (math.log(2) - draw - jax.nn.softplus(-2 * draw)) + log_half


def draw_spec(spec: ActionSpec) -> ArraySpec:
    """The array of one draw."""
    if isinstance(spec, BoxSpec):
        return ArraySpec(shape=(len(spec.low),), dtype="float32")
    return spec.array


def is_bounded(spec: BoxSpec) -> bool:
    """Says whether every element has two bounds that differ."""
    pairs = zip(spec.low, spec.high, strict=True)
    return all(math.isfinite(low) and math.isfinite(high) and low < high for low, high in pairs)


def choices(spec: DiscreteSpec | MultiDiscreteSpec) -> tuple[int, ...]:
    """The counts of a discrete action's choices."""
    return (spec.n,) if isinstance(spec, DiscreteSpec) else spec.counts


def of_logits(spec: ActionSpec, logits: Array) -> Categorical | Choices:
    """The distribution of one choice, or of several whose logits lie side by side."""
    if isinstance(spec, DiscreteSpec):
        return Categorical(logits)
    assert isinstance(spec, MultiDiscreteSpec)
    return Choices(tuple(Categorical(part) for part in split_choices(spec.counts, logits)))


def split_choices(counts: Sequence[int], side_by_side: Array) -> list[Array]:
    """[..., sum of counts] -> [..., count] of each choice."""
    ends = np.cumsum(counts)[:-1].tolist()
    return list(jnp.split(side_by_side, ends, axis=-1))
