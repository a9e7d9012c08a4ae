"""Makes the storage that a ring's settings ask for."""

from __future__ import annotations

import numpy as np

from rlx.replay.ring.block_spec import BlockSpec
from rlx.replay.ring.storage import (
    WORTH_COMPRESSING,
    Arrays,
    Compressed,
    MappedFile,
    Spread,
    Storage,
    Storing,
    images,
)


def make_storage(storing: Storing, spec: BlockSpec, slots: int) -> Storage:
    """The storage of these settings; raises ValueError where they cannot be had."""
    if storing.compress == "lz4":
        return _compressed(storing, spec, slots)
    if storing.storage == "device":
        from rlx.replay.ring.device import DeviceArrays  # loads JAX

        return DeviceArrays(spec, slots, storing.device)
    allocate = np.zeros if storing.storage == "memory" else MappedFile(storing.folder).zeros
    return Arrays(spec, slots, allocate=allocate, spread=Spread(storing.gather_threads))


def _compressed(storing: Storing, spec: BlockSpec, slots: int) -> Compressed:
    if storing.storage != "memory":
        raise ValueError("replay.compress=lz4 needs replay.storage=memory.")
    if not images(spec):
        raise ValueError(
            "replay.compress=lz4 is for images (uint8 observations of "
            f"{WORTH_COMPRESSING} bytes a block or more); there are none: set none."
        )
    return Compressed(spec, slots, spread=Spread(storing.gather_threads), shards=storing.shards)
