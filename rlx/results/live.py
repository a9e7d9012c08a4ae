"""Reads runs from their folders while they work: states, counts, rates, curves.

It only reads, and of metrics.jsonl only what was added since it last looked.
"""

from __future__ import annotations

import math
import os
import threading
from array import array
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rlx.config.documents import Unreadable, open_file
from rlx.problems import cut
from rlx.runs.folders import (
    METRICS_FILE,
    MOST_LINE,
    RunFolder,
    age_s,
    find,
    number,
    parse_row,
)
from rlx.runs.times import bottleneck

JSON = dict[str, Any]
Curve = list[list[float]]  # [env steps], [values]

RATE_ROWS = 10  # the remaining time is told from the rate over so many rows
TRAIN, EVALUATION = "train/return_mean", "evaluation/return_mean"
ENV_STEPS_PER_S, UPDATES_PER_S = "acting/env_steps_per_s", "learner/updates_per_s"
ROW_NAMES = {  # what the page calls them
    "env_steps_per_s": ENV_STEPS_PER_S,
    "updates_per_s": UPDATES_PER_S,
    "train_return": TRAIN,
    "actors_ready": "acting/actors_ready",
    "actors_wanted": "acting/actors_wanted",
    "restarts": "acting/restarts",
}
KEPT = ("env_steps", "wall_s", TRAIN, EVALUATION)  # columns that every run keeps
SMALL, LARGE = 48, 600  # points of a curve
MOST_NAMES, MOST_NAME = 1000, 200  # metrics that are told of a run, and letters of each
TAIL = 64  # bytes before the offset by which a file is known again


# --- all runs ------------------------------------------------------------------------------------


class LiveRuns:
    """All runs below a folder. For several threads: one looks at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._lock = folder, threading.Lock()
        self._runs: dict[str, LiveRun] = {}

    def all(self) -> list[JSON]:
        """Returns what is known of each run now, by name."""
        with self._lock:
            self._find()
            for run in self._runs.values():
                run.poll()
            return [run.brief() for run in self._runs.values()]

    def one(self, name: str, metrics: Sequence[str]) -> JSON | None:
        """A run with curves of these metrics; None where no run has this name."""
        with self._lock:
            if name not in self._runs:
                self._find()
            if (run := self._runs.get(name)) is None:
                return None
            run.poll()
            return run.full(metrics)

    def _find(self) -> None:
        found = {path.relative_to(self._folder).as_posix(): path for path in find(self._folder)}
        self._runs = {name: self._runs.get(name) or LiveRun(found[name], name) for name in found}


# --- one run -------------------------------------------------------------------------------------


class RowsFile:
    """Columns of a growing metrics.jsonl; reads what was added, and anew what was rewritten."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._names = list(KEPT)
        self._forget()

    def _forget(self) -> None:
        self._offset, self._tail, self._seen = 0, b"", (-1, -1)
        self.columns = {name: array("d") for name in self._names}
        self.last: JSON = {}
        self.names: dict[str, None] = {}  # of metrics that some row has a number of, in order

    def keep(self, names: Sequence[str]) -> None:
        """Keeps these columns, too, from now on."""
        new = [name for name in names if name not in self.columns]
        if new:
            self._names += new
            self._forget()
            self.poll()

    def poll(self) -> None:
        """Reads the rows that were added; an unfinished last line waits for the next poll."""
        try:
            found = self._path.stat()
            if (found.st_size, found.st_mtime_ns) != self._seen:
                self._read(found)
        except (OSError, Unreadable):  # there is none, or it may not be read
            self._forget()

    def _read(self, found: os.stat_result) -> None:
        with open_file(self._path) as file:
            if found.st_size < self._offset or self._read_tail(file) != self._tail:
                self._forget()
            file.seek(self._offset)
            while line := file.readline(MOST_LINE):
                if not line.endswith(b"\n") and len(line) < MOST_LINE:
                    break
                self._offset += len(line)
                self._take(line)
            self._tail = self._read_tail(file)
        self._seen = (found.st_size, found.st_mtime_ns)

    def _read_tail(self, file: Any) -> bytes:
        """The bytes before the offset; they differ if a resume removed rows and wrote new ones."""
        begin = max(0, self._offset - TAIL)
        file.seek(begin)
        return bytes(file.read(self._offset - begin))

    def _take(self, line: bytes) -> None:
        if (row := parse_row(line)) is None:  # as half of a line that a killed run left
            return
        for name, column in self.columns.items():
            value = row.get(name)
            column.append(math.nan if value is None else value)
        self.last = row
        if len(self.names) < MOST_NAMES:
            new = (name for name in row if name not in self.names and len(name) <= MOST_NAME)
            self.names |= {name: None for name in new if row[name] is not None}

    def curve(self, name: str, points: int) -> Curve:
        """Env steps and values where a value exists; at most `points`, as means of neighbours."""
        pairs = zip(self.columns["env_steps"], self.columns[name], strict=True)
        return thin([(x, y) for x, y in pairs if not math.isnan(y)], points)

    def newest(self, name: str) -> float | None:
        """The last finite value of a column."""
        column = self.columns[name]
        return next((value for value in reversed(column) if not math.isnan(value)), None)

    def rate(self) -> float | None:
        """Env steps per second over the last rows."""
        env_steps, wall_s = (self.columns[name][-RATE_ROWS:] for name in ("env_steps", "wall_s"))
        seconds = wall_s[-1] - wall_s[0] if len(wall_s) > 1 else 0.0
        if seconds > 0:
            return float((env_steps[-1] - env_steps[0]) / seconds)
        return number(self.last.get(ENV_STEPS_PER_S))


class LiveRun:
    """One run's folder as of the last poll."""

    def __init__(self, folder: Path, name: str) -> None:
        self._name, self._folder = name, RunFolder(folder)
        self._rows = RowsFile(folder / METRICS_FILE)
        self._about: JSON = {}

    def poll(self) -> None:
        """Reads what changed."""
        self._rows.poll()
        status, settings = self._folder.status, self._folder.settings
        state, note = self._folder.state()
        row = self._rows.last
        newest = self._folder.summary | status | row  # the later, the newer
        evaluation = self._rows.newest(EVALUATION)
        if evaluation is None:
            evaluation = number(newest.get("evaluation_return"))
        self._about = {
            "name": self._name,
            "state": state,
            "note": note,
            "age_s": age_s(status),
            "total_env_steps": number(settings.get("total_env_steps")),
            **{name: number(newest.get(name)) for name in ("env_steps", "updates", "wall_s")},
            **{short: number(row.get(name)) for short, name in ROW_NAMES.items()},
            "evaluation_return": evaluation,
            "left_s": self._left_s(settings) if state == "running" else None,
            "bottleneck": bottleneck({k: number(v) for k, v in row.items()}),
            "env": _named(settings, "env", "id") or _tasks(settings),
            "agent": _named(settings, "agent", "_target_").rpartition(".")[2],
            "seed": number(settings.get("seed")),
            "overrides": self._folder.overrides,
        }

    def brief(self) -> JSON:
        """Returns what the list of all runs shows of this one."""
        curves = {"train": TRAIN, "evaluation": EVALUATION}
        return self._about | {key: self._rows.curve(of, SMALL) for key, of in curves.items()}

    def full(self, metrics: Sequence[str]) -> JSON:
        """The run with the names of all metrics and the curves of these that it has."""
        names = list(dict.fromkeys([TRAIN, EVALUATION, *self._rows.names]))
        known = [name for name in metrics if name in names]
        self._rows.keep(known)
        curves = {name: self._rows.curve(name, LARGE) for name in known}
        return self._about | {"metrics": names, "curves": curves}

    def _left_s(self, settings: JSON) -> float | None:
        """Seconds to whichever of the run's limits comes first."""
        limits = []
        for limit, done, rate in (
            ("total_env_steps", "env_steps", self._rows.rate()),
            ("stop_after_updates", "updates", number(self._rows.last.get(UPDATES_PER_S))),
            ("stop_after_s", "wall_s", 1.0),
        ):
            end, now = number(settings.get(limit)), number(self._rows.last.get(done))
            if end is not None and now is not None and rate:
                limits.append(max(0.0, (end - now) / rate))
        return min(limits, default=None)


# --- small parts ---------------------------------------------------------------------------------


def _tasks(settings: Mapping[str, Any]) -> str:
    """The ids of the environments of a run with several."""
    node = settings.get("env")
    ids = node.get("ids") if isinstance(node, dict) else None
    return cut(", ".join(map(str, ids))) if isinstance(ids, list) else ""


def _named(settings: Mapping[str, Any], group: str, key: str) -> str:
    node = settings.get(group)
    return cut(str(node.get(key) or "")) if isinstance(node, dict) else ""


def thin(pairs: Sequence[tuple[float, float]], points: int) -> Curve:
    """A curve of at most so many points: means of neighbours; the last point stays as it is."""
    if len(pairs) <= points:
        return [[x for x, _ in pairs], [y for _, y in pairs]]
    count, body = points - 1, pairs[:-1]
    ends = [len(body) * i // count for i in range(count + 1)]
    parts = [body[begin:end] for begin, end in pairwise(ends)]
    means = [tuple(math.fsum(v) / len(p) for v in zip(*p, strict=True)) for p in parts]
    return [list(values) for values in zip(*means, pairs[-1], strict=True)]
