"""Updates whose loss or gradients are not finite: their batches are kept for inspection."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from rlx import trees
from rlx.problems import RunFailed
from rlx.replay.files.segments import write_segment
from rlx.types import Batch

log = logging.getLogger(__name__)

FOLDER = "nonfinite"
MOST = 10  # batches kept


class NonFinite(RunFailed):
    """An update without a finite loss or gradient, which changed nothing."""

    is_worth_saving = True

    def __init__(self, path: Path | None) -> None:
        where = f"its batch is in {path}" if path else f"see {FOLDER}/ of the run"
        super().__init__(
            f"an update's loss or gradients are not finite; it changed nothing, {where}. Look at "
            "the rewards and the learning rate, or set learner.on_nonfinite=skip"
        )


def keep_batch(run: Path, keys: np.ndarray, batch: Batch | None) -> Path | None:
    """Writes a batch, by leaf, as an .npz file; returns its path, None if enough are kept."""
    folder = run / FOLDER
    number = len(list(folder.glob("*.npz"))) if folder.is_dir() else 0
    if batch is None or number >= MOST:
        return None
    folder.mkdir(exist_ok=True)
    path = folder / f"{number}.npz"
    leaves = {name: np.asarray(leaf) for name, leaf in trees.flatten(batch).items()}
    try:
        write_segment(path, {"key": keys, **leaves}, {"kind": "nonfinite"})
    except OSError as error:  # what it is told of matters more
        log.error("%s cannot be written: %s", path, error)
        return None
    return path
