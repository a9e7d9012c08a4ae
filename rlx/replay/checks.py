"""What is given to a replay, checked where it comes in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rlx import trees
from rlx.types import ArraySpec, Leaves

NOT_VALID = -1.0  # the TD of a row that has none


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


def check_td(keys: np.ndarray, td: np.ndarray) -> None:
    """Raises where td is not f32[B, T], finite (FloatingPointError, naming the keys), absolute."""
    td = np.asarray(td)
    if td.ndim != 2 or len(td) != len(keys):
        raise ValueError(
            f"TD errors must be f32[{len(keys)}, T], one line per key, got {list(td.shape)}."
        )
    bad = ~np.isfinite(td).all(axis=1)
    if bad.any():
        raise FloatingPointError(
            f"TD errors of the sequences with keys {np.asarray(keys)[bad].tolist()} are not "
            f"finite; look at the learner's loss and the rewards."
        )
    if ((td < 0) & (td != NOT_VALID)).any():
        raise ValueError(f"TD errors must be absolute (or -1 = not valid), got {float(td.min())}.")
