"""Metrics of a run: rows of metrics.jsonl and events for TensorBoard and Weights & Biases.

A row of metrics.jsonl is written every so many env steps, by count and not by time, so that two
runs of one seed write the same rows, aside from the names that `is_wall_clock` knows; only
`logging.every_s` adds rows by time. Counts are
env steps, frames and updates, as the names say; `_s` is seconds, `_per_s` per second.
"""

from __future__ import annotations

import json
import logging
import math
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np

from rlx.machine.packages import is_installed
from rlx.runs.actions import Actions
from rlx.runs.boards import open_boards
from rlx.runs.files import as_float, clean, write_whole
from rlx.runs.folders import METRICS_FILE, parse_row
from rlx.types import ActionSpec, Episode, Range, Row

log = logging.getLogger(__name__)

JSON = dict[str, Any]

DISCARDED_FILE = "metrics.discarded.jsonl"

# Every row has these names, null where there is nothing to tell, in this order; others follow.
NAMES: Mapping[str, str] = {
    "env_steps": "env steps made by the run",
    "frames": "emulator frames seen by the run",
    "updates": "updates made by the run, one for each batch",
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
    "weights/age_env_steps": "env steps of the run since the acting weights were taken",
}

# Of the same episodes as train/return_mean, and of each evaluation; where there are any.
SPREADS: Mapping[str, str] = {
    "train/return_min": "least unclipped return of the last logging.window_episodes episodes",
    "train/return_max": "largest return of those episodes",
    "train/return_std": "standard deviation of their returns, over n and not n - 1",
    "train/return_mean_last_10": "mean return of the last ten of them",
    "train/length_min": "least length of those episodes, env steps",
    "train/length_max": "largest length of those episodes, env steps",
    "evaluation/return_min": "least unclipped return of the evaluation",
    "evaluation/return_max": "largest return of the evaluation",
    "evaluation/return_std": "standard deviation of its returns, over n and not n - 1",
    "evaluation/episodes": "episodes of the evaluation",
}
TASK_RETURN = "task/*/return_mean"  # of a run with several tasks
LAST = 10  # episodes of train/return_mean_last_10

# The window's episodes again, by how much their lane explored when they ended (Episode.epsilon):
# a mean over a ladder tells little of any rung. A row has the rungs that have episodes.
RUNG_EDGES = (0.01, 0.05, 0.2)  # a rung begins with its lower edge; 1 is in the last one
RUNGS: Mapping[str, str] = {
    "train/return_mean/epsilon_0-0.01": "train/return_mean of the episodes with epsilon < 0.01",
    "train/return_mean/epsilon_0.01-0.05": "the same with 0.01 <= epsilon < 0.05",
    "train/return_mean/epsilon_0.05-0.2": "the same with 0.05 <= epsilon < 0.2",
    "train/return_mean/epsilon_0.2-1": "the same with 0.2 <= epsilon <= 1",
}

# The only names whose values differ between two runs of one seed: they come from a clock.
WALL_CLOCK_PREFIXES = ("wall_s", "time/", "learner/device_busy")
WALL_CLOCK_SUFFIXES = ("_s",)  # seconds, and with them every `_per_s`

# Values that wait for one name before the oldest are converted: bounds memory, and half of them
# are by then so many updates old that the device has long finished them.
PENDING_LIMIT = 1024


@dataclass(frozen=True, kw_only=True)
class Logging:
    """These settings of conf/logging say what is written and shown, and how often."""

    every_env_steps: Annotated[int, Range(ge=1)]
    every_s: Annotated[float, Range(gt=0)] | None  # a row by time, too; None: by count alone
    window_episodes: Annotated[int, Range(ge=1)]
    tensorboard: bool
    wandb: str | None
    console: Literal["auto", "rich", "plain", "off"]
    console_every_s: Annotated[float, Range(ge=0)]

    def __post_init__(self) -> None:
        if self.wandb is not None and not is_installed("wandb"):
            raise ValueError(
                f"logging.wandb={self.wandb}, but wandb is not installed; "
                "pip install 'rlx[wandb]', or set logging.wandb=null."
            )


def is_wall_clock(name: str) -> bool:
    """Says whether a metric comes from a clock, so that a repeated run differs in it."""
    return name.startswith(WALL_CLOCK_PREFIXES) or name.endswith(WALL_CLOCK_SUFFIXES)


def without_wall_clock(row: Mapping[str, Any]) -> JSON:
    """The part of a row that two runs of one seed share to the last byte."""
    return {name: value for name, value in row.items() if not is_wall_clock(name)}


# --- rows ----------------------------------------------------------------------------------------


class Metrics:
    """Gathers values between two rows and writes the rows. For one thread."""

    def __init__(
        self,
        output_dir: Path | str,
        settings: Logging,
        resume_env_steps: int | None,
        action: ActionSpec | None = None,
    ) -> None:
        """`resume_env_steps`: env steps of the checkpoint continued from; None: a new run.

        action: of the environment, whose actions are counted; None: they are not.
        Rows of a later time (all rows, in a new run) move to metrics.discarded.jsonl.
        """
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        kept = discard_rows_after(folder, resume_env_steps)
        self.last_row: JSON | None = kept[-1] if kept else None
        self._file = (folder / METRICS_FILE).open("ab", buffering=0)  # one row is one write
        self._means: dict[str, _Mean] = {}
        self._window: deque[_Ended] = deque(maxlen=settings.window_episodes)
        self._tasks: dict[str, deque[_Ended]] = {}  # the window of each task
        self._episodes = (self.last_row or {}).get("train/episodes") or 0
        self._actions = Actions(action)
        self._boards = open_boards(
            folder,
            tensorboard=settings.tensorboard,
            wandb=settings.wandb,
            resume_env_steps=resume_env_steps,
        )

    def episodes(self, episodes: Iterable[Episode]) -> None:
        """Takes finished episodes, in the order in which they ended."""
        for episode in episodes:
            env_steps, epsilon = int(episode.env_steps), float(episode.epsilon)
            ended = _Ended(float(episode.return_), env_steps, epsilon)
            self._window.append(ended)
            self._episodes += 1
            if episode.task:
                window: deque[_Ended] = deque(maxlen=self._window.maxlen)
                self._tasks.setdefault(episode.task, window).append(ended)

    def actions(self, rows: Row) -> None:
        """Takes the actions of rows [M, K, ...] that were acted; those of no env step are none."""
        self._actions.add(rows.action[rows.valid])

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
        found = counts | self._train() | self._rates(counts) | means | self._actions.take()
        found |= dict(extra or {})
        row = dict.fromkeys(NAMES) | {name: found[name] for name in sorted(found)}
        self.last_row = clean(row)
        self._means.clear()
        self._write(self.last_row)
        return self.last_row

    def state(self) -> JSON:
        """Returns what a checkpoint keeps: the window and the open interval. Waits for the device.

        Write the row that is due at the same env step before taking this.
        """
        return {
            "episodes": self._episodes,
            "window": _saved(self._window),
            "tasks": {task: _saved(window) for task, window in self._tasks.items()},
            "means": {name: mean.state() for name, mean in self._means.items()},
            "actions": self._actions.state(),
        }

    def restore(self, state: JSON) -> None:
        """Continues from `state()`, so that the next row is the one of an unstopped run."""
        self._episodes = state["episodes"]
        self._window.clear()
        self._window.extend(_Ended(*episode) for episode in state["window"])
        self._tasks = {
            task: deque((_Ended(*episode) for episode in window), self._window.maxlen)
            for task, window in state.get("tasks", {}).items()
        }
        self._means = {name: _Mean(*mean) for name, mean in state["means"].items()}
        self._actions.restore(state.get("actions", []))

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
        rungs: dict[str, list[float]] = {}
        for ended in self._window:
            if ended.epsilon is not None:
                rungs.setdefault(rung_of(ended.epsilon), []).append(ended.return_)
        returns = [ended.return_ for ended in self._window]
        lengths = [ended.env_steps for ended in self._window]
        return {
            **spread(returns, "train/return"),
            "train/length_mean": _mean(lengths),
            "train/episodes": self._episodes,
            **{name: _mean(of_rung) for name, of_rung in rungs.items()},
            **(_of_some(returns, lengths) if returns else {}),
            **{name: value for each in sorted(self._tasks) for name, value in self._of(each)},
        }

    def _of(self, task: str) -> list[tuple[str, float]]:
        window = self._tasks[task]
        return [
            (TASK_RETURN.replace("*", task), _mean(ended.return_ for ended in window)),
            (f"task/{task}/length_mean", _mean(ended.env_steps for ended in window)),
        ]

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


class _Ended(NamedTuple):
    """Keeps what is told of a finished episode."""

    return_: float
    env_steps: int
    epsilon: float | None = None  # None: an earlier rlx saved it


def _saved(window: Iterable[_Ended]) -> list[list[float]]:
    return [[value for value in ended if value is not None] for ended in window]


def tasks_in(names: Iterable[str]) -> list[str]:
    """The tasks whose returns are among these names of metrics, in alphabetical order."""
    start, end = TASK_RETURN.split("*")
    return sorted({n[len(start) : -len(end)] for n in names if fnmatchcase(n, TASK_RETURN)})


def rung_of(epsilon: float) -> str:
    """The name in RUNGS of an amount; amounts are float32, and so an edge counts as one."""
    at = bisect_right([float(np.float32(edge)) for edge in RUNG_EDGES], epsilon)
    return list(RUNGS)[at]


def rungs_in(names: Iterable[str]) -> list[str]:
    """The RUNGS that are among these names, the greediest first."""
    given = set(names)
    return [name for name in RUNGS if name in given]


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
        if ready and _is_elsewhere(ready[0]):
            for value in ready:
                if hasattr(value, "copy_to_host_async"):
                    value.copy_to_host_async()
        for value in ready:
            if math.isfinite(number := as_float(value)):
                self.total += number
                self.count += 1

    def take(self) -> float:
        self.fold()
        return self.total / self.count if self.count else math.nan

    def state(self) -> list[Any]:
        self.fold()
        return [self.total, self.count]


def _is_elsewhere(value: Any) -> bool:
    """Says whether a value is an array of an accelerator; all values of a name are of one kind."""
    return hasattr(value, "devices") and any(x.platform != "cpu" for x in value.devices())


def spread(returns: Sequence[float], name: str) -> dict[str, float]:
    """The mean of these returns and, where there are any, least, largest and deviation.

    name: 'train/return', to which `_mean` and the others are added.
    """
    found = {f"{name}_mean": _mean(returns)}
    if returns:
        found[f"{name}_min"], found[f"{name}_max"] = min(returns), max(returns)
        found[f"{name}_std"] = float(np.std(returns))
    return found


def _of_some(returns: Sequence[float], lengths: Sequence[float]) -> dict[str, float]:
    return {
        "train/return_mean_last_10": _mean(returns[-LAST:]),
        "train/length_min": min(lengths),
        "train/length_max": max(lengths),
    }


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values) if values else math.nan


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
