"""Gives the parts of a resumed run what a checkpoint holds."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from rlx.interfaces import Peers
from rlx.problems import refuse
from rlx.training.checkpoint import Checkpointer
from rlx.training.checkpoint_files import CheckpointError, Restored
from rlx.training.learner import OpenLearner
from rlx.training.shares import share_folder

log = logging.getLogger(__name__)

OF_THE_RUN = ("env_steps", "frames", "updates", "wall_s", "finished", "evaluation_return")


def restore_replay(replay: Any, resumed: Restored) -> None:
    """Gives the replay what the checkpoint has of it; raises ConfigError if it does not fit."""
    if resumed.replay_state is None:
        return
    try:
        replay.restore(resumed.replay_state, resumed.replay_blocks())
    except ValueError as error:
        raise refuse("resume", str(error)) from error
    except KeyError as error:
        says = f"the saved replay was of another kind (it has no {error}); choose that one"
        raise refuse("resume", says) from error


def check_total(total_env_steps: int, resumed: Restored | None) -> None:
    """Raises ConfigError for a total that was lowered below what the run has made already."""
    if resumed is None:
        return
    before = resumed.meta.get("total_env_steps", total_env_steps)
    if total_env_steps < min(before, resumed.env_steps):
        says = f"the run has made {resumed.env_steps:,} env steps already; give at least as many"
        raise refuse("total_env_steps", says, given=str(total_env_steps))


def restore_learner(
    output_dir: Path, learner: OpenLearner, peers: Peers, with_replay: bool
) -> Restored:
    """The newest checkpoint of process 0, and of each other process its own part of it."""
    checkpoints, like = Checkpointer(output_dir, None), learner.state()
    try:
        restored: Restored | None = None
        if peers.rank == 0:
            restored = checkpoints.restore(like, with_replay=with_replay)
        chosen = peers.exchange(restored.path.name if restored else "")[0]
        if restored is None:
            path = checkpoints.folder / chosen
            restored = checkpoints.restore(like, path, with_replay=False)
            restored = _own_part(share_folder(output_dir, peers.rank), restored, with_replay)
    except CheckpointError as error:
        raise refuse("resume", str(error)) from error
    saved_by = restored.meta.get("processes", 1)
    if restored.replay_state is not None and saved_by != peers.count:
        says = f"the replay was saved in parts by {saved_by} learner processes, now {peers.count}; "
        raise refuse("resume", says + "use as many, or checkpoint.replay=false to fill it anew")
    learner.restore(restored.state)
    log.info("resuming from %s", restored.path)
    return restored


def _own_part(folder: Path, restored: Restored, with_replay: bool) -> Restored:
    """The checkpoint with this process's own part, if the process was there then."""
    checkpoints = Checkpointer(folder, None)
    path = checkpoints.folder / restored.path.name
    try:  # the training state is one
        own = checkpoints.restore({}, path, with_replay=with_replay)
    except CheckpointError as error:
        if with_replay:
            log.warning("%s This process's part of the replay is filled anew.", error)
        return restored
    run = {name: restored.meta[name] for name in OF_THE_RUN}
    return dataclasses.replace(
        restored,
        meta=own.meta | run,
        replay_state=own.replay_state,
        segments=own.segments,
        path=path,
    )
