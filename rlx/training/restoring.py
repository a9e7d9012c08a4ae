"""Gives the parts of a resumed run what a checkpoint holds."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rlx.interfaces import Peers
from rlx.problems import first_line, refuse
from rlx.replay.files.experience import env_differences
from rlx.replay.files.segments import SegmentError
from rlx.training.checkpoint import Checkpointer
from rlx.training.checkpoint_files import CheckpointError, Restored
from rlx.training.learner import OpenLearner
from rlx.training.shares import share_folder

log = logging.getLogger(__name__)

OF_THE_RUN = ("env_steps", "frames", "updates", "wall_s", "finished", "evaluation_return")


NUMBER = (int, float)
OF_EVERY_RUN: Mapping[str, Any] = {  # in the meta.json of a run's checkpoint, with their types
    **{"env_steps": int, "frames": int, "updates": int, "wall_s": NUMBER, "chain": int},
    **{"metrics": dict, "quota": dict, "finished": bool},
}


def check_meta(restored: Restored) -> Restored:
    """The same checkpoint; raises CheckpointError if it does not count what a run counts."""
    meta, path = restored.meta, restored.path / "meta.json"
    wrong = [name for name, kind in OF_EVERY_RUN.items() if not _is(meta.get(name), kind)]
    if not wrong:
        metrics, quota = meta["metrics"], meta["quota"]
        window, means = metrics.get("window"), _values(metrics.get("means"))
        are_whole = _are_windows(window)
        are_whole = are_whole and all(_are_numbers(mean, (2,)) for mean in means)
        tasks, actions = metrics.get("tasks", {}), metrics.get("actions", [])
        are_whole = (
            are_whole
            and all(_are_windows(w) for w in _values(tasks))
            and (isinstance(actions, list) and all(_is(value, NUMBER) for value in actions))
        )
        wrong += ["metrics"] if not are_whole or not _is(metrics.get("episodes"), int) else []
        counts = [quota.get(name) for name in ("opened_at", "trained_rows")]
        later = [quota.get(name, 0) for name in ("changed_at", "earned_rows")]  # some lack them
        are_counts = all(_is(count, int) for count in counts) and all(_is(n, NUMBER) for n in later)
        wrong += [] if are_counts else ["quota"]
    hooks = meta.get("hooks", [])
    if not isinstance(hooks, list) or not all(_is_hook(each) for each in hooks):
        wrong.append("hooks")
    if "evaluation_return" in meta and not _is(meta["evaluation_return"], (*NUMBER, type(None))):
        wrong.append("evaluation_return")
    if "total_env_steps" in meta and not _is(meta["total_env_steps"], int):
        wrong.append("total_env_steps")
    if wrong:
        raise CheckpointError(f"{path}: damaged: it has no {wrong[0]} of a run.")
    return restored


def _is(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _are_numbers(value: Any, count: tuple[int, ...]) -> bool:
    return isinstance(value, list) and len(value) in count and all(_is(v, NUMBER) for v in value)


def _are_windows(window: Any) -> bool:
    return isinstance(window, list) and all(_are_numbers(ended, (2, 3)) for ended in window)


def _is_hook(saved: Any) -> bool:
    return isinstance(saved, dict) and isinstance(saved.get("state", {}), dict)


def _values(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else [None]


def restore_replay(replay: Any, resumed: Restored, env: Mapping[str, Any]) -> None:
    """Gives the replay what the checkpoint has of it; raises ConfigError if it does not fit.

    env: the settings of the environment; rows that came from others are told.
    """
    if resumed.replay_state is None:
        return
    try:
        _tell_of_other_envs(resumed.replay_state, env)
        replay.restore(resumed.replay_state, resumed.replay_blocks())
    except KeyError as error:
        says = f"the saved replay was of another kind (it has no {error}); choose that one"
        raise refuse("resume", says) from error
    except (ValueError, SegmentError) as error:
        raise refuse("resume", str(error)) from error
    except (TypeError, AttributeError, IndexError, OverflowError) as error:
        says = f"{resumed.path}: its replay is damaged ({first_line(error)}); "
        says += "checkpoint.replay=false fills it anew"
        raise refuse("resume", says) from error


def _tell_of_other_envs(state: Mapping[str, Any], env: Mapping[str, Any]) -> None:
    for before in json.loads(state.get("envs", "[]")):  # none: saved by an earlier rlx
        if found := env_differences(before, env):
            says = "the saved replay may have rows of %s; they are read as if they were of this "
            log.warning(says + "environment; checkpoint.replay=false fills it anew", found)


def check_total(total_env_steps: int, resumed: Restored) -> None:
    """Raises ConfigError for a total that was lowered below what the run has made already."""
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
            restored = check_meta(checkpoints.restore(like, with_replay=with_replay))
        chosen = peers.exchange(restored.path.name if restored else "")[0]
        if restored is None:
            path = checkpoints.folder / chosen
            restored = check_meta(checkpoints.restore(like, path, with_replay=False))
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
