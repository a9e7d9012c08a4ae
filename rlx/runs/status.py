"""Writes what a run says of itself now (status.json) and at its end (summary.json)."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from rlx import trees
from rlx.runs.files import clean, write_json
from rlx.runs.folders import STATUS_FILE, SUMMARY_FILE
from rlx.types import Params

JSON = dict[str, Any]
State = Literal["starting", "running", "finished", "interrupted", "failed"]


def write_status(
    output_dir: Path | str,
    state: State,
    row: Mapping[str, Any] | None = None,
    error: str | None = None,
) -> None:
    """Writes status.json: what the run does now, with the counters and rates of its last row.

    `error`: the last line of what went wrong.
    """
    if state not in get_args(State):
        raise ValueError(f"state={state!r}: must be one of {', '.join(get_args(State))}.")
    row = row or {}
    counters = {name: row.get(name) for name in ("env_steps", "frames", "updates", "wall_s")}
    rates = {
        "env_steps_per_s": row.get("acting/env_steps_per_s"),
        "updates_per_s": row.get("learner/updates_per_s"),
    }
    about = {
        "train_return": row.get("train/return_mean"),
        "pid": os.getpid(),
        "host": platform.node(),
        "updated_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "error": error,
    }
    write_json(Path(output_dir) / STATUS_FILE, {"state": state} | counters | rates | about)


def write_summary(
    output_dir: Path | str,
    *,
    state: State,
    env_steps: int,
    frames: int,
    updates: int,
    wall_s: float,
    train_return: float | None,
    evaluation_return: float | None,
    params_sha256: str,
    checkpoint: Path | str | None,
) -> JSON:
    """Writes summary.json, what a run came to, and returns it."""
    summary: JSON = {
        "state": state,
        "env_steps": env_steps,
        "frames": frames,
        "updates": updates,
        "wall_s": wall_s,
        "train_return": train_return,
        "evaluation_return": evaluation_return,
        "params_sha256": params_sha256,
        "checkpoint": checkpoint,
    }
    summary = clean(summary)
    write_json(Path(output_dir) / SUMMARY_FILE, summary)
    return summary


def params_sha256(params: Params) -> str:
    """A fingerprint of parameters: over the paths, dtypes, shapes and bytes of their leaves."""
    digest = hashlib.sha256()
    for path, leaf in sorted(trees.flatten(params).items()):
        array = np.asarray(leaf)
        digest.update(json.dumps([path, str(array.dtype), list(array.shape)]).encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
