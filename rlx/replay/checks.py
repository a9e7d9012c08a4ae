"""What is given to a replay, checked where it comes in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rlx import trees
from rlx.types import ArraySpec, Leaves

NOT_VALID = -1.0  # the priority of a row that has none


def checked_leaves(
    what: str, tree: Any, stored: Mapping[str, ArraySpec], leading: tuple[int, ...]
) -> Leaves:
    """The leaves of a rollout's tree [*leading, ...], if they are as the ring stores them."""
    leaves = {path: np.asarray(leaf) for path, leaf in trees.flatten(tree).items()}
    if leaves.keys() != stored.keys():
        raise ValueError(
            f"A rollout's {what} have the leaves {sorted(leaves)}, the replay stores "
            f"{sorted(stored)}; both must come from one spec."
        )
    for path, leaf in leaves.items():
        want = stored[path]
        if leaf.shape != (*leading, *want.shape) or leaf.dtype != want.dtype:
            raise ValueError(
                f"A rollout's {what} leaf {path} is {leaf.dtype}{list(leaf.shape)}, the replay "
                f"stores {want.dtype}{[*leading, *want.shape]}; convert it where it is made."
            )
    return leaves


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
