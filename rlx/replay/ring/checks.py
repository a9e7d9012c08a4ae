"""What is given to a replay, checked where it comes in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rlx import trees
from rlx.types import ArraySpec, Leaves

NOT_VALID = -1.0  # the priority of a row that has none


def checked_leaves(what: str, given: Leaves, stored: Mapping[str, ArraySpec], blocks: int) -> None:
    """Raises ValueError where leaves of blocks [M, ...] below `what` are not as they are stored."""
    leaves = {path: leaf for path, leaf in given.items() if path.startswith(what)}
    wanted = {path: spec for path, spec in stored.items() if path.startswith(what)}
    if leaves.keys() != wanted.keys():
        raise ValueError(
            f"A rollout has the leaves {sorted(leaves)}, the replay stores {sorted(wanted)}; both "
            "must come from one spec."
        )
    for path, leaf in leaves.items():
        want = wanted[path]
        if leaf.shape != (blocks, *want.shape) or leaf.dtype != want.dtype:
            raise ValueError(
                f"A rollout's leaf {path} is {leaf.dtype}{list(leaf.shape)}, the replay "
                f"stores {want.dtype}{[blocks, *want.shape]}; convert it where it is made."
            )


def checked_buffers(tree: Any, batch_size: int) -> Leaves:
    """The leaves of buffers for a batch, if they hold as many sequences."""
    leaves: Leaves = trees.flatten(tree)
    for path, leaf in leaves.items():
        if len(leaf) != batch_size:
            raise ValueError(
                f"Buffer {path} holds {len(leaf)} sequences, {batch_size} are asked for; "
                f"make it by buffers({batch_size})."
            )
    return leaves


def check_priorities(keys: np.ndarray, priorities: np.ndarray) -> None:
    """Raises where they are not f32[B, T], >= 0, or finite (FloatingPointError with the keys)."""
    priorities = np.asarray(priorities)
    if priorities.ndim != 2 or len(priorities) != len(keys):
        raise ValueError(
            f"Priorities must be f32[{len(keys)}, T], one line per key, "
            f"got {list(priorities.shape)}."
        )
    bad = ~np.isfinite(priorities).all(axis=1)
    if bad.any():
        raise FloatingPointError(
            f"Priorities of the sequences with keys {np.asarray(keys)[bad].tolist()} are not "
            f"finite; look at the learner's loss and the rewards."
        )
    if ((priorities < 0) & (priorities != NOT_VALID)).any():
        least = float(priorities.min())
        raise ValueError(f"Priorities must be >= 0 (or -1 = not valid), got {least}.")
