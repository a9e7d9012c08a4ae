"""Probabilities and entropies of single actions in float64, written from their equations."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from rlx.types import BoxSpec


def log_softmax(logits: Sequence[float], mask: Sequence[bool]) -> list[float]:
    """The logarithms of the allowed choices' probabilities; -inf of the others."""
    most = max(x for x, ok in zip(logits, mask, strict=True) if ok)
    total = sum(math.exp(x - most) for x, ok in zip(logits, mask, strict=True) if ok)
    log_total = most + math.log(total)
    return [x - log_total if ok else -math.inf for x, ok in zip(logits, mask, strict=True)]


def choice_entropy(logs: Sequence[float]) -> float:
    return -sum(math.exp(x) * x for x in logs if x > -math.inf)


def units(box: BoxSpec) -> list[tuple[float, float]]:
    """(middle, half the range) of each element; (0, 1) where it has not two bounds."""
    found = []
    for low, high in zip(box.low, box.high, strict=True):
        bounded = math.isfinite(low) and math.isfinite(high)
        found.append(((low + high) / 2, (high - low) / 2) if bounded else (0.0, 1.0))
    return found


def normal_log(draw: float, mean: float, log_deviation: float) -> float:
    """ln of the normal density at a draw."""
    deviation = math.exp(log_deviation)
    return math.log(
        math.exp(-(((draw - mean) / deviation) ** 2) / 2) / (deviation * math.sqrt(2 * math.pi))
    )


def log_cosh(x: float) -> float:
    return abs(x) + math.log1p(math.exp(-2 * abs(x))) - math.log(2)


def box_log(
    draw: Sequence[float],
    mean: Sequence[float],
    log_deviation: Sequence[float],
    box: BoxSpec,
    squashed: bool,
) -> float:
    """ln of the action's density, of its draw: |da/dx| = half (1 - tanh^2 x) = half / cosh^2 x."""
    total = 0.0
    for x, m, s, (_, half) in zip(draw, mean, log_deviation, units(box), strict=True):
        total += normal_log(x, m, s) - math.log(half)
        total += 2 * log_cosh(x) if squashed else 0.0
    return total


def box_action(draw: Sequence[float], box: BoxSpec, squashed: bool) -> np.ndarray:
    """The action that a draw makes, of the box's shape."""
    pairs = zip(draw, units(box), strict=True)
    found = [middle + half * (math.tanh(x) if squashed else x) for x, (middle, half) in pairs]
    return np.asarray(found).reshape(box.shape)


def box_entropy(log_deviation: Sequence[float], box: BoxSpec) -> float:
    """The entropy of an action that is not squashed."""
    pairs = zip(log_deviation, units(box), strict=True)
    return sum(s + 0.5 * math.log(2 * math.pi * math.e) + math.log(half) for s, (_, half) in pairs)
