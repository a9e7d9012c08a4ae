"""Compares groups of runs on tasks, and makes the tables that a report shows.

A group is what differs in nothing but the seed and the task; a task is an environment (env.id).
Only finished runs have a final score; all runs have curves, as far as they came.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlx.problems import refuse
from rlx.results import atari
from rlx.results.reading import SCORES, SEED, Run, need, read, run_rows, value_of, varying
from rlx.runs.folders import number
from rlx.runs.times import STAGES, bottleneck
from rlx.statistics import (
    Estimate,
    iqm,
    iqm_curve,
    optimality_gap,
    performance_profile,
    probability_of_improvement,
    stratified,
)

if TYPE_CHECKING:
    import pandas as pd

TASK = "env.id"
CURVES = ("evaluation/return_mean", "train/return_mean")
POINTS = 200  # of the common grid that curves are interpolated on
BOOTSTRAP_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Study:
    """The runs below a folder, in groups."""

    folder: Path
    runs: Sequence[Run]
    settings: Sequence[str]  # those that vary
    by: Sequence[str]  # those that make the groups

    @cached_property
    def groups(self) -> dict[str, list[Run]]:
        """label -> its runs, in the order in which they were found."""
        found: dict[str, list[Run]] = {}
        for run in self.runs:
            found.setdefault(_label(run, self.by), []).append(run)
        return found

    @cached_property
    def tasks(self) -> list[str]:
        """The environments, in order."""
        return sorted({task_of(run) for run in self.runs})

    @property
    def is_atari(self) -> bool:
        """Says whether scores can be normalised by those of the human tester."""
        return all(atari.game(task) for task in self.tasks)

    @cached_property
    def finished(self) -> list[Run]:
        """The finished runs, which count in tables of final scores."""
        return [run for run in self.runs if run.state == "finished"]

    @cached_property
    def score(self) -> str:
        """The source of final scores: the best one that every finished run has."""
        has = (s for s in SCORES if all(run.scores[s] is not None for run in self.finished))
        return next(has, "training")

    @cached_property
    def metric(self) -> str:
        """Names what the curves show: evaluations, if every run that began has several."""
        began = [run for run in self.runs if run.rows]
        several = all(len(_points(run, CURVES[0], "env_steps")[0]) >= 3 for run in began)
        return CURVES[0] if began and several else CURVES[1]

    @cached_property
    def improvements(self) -> list[dict[str, Any]]:
        """The rows of `improvement`, which a table and a figure show."""
        return improvement(self)

    def scores(self, label: str) -> dict[str, np.ndarray]:
        """task -> f64[runs], the final scores of a group, for the tasks that have any."""
        found: dict[str, list[float]] = {}
        for run in self.groups[label]:
            if run.state == "finished" and (score := run.scores[self.score]) is not None:
                found.setdefault(task_of(run), []).append(score)
        return {task: np.array(found[task]) for task in self.tasks if task in found}

    def normalized(self, label: str) -> dict[str, np.ndarray]:
        """`scores`, each task's brought to one scale: human-normalised, for Atari."""
        games = {task: atari.game(task) or "" for task in self.tasks}
        return {t: atari.human_normalized(games[t], s) for t, s in self.scores(label).items()}


def study(folder: Path, by: Sequence[str] | None = None) -> Study:
    """Reads a folder; by: the settings that make groups, None: all that vary but seed and task."""
    runs = read(folder)
    settings = varying(runs)
    if by is None:
        by = [name for name in settings if name not in (SEED, TASK, "env")]
    known = {name for run in runs for name in (*run.settings, *run.choices)}
    if unknown := [name for name in by if name not in known]:
        says = f"no such setting; those that vary are {', '.join(settings) or 'none'}"
        raise refuse("group", says, given=unknown[0])
    return Study(folder=folder, runs=runs, settings=settings, by=list(by))


def task_of(run: Run) -> str:
    """The id of the run's environment."""
    return str(value_of(run, TASK))


def _label(run: Run, by: Iterable[str]) -> str:
    return ", ".join(f"{name}={_text(value_of(run, name))}" for name in by) or "all runs"


def _text(value: Any) -> str:
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )


def count(runs: Sequence[Run]) -> str:
    """ "5 runs: 4 finished, 1 failed", for a line of text."""
    states = Counter(run.state for run in runs)
    parts = ", ".join(f"{n} {state}" for state, n in states.most_common())
    return f"{plural(len(runs))}: {parts}"


def plural(number: int, what: str = "run") -> str:
    """ "1 run", "2 runs"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


# --- tables --------------------------------------------------------------------------------------


def tables(given: Study) -> dict[str, pd.DataFrame]:
    """name -> table, without empty ones; columns X_low and X_high are the 95 % interval of X."""
    pd = need("pandas")
    makers: dict[str, Callable[[Study], list[dict[str, Any]]]] = {
        "unfinished": unfinished,
        "scores": scores,
        "human_normalized": human_normalized,
        "improvement": lambda given: given.improvements,
        "speed": speed,
        "atari": atari_table,
        "runs": all_runs,
    }
    found = {name: pd.DataFrame(make(given)) for name, make in makers.items()}
    return {name: table for name, table in found.items() if len(table)}


def all_runs(given: Study) -> list[dict[str, Any]]:
    """Every run; without the columns that nobody has a value in."""
    rows = run_rows(given.runs, given.settings)
    empty = [name for name in rows[0] if all(row[name] is None for row in rows)]
    return [{name: row[name] for name in row if name not in empty} for row in rows]


def unfinished(given: Study) -> list[dict[str, Any]]:
    """The runs without a final score, and why."""
    return [
        {
            "run": run.name,
            "state": run.state,
            "env steps": run.rows[-1]["env_steps"] if run.rows else 0,
            "error": run.error or "",
        }
        for run in given.runs
        if run.state != "finished"
    ]


def scores(given: Study) -> list[dict[str, Any]]:
    """Final returns per group and task."""
    rows = []
    for label, runs in given.groups.items():
        found = given.scores(label)
        for task in [t for t in given.tasks if any(task_of(run) == t for run in runs)]:
            values = found.get(task, np.array([]))
            begun = sum(task_of(run) == task for run in runs)
            row = {
                "group": label,
                "task": task,
                "runs": len(values),
                "not counted": begun - len(values),
            }
            rows.append(row | _summary(values))
    return rows


def _summary(values: np.ndarray) -> dict[str, float | None]:
    if not len(values):
        return dict.fromkeys(("IQM", "IQM_low", "IQM_high", "mean", "min", "max"))
    found = stratified([values], _iqm, seed=BOOTSTRAP_SEED)
    bounds = {"mean": values.mean(), "min": values.min(), "max": values.max()}
    return _columns("IQM", found, [values]) | {name: float(value) for name, value in bounds.items()}


_iqm = partial(iqm, axis=-1)


def _columns(name: str, found: Estimate, *groups: Sequence[np.ndarray]) -> dict[str, float | None]:
    """The value and its interval; none where no task of a group has two runs to draw from."""
    is_told = all(any(len(scores) > 1 for scores in tasks) for tasks in groups)
    low, high = (found.low, found.high) if is_told else (None, None)
    return {name: found.value, f"{name}_low": low, f"{name}_high": high}


def human_normalized(given: Study) -> list[dict[str, Any]]:
    """The human-normalised scores of each group over its games, where all are Atari's."""
    rows = []
    for label in given.groups if given.is_atari else ():
        if not (found := list(given.normalized(label).values())):
            continue
        medians = [scores.mean() for scores in found]
        row = {"group": label, "games": len(found), "runs": sum(len(s) for s in found)}
        row |= _columns("IQM", stratified(found, _iqm, seed=BOOTSTRAP_SEED), found)
        row |= {"median of games": float(np.median(medians))}
        gap = optimality_gap(found, seed=BOOTSTRAP_SEED)
        rows.append(row | _columns("gap to human", gap, found))
    return rows


def improvement(given: Study) -> list[dict[str, Any]]:
    """Compares each pair of groups on the tasks that both have; the better one stands first."""
    rows = []
    for first, second in combinations(given.groups, 2):
        row = _better(given, first, second)
        if row and row["probability"] < 0.5:
            row = _better(given, second, first)
        rows += [row] if row else []
    return rows


def _better(given: Study, first: str, second: str) -> dict[str, Any] | None:
    a, b = given.scores(first), given.scores(second)
    shared = [task for task in a if task in b]
    if not shared:
        return None
    pair = [a[task] for task in shared], [b[task] for task in shared]
    found = probability_of_improvement(*pair, seed=BOOTSTRAP_SEED)
    runs = " + ".join(str(sum(len(s) for s in side)) for side in pair)
    row = {"group": first, "is better than": second, "tasks": len(shared), "runs": runs}
    return row | _columns("probability", found, *pair)


def speed(given: Study) -> list[dict[str, Any]]:
    """Rates from the first row of metrics to the last: the first holds the compiling."""
    rows = []
    for label, runs in given.groups.items():
        known = [run for run in runs if len(run.rows) > 1]
        if known:
            rates = {
                "env steps/s": _rate(known, "env_steps"),
                "updates/s": _rate(known, "updates"),
            }
            most = {f"time/{s}": _mean(known, f"time/{s}") for s in STAGES}
            rows.append(
                {"group": label, "runs": len(known), **rates, "most time": bottleneck(most)}
            )
    return rows


def _rate(runs: Sequence[Run], name: str) -> float:
    """The mean rate over the runs whose rows have it; NaN if none has."""
    rates = []
    for run in runs:
        first, last = run.rows[0], run.rows[-1]
        n, s = number(first.get(name)), number(first.get("wall_s"))
        m, t = number(last.get(name)), number(last.get("wall_s"))
        if n is not None and s is not None and m is not None and t is not None:
            rates.append((m - n) / max(t - s, 1e-9))
    return float(np.mean(rates)) if rates else math.nan


def _mean(runs: Sequence[Run], name: str) -> float:
    return float(np.mean([row.get(name) or 0.0 for run in runs for row in run.rows[1:]]))


def atari_table(given: Study) -> list[dict[str, Any]]:
    """Mean scores beside the published ones; for the games that were played."""
    rows = []
    for task in given.tasks if given.is_atari else ():
        name = atari.game(task) or ""
        known = atari.scores()[name]
        row: dict[str, Any] = {"game": name}
        for label in given.groups:
            found = given.scores(label).get(task, np.array([]))
            ours = float(found.mean()) if len(found) else None
            of_human = None if ours is None else 100 * atari.human_normalized(name, ours)
            row |= {f"{label}: runs": len(found), label: ours, f"{label}: % of human": of_human}
        published = {title: known.get(key) for key, (title, _) in atari.PUBLISHED.items()}
        rows.append(row | {"random": known["random"], "human": known["human"]} | published)
    return rows


# --- curves --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A metric of several runs on one grid; NaN where no run has a value."""

    x: np.ndarray  # f64[points]
    found: Estimate
    runs: np.ndarray  # i64[points]: how many have a value there


def curve(runs: Sequence[Run], metric: str, x: str) -> Curve | None:
    """Interpolates runs on a common grid; a run ends half a row of metrics beyond its last value.

    (Runs that stop at 402 and 406 env steps both have a value at 406.)
    """
    points = [_points(run, metric, x) for run in runs]
    points = [(steps, values) for steps, values in points if len(steps)]
    if not points:
        return None
    low, high = min(steps[0] for steps, _ in points), max(steps[-1] for steps, _ in points)
    grid = np.linspace(low, high, POINTS)
    on_grid = np.array([_on_grid(grid, steps, values) for steps, values in points])
    found = iqm_curve([on_grid], seed=BOOTSTRAP_SEED, resamples=1000)
    return Curve(x=grid, found=found, runs=np.isfinite(on_grid).sum(axis=0))


def _on_grid(grid: np.ndarray, steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    slack = float(np.median(np.diff(steps))) / 2 if len(steps) > 1 else 0.0
    is_known = (grid >= steps[0] - slack) & (grid <= steps[-1] + slack)
    return np.where(is_known, np.interp(grid, steps, values), np.nan)


def _points(run: Run, metric: str, x: str) -> tuple[np.ndarray, np.ndarray]:
    """The x and the values of the metric, without the rows that do not have it."""
    rows = [row for row in run.rows if row.get(metric) is not None and row.get(x) is not None]
    return np.array([row[x] for row in rows], float), np.array([row[metric] for row in rows], float)


def profiles(given: Study) -> list[tuple[str, np.ndarray, dict[str, Estimate]]]:
    """(what is on the axis, taus, label -> shares): one for Atari, else one for each task."""
    labels = [label for label in given.groups if given.scores(label)]
    if given.is_atari:
        many = {label: list(given.normalized(label).values()) for label in labels}
        panels = [("human-normalised score", many)]
    else:
        panels = []
        for task in given.tasks:
            of_task = {label: given.scores(label).get(task) for label in labels}
            kept = {label: [s] for label, s in of_task.items() if s is not None}
            panels.append((f"return in {task}", kept))
    return [(name, *_profile(scores)) for name, scores in panels if scores]


def _profile(scores: Mapping[str, list[np.ndarray]]) -> tuple[np.ndarray, dict[str, Estimate]]:
    every = np.concatenate([s for tasks in scores.values() for s in tasks])
    margin = 0.05 * (np.ptp(every) or 1.0)
    taus = np.linspace(every.min() - margin, every.max() + margin, POINTS)
    found = {
        label: performance_profile(tasks, taus, seed=BOOTSTRAP_SEED)
        for label, tasks in scores.items()
    }
    return taus, found
