"""Checks a ring's saved state, and writes its blocks back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from rlx.replay.ring.block_spec import NEXT, BlockSpec
from rlx.replay.ring.index import BlockIndex
from rlx.replay.ring.storage import Storage
from rlx.types import Blocks

ANEW = "with checkpoint.replay=false to fill a new one"


def layout(spec: BlockSpec, slots: int, lanes: int) -> str:
    """JSON of all that a saved state depends on."""
    return json.dumps(
        {
            "slots": slots,
            "lanes": lanes,
            "sequence": asdict(spec.sequence),
            "leaves": {path: [list(leaf.shape), leaf.dtype] for path, leaf in spec.leaves.items()},
        },
        sort_keys=True,
    )


def check_layout(saved: str, now: str) -> None:
    """Raises ValueError where two layouts differ, and says in what."""
    if saved == now:
        return
    a, b = json.loads(saved), json.loads(now)
    its, mine = a.pop("leaves"), b.pop("leaves")
    if a == b and its == {path: leaf for path, leaf in mine.items() if not path.startswith(NEXT)}:
        raise ValueError(
            "the saved replay does not hold the input after each block's last row, which sequences "
            f"that end with a block now need (it was saved by an earlier rlx); resume {ANEW}"
        )
    paths = [path for path in sorted({*its, *mine}) if its.get(path) != mine.get(path)]
    found = [f"{name} {a[name]}, now {b[name]}" for name in a if a[name] != b[name]]
    found += [f"{p} {its.get(p, 'missing')}, now {mine.get(p, 'missing')}" for p in paths[:4]]
    raise ValueError(
        f"the saved replay has another layout ({'; '.join(found)}); resume with the settings "
        f"it was saved with, or {ANEW}"
    )


def check_shards(state: Mapping[str, Any], count: int) -> None:
    """Raises ValueError for the state of another number of rings."""
    if (saved := state.get("shards", 1)) != count:
        raise ValueError(
            f"the saved replay has {saved} shards, now {count}; resume with as many "
            f"(on devices: learner.devices), or {ANEW}"
        )


def check_found(found: int, live: int) -> None:
    """Raises ValueError where blocks of the tables were not among those that were read."""
    if found != live:
        raise ValueError(
            f"the saved replay has {live} blocks, {found} were found: it is damaged; resume {ANEW}"
        )


def write_blocks(blocks: Blocks, index: BlockIndex, storage: Storage) -> int:
    """Writes those that the index names; answers how many."""
    live = np.flatnonzero(index.are_live(blocks.keys))
    for run in np.split(live, np.flatnonzero(np.diff(blocks.keys[live]) != 1) + 1):
        if run.size:
            leaves = {path: leaf[as_slice(run)] for path, leaf in blocks.leaves.items()}
            storage.write(int(blocks.keys[run[0]]) % index.slots, leaves)
    return len(live)


def as_slice(indices: np.ndarray) -> Any:
    """The same indices as a slice where they have no gap: a view instead of a copy."""
    if indices[-1] - indices[0] + 1 == len(indices):
        return slice(int(indices[0]), int(indices[-1]) + 1)
    return indices
