"""One seed, named branches: `spawn(seed, "actor", 3)` never collides with another path."""

from __future__ import annotations

import hashlib

import numpy as np


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
