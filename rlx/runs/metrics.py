"""What a run writes about itself: metrics.jsonl, TensorBoard events, status.json, summary.json.

A row of metrics.jsonl is written every so many env steps, by count and never by time, so that two
runs of one seed write the same rows, aside from the names that `is_wall_clock` knows. Counts are
env steps, frames and updates, as the names say; `_s` is seconds, `_per_s` per second.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, Literal, get_args

import numpy as np

from rlx import trees
from rlx.runs.boards import open_boards
from rlx.runs.folders import METRICS_FILE, STATUS_FILE, SUMMARY_FILE, parse_row
from rlx.types import Episode, Params, Range

log = logging.getLogger(__name__)

JSON = dict[str, Any]
State = Literal["starting", "running", "finished", "interrupted", "failed"]

DISCARDED_FILE = "metrics.discarded.jsonl"

# Every row has these names, null where there is nothing to tell, in this order; others follow.
NAMES: Mapping[str, str] = {
    "env_steps": "env steps made by the run",
    "frames": "emulator frames seen by the run",
    "updates": "gradient steps made by the run",
    "wall_s": "seconds since the run began, without the time it was stopped",
    "train/return_mean": "mean unclipped return of the last logging.window_episodes episodes",
    "train/length_mean": "mean length of those episodes, env steps",
    "train/episodes": "episodes finished by the run",
    "evaluation/return_mean": "mean unclipped return of an evaluation in this interval",
    "acting/env_steps_per_s": "env steps per second over the interval",
    "learner/updates_per_s": "updates per second over the interval",
    "learner/loss": "mean over the interval's finite updates",
    "learner/grad_norm": "mean over the interval's finite updates, before clipping",
    "learner/q_mean": "mean over the interval's updates of the Q of the actions taken",
    "replay/fill": "rows stored / capacity, 0 .. 1",
    "replay/ratio": "rows trained / env steps added since the account was opened",
    "replay/age_updates": "updates between a sampled sequence's weights and the learner's",
    "weights/age_updates": "updates between the acting weights and the learner's",
}

# The only names whose values differ between two runs of one seed: they come from a clock.
WALL_CLOCK_PREFIXES = ("wall_s", "time/", "learner/device_busy")
WALL_CLOCK_SUFFIXES = ("_s",)  # seconds, and with them every `_per_s`

# Values that wait for one name before the oldest are converted: bounds memory, and half of them
# are by then so many updates old that the device has long finished them.
PENDING_LIMIT = 1024


@dataclass(frozen=True, kw_only=True)
class Logging:
    """What is written and shown, and how often (conf/logging)."""

    every_env_steps: Annotated[int, Range(ge=1)]
    window_episodes: Annotated[int, Range(ge=1)]
    tensorboard: bool
    wandb: str | None
    console: Literal["auto", "rich", "plain", "off"]
    console_every_s: Annotated[float, Range(ge=0)]

    def __post_init__(self) -> None:
        if self.wandb is not None and find_spec("wandb") is None:
            raise ValueError(
                f"logging.wandb={self.wandb}, but wandb is not installed; "
                "pip install 'rlx[wandb]', or set logging.wandb=null."
            )


def is_wall_clock(name: str) -> bool:
    """Whether a metric comes from a clock, so that a repeated run differs in it."""
    return name.startswith(WALL_CLOCK_PREFIXES) or name.endswith(WALL_CLOCK_SUFFIXES)


def without_wall_clock(row: Mapping[str, Any]) -> JSON:
    """The part of a row that two runs of one seed share to the last byte."""
    return {name: value for name, value in row.items() if not is_wall_clock(name)}


# --- rows ----------------------------------------------------------------------------------------


class Metrics:
    """Gathers values between two rows and writes the rows. For one thread."""

    def __init__(
        self, output_dir: Path | str, settings: Logging, resume_env_steps: int | None
    ) -> None:
        """`resume_env_steps`: env steps of the checkpoint continued from; None: a new run.

        Rows of a later time (all rows, in a new run) move to metrics.discarded.jsonl.
        """
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        kept = discard_rows_after(folder, resume_env_steps)
        self.last_row: JSON | None = kept[-1] if kept else None
        self._file = (folder / METRICS_FILE).open("ab", buffering=0)  # one row is one write
        self._means: dict[str, _Mean] = {}
        self._window: deque[tuple[float, int]] = deque(maxlen=settings.window_episodes)
        self._episodes = (self.last_row or {}).get("train/episodes") or 0
        self._boards = open_boards(
            folder,
            tensorboard=settings.tensorboard,
            wandb=settings.wandb,
            resume_env_steps=resume_env_steps,
        )

    def episodes(self, episodes: Iterable[Episode]) -> None:
        """Takes finished episodes, in the order in which they ended."""
        for episode in episodes:
            self._window.append((float(episode.ret), int(episode.env_steps)))
            self._episodes += 1

    def record(self, name: str, value: Any) -> None:
        """Adds a number, or an array of which the mean counts, to the interval's mean.

        A device array is kept as it is and read when the row is written: recording never waits.
        """
        self._means.setdefault(name, _Mean()).add(value)

    def record_all(self, values: Mapping[str, Any]) -> None:
        """`record` for every name."""
        for name, value in values.items():
            self.record(name, value)

    def row(
        self,
        env_steps: int,
        frames: int,
        updates: int,
        wall_s: float,
        extra: Mapping[str, Any] | None = None,
    ) -> JSON:
        """Ends the interval: writes one row and returns it. `extra` is written as it is."""
        if self.last_row and env_steps < self.last_row["env_steps"]:
            raise ValueError(
                f"a row at env_steps={env_steps} after one at {self.last_row['env_steps']}: "
                "rows are written in order; give resume_env_steps where a run continues."
            )
        counts = {"env_steps": env_steps, "frames": frames, "updates": updates, "wall_s": wall_s}
        means = {name: mean.take() for name, mean in self._means.items()}
        found = counts | self._train() | self._rates(counts) | means | dict(extra or {})
        row = dict.fromkeys(NAMES) | {name: found[name] for name in sorted(found)}
        self.last_row = _clean(row)
        self._means.clear()
        self._write(self.last_row)
        return self.last_row

    def state(self) -> JSON:
        """What a checkpoint keeps: the window and the open interval. Waits for the device.

        Write the row that is due at the same env step before taking this.
        """
        return {
            "episodes": self._episodes,
            "window": [list(episode) for episode in self._window],
            "means": {name: mean.state() for name, mean in self._means.items()},
        }

    def restore(self, state: JSON) -> None:
        """Continues from `state()`, so that the next row is the one of an unstopped run."""
        self._episodes = state["episodes"]
        self._window.clear()
        self._window.extend((ret, env_steps) for ret, env_steps in state["window"])
        self._means = {name: _Mean(*mean) for name, mean in state["means"].items()}

    def close(self) -> None:
        """Closes the files; may be called twice."""
        self._file.close()
        while self._boards:
            self._boards.pop().close()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _train(self) -> JSON:
        returns, lengths = zip(*self._window, strict=True) if self._window else ((), ())
        return {
            "train/return_mean": _mean(returns),
            "train/length_mean": _mean(lengths),
            "train/episodes": self._episodes,
        }

    def _rates(self, counts: JSON) -> JSON:
        last = self.last_row or {"env_steps": 0, "updates": 0, "wall_s": 0.0}
        seconds = counts["wall_s"] - last["wall_s"]
        per_s = 1 / seconds if seconds > 0 else math.nan
        return {
            "acting/env_steps_per_s": (counts["env_steps"] - last["env_steps"]) * per_s,
            "learner/updates_per_s": (counts["updates"] - last["updates"]) * per_s,
        }

    def _write(self, row: JSON) -> None:
        self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        for board in self._boards:
            board.add(row)


class _Mean:
    """A running mean that reads device arrays late."""

    __slots__ = ("count", "pending", "total")

    def __init__(self, total: float = 0.0, count: int = 0) -> None:
        self.total, self.count = total, count
        self.pending: list[Any] = []

    def add(self, value: Any) -> None:
        self.pending.append(value)
        if len(self.pending) >= PENDING_LIMIT:
            self.fold(PENDING_LIMIT // 2)

    def fold(self, oldest: int | None = None) -> None:
        """Converts the oldest pending values (all: None); their copies to the host overlap."""
        oldest = len(self.pending) if oldest is None else oldest
        ready, self.pending = self.pending[:oldest], self.pending[oldest:]
        for value in ready:
            if hasattr(value, "copy_to_host_async"):
                value.copy_to_host_async()
        for value in ready:
            if math.isfinite(number := _number(value)):
                self.total += number
                self.count += 1

    def take(self) -> float:
        self.fold()
        return self.total / self.count if self.count else math.nan

    def state(self) -> list[Any]:
        self.fold()
        return [self.total, self.count]


def _number(value: Any) -> float:
    array = np.asarray(value, dtype=np.float64)
    return float(array.mean()) if array.size else math.nan


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values) if values else math.nan


def _clean(value: Any) -> Any:
    """The same in JSON's types; what is not finite becomes None."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): _clean(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(child) for child in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.integer | np.bool_):
        return value.item()
    number = _number(value)
    return number if math.isfinite(number) else None


# --- rows that are taken back -------------------------------------------------------------------


def discard_rows_after(folder: Path, env_steps: int | None) -> list[JSON]:
    """Moves later rows (None: all) and broken lines to metrics.discarded.jsonl.

    Returns the rows that stay. A kill at any moment loses no row: they are added there before
    they are taken away here, each by the renaming of a whole file.
    """
    path = folder / METRICS_FILE
    if not path.exists():
        return []
    data = path.read_bytes()
    rows, kept, gone = [], [], []
    for line in filter(None, data.split(b"\n")):
        row = parse_row(line)
        if row is not None and env_steps is not None and row["env_steps"] <= env_steps:
            rows.append(row)
            kept.append(line + b"\n")
        else:
            gone.append(line + b"\n")
    if gone:
        _add_discarded(folder / DISCARDED_FILE, b"".join(gone))
        log.info("%s: %d rows moved to %s", path, len(gone), DISCARDED_FILE)
    if b"".join(kept) != data:
        write_whole(path, b"".join(kept))
    return rows


def _add_discarded(path: Path, lines: bytes) -> None:
    before = path.read_bytes() if path.exists() else b""
    if not before.endswith(lines):  # else a kill came between this and the shortening
        write_whole(path, before + lines)


# --- whole files ---------------------------------------------------------------------------------


def write_whole(path: Path, data: bytes) -> None:
    """Replaces a file in one step: a reader, or a run after a kill, sees the old or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")  # what a kill leaves, the next write replaces
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path | str, value: Mapping[str, Any]) -> None:
    """Replaces a JSON file in one step; numbers that are not finite become null."""
    text = json.dumps(_clean(value), indent=2, allow_nan=False)
    write_whole(Path(path), text.encode() + b"\n")


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
    summary = _clean(summary)
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


# --- where the time goes -------------------------------------------------------------------------

# What each stage of the loop waits for, and the setting to turn when it takes most of the time.
STAGES: Mapping[str, str] = {
    "acting": "the environments are the bottleneck; try acting.envs_per_actor or env.threads",
    "replay_add": "adding blocks is the bottleneck; try a larger agent.block_rows",
    "sample": "sampling is the bottleneck; try a smaller learner.batch_size",
    "wait_peers": "the other learner processes are the bottleneck; see learners/*/metrics.jsonl",
    "learner_put": "copying batches to the device is the bottleneck; try learner.batch_size",
    "learner_update": "the learner is the bottleneck; try learner.devices or replay.ratio",
    "wait_learner": "the learner is the bottleneck; try learner.devices or replay.ratio",
    "publish": "publishing weights is the bottleneck; try learner.publish_every_updates",
    "evaluation": "evaluations take most of the time; try evaluation.every_env_steps",
    "checkpoint": "checkpoints take most of the time; try checkpoint.every_env_steps",
    "logging": "logging takes most of the time; try logging.every_env_steps",
    "other": "time outside all stages; profile the loop",
}


class _Timer:
    """The seconds spent in one stage; enters and leaves in well under a microsecond."""

    __slots__ = ("since", "spent")

    def __init__(self) -> None:
        self.since: float | None = None
        self.spent = 0.0

    def __enter__(self) -> None:
        self.since = perf_counter()

    def __exit__(self, *exception: object) -> None:
        if self.since is not None:
            self.spent += perf_counter() - self.since
        self.since = None

    def take(self, now: float) -> float:
        """The seconds until now, those of a stage still running among them; starts anew."""
        spent, self.spent = self.spent, 0.0
        if self.since is not None:
            spent += now - self.since
            self.since = now
        return spent


class StageTimes:
    """A stopwatch for the loop's thread: `with stages.measure("acting"): ...`; not nested."""

    def __init__(self) -> None:
        self._timers = {name: _Timer() for name in STAGES}
        self._begun = perf_counter()

    def measure(self, name: str) -> _Timer:
        """Counts the time of a `with` block to a stage of STAGES."""
        try:
            return self._timers[name]
        except KeyError:
            raise ValueError(f"stage {name!r}: must be one of {', '.join(STAGES)}.") from None

    def fractions(self) -> dict[str, float]:
        """{"time/acting": 0.71, ...} since the last call, 0 .. 1; "time/other" is the rest."""
        now = perf_counter()
        total = max(now - self._begun, 1e-9)
        spent = {name: timer.take(now) for name, timer in self._timers.items()}
        spent["other"] += max(0.0, total - sum(spent.values()))
        self._begun = now
        return {f"time/{name}": seconds / total for name, seconds in spent.items()}


def bottleneck(fractions: Mapping[str, Any]) -> str:
    """One line on the stage that takes most of the time, from `StageTimes.fractions()` or a row."""
    known = {name: fractions.get(f"time/{name}") or 0.0 for name in STAGES}
    name = max(known, key=lambda stage: known[stage])
    if known[name] <= 0:
        return ""
    return f"{name} {100 * known[name]:.0f} % of the time: {STAGES[name]}"
