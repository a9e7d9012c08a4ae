"""Keeps updates and environments' answers that are not finite, for inspection."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from rlx import trees
from rlx.problems import RunFailed
from rlx.replay.files.segments import write_segment
from rlx.types import Batch, Cut

log = logging.getLogger(__name__)

FOLDER = "nonfinite"
MOST = 10  # batches and answers kept


class NonFinite(RunFailed):
    """An update without a finite loss or gradient, which changed nothing."""

    is_worth_saving = True

    def __init__(self, path: Path | None) -> None:
        where = f"its batch is in {path}" if path else f"see {FOLDER}/ of the run"
        super().__init__(
            f"an update's loss or gradients are not finite; it changed nothing, {where}. Look at "
            "the rewards and the learning rate, or set learner.on_nonfinite=skip"
        )


class NonFiniteAnswer(RunFailed):
    """An environment's answer that is not finite; its episode was cut before it."""

    is_worth_saving = True

    def __init__(self, env_id: str, cut: Cut, path: Path | None) -> None:
        where = f" (kept in {path})" if path else ""
        super().__init__(
            f"env.id={env_id!r}, {cut}{where}. Mend the environment, or set "
            "learner.on_nonfinite=skip, which cuts such episodes and goes on"
        )


def keep_batch(run: Path, keys: np.ndarray, batch: Batch | None) -> Path | None:
    """Writes a batch, by leaf, as an .npz file; returns its path, None if enough are kept."""
    if batch is None:
        return None
    leaves = {name: np.asarray(leaf) for name, leaf in trees.flatten(batch).items()}
    return _keep(run, {"key": keys, **leaves})


def keep_answer(run: Path, cut: Cut) -> Path | None:
    """Writes an environment's answer as an .npz file; returns its path, None if enough are kept."""
    at = {"lane": np.asarray(cut.lane), "env_step": np.asarray(cut.env_step)}
    return _keep(run, at | dict(cut.answer))


def _keep(run: Path, arrays: Mapping[str, np.ndarray]) -> Path | None:
    folder = run / FOLDER
    try:
        number = len(list(folder.glob("*.npz"))) if folder.is_dir() else 0
        if number >= MOST:
            return None
        folder.mkdir(exist_ok=True)
        path = folder / f"{number}.npz"
        write_segment(path, arrays, {"kind": "nonfinite"})
    except OSError as error:  # what it is told of matters more
        log.error("%s cannot be written: %s", folder, error)
        return None
    return path
