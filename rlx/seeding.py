"""One seed, named branches: `spawn(seed, "actor", 3)` never collides with another path."""

from __future__ import annotations

import functools
import hashlib

import numpy as np

GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def spawn(seed: int, *path: str | int) -> np.random.SeedSequence:
    """The seed sequence of a named branch of the run's seed (the same on every machine)."""
    digest = hashlib.sha256(repr(path).encode()).digest()
    words = [int.from_bytes(digest[i : i + 4], "little") for i in range(0, 16, 4)]
    return np.random.SeedSequence(seed, spawn_key=words)


def spawn_int(seed: int, *path: str | int) -> int:
    """A non-negative int32 of that branch, for libraries that take one integer."""
    return int(spawn(seed, *path).generate_state(1)[0] >> 1)


def spawn_rng(seed: int, *path: str | int) -> np.random.Generator:
    """A NumPy generator of that branch (PCG64: its state is JSON, for checkpoints)."""
    return np.random.Generator(np.random.PCG64(spawn(seed, *path)))


def uniforms(seed: int, name: str, *counters: np.ndarray) -> np.ndarray:
    """Numbers f64[n] in [0, 1) of a branch, one for each n-tuple of counters, ints [n] >= 0.

    A number depends on its own counters alone, not on when or beside which others it is asked for.
    """
    state: np.ndarray = _word(seed, name)
    for counter in counters:
        state = split_mix(state, counter)
    return (state >> np.uint64(11)) * 2.0**-53


def split_mix(state: np.ndarray, counter: np.ndarray) -> np.ndarray:
    """Number `counter` [n] >= 0 of the stream that SplitMix64 makes from a state u64[n] or u64[1].

    Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators".
    """
    z = state + np.uint64(GOLDEN) * (counter.astype(np.uint64) + np.uint64(1))
    z = (z ^ (z >> np.uint64(30))) * np.uint64(FIRST)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(SECOND)
    return z ^ (z >> np.uint64(31))


@functools.lru_cache(maxsize=16)
def _word(seed: int, name: str) -> np.ndarray:
    """The state u64[1] that a branch's numbers begin with."""
    return spawn(seed, name).generate_state(1, np.uint64)
