"""Compares groups of runs on tasks: scores, probabilities of improvement, curves and profiles.

A group is what differs in nothing but the seed and the task; a task is an environment (env.id).
Only finished runs have a final score; all runs have curves, as far as they came.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from rlx.problems import refuse
from rlx.results import atari
from rlx.results.reading import SCORES, SEED, Run, read, value_of, varying
from rlx.statistics import (
    Estimate,
    iqm,
    iqm_curve,
    performance_profile,
    probability_of_improvement,
)

TASK = "env.id"
TASKS = "env.ids"  # of a run with several
CURVES = ("evaluation/return_mean", "train/return_mean")
POINTS = 200  # of the common grid that curves are interpolated on
BOOTSTRAP_SEED = 0

Points = tuple[np.ndarray, np.ndarray]  # f64[points] of x and of a metric


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
        return len(self.games) == len(self.tasks)

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
        several = all(len(points(run, CURVES[0], "env_steps")[0]) >= 3 for run in began)
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

    @cached_property
    def games(self) -> dict[str, str]:
        """task -> its game, of the tasks that are among the 57."""
        return {task: name for task in self.tasks if (name := atari.game(task))}

    def normalized(self, label: str) -> dict[str, np.ndarray]:
        """`scores` of Atari's tasks on one scale: human-normalised. It has no other tasks."""
        found = self.scores(label)
        return {
            task: atari.human_normalized(name, found[task])
            for task, name in self.games.items()
            if task in found
        }


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
    """The id of the run's environment; of several tasks all of them."""
    ids = run.settings.get(TASKS)
    return ", ".join(map(str, ids)) if isinstance(ids, list) else str(value_of(run, TASK))


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


# --- comparisons ----------------------------------------------------------------------------------


iqm_of_last = partial(iqm, axis=-1)  # as `stratified` wants a statistic


def columns(name: str, found: Estimate, *groups: Sequence[np.ndarray]) -> dict[str, float | None]:
    """A row's value and its interval; none where no task of a group has two runs to draw from."""
    is_told = all(any(len(scores) > 1 for scores in tasks) for tasks in groups)
    low, high = (found.low, found.high) if is_told else (None, None)
    return {name: found.value, f"{name}_low": low, f"{name}_high": high}


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
    return row | columns("probability", found, *pair)


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
    return joined([[points(run, metric, x) for run in runs]])


def human_curve(runs: Sequence[Run], metric: str) -> Curve | None:
    """Joins the human-normalised curves of all games over frames, where every run has a value.

    Beyond the end of one run the games would weigh otherwise, and the curve would jump. None
    where some run has no value at all, or no frames are common to all.
    """
    strata: dict[str, list[Points]] = {}
    for run in runs:
        name = atari.game(task_of(run)) or ""
        frames, values = points(run, metric, "frames")
        strata.setdefault(name, []).append((frames, atari.human_normalized(name, values)))
    found = joined(list(strata.values()))
    if found is None or not (whole := found.runs == len(runs)).any():
        return None
    kept = (found.found.value, found.found.low, found.found.high)
    value, low, high = (side[whole] for side in kept)
    return Curve(
        x=found.x[whole],
        found=Estimate(value=value, low=low, high=high),
        runs=found.runs[whole],
    )


def joined(strata: Sequence[Sequence[Points]]) -> Curve | None:
    """One curve of all runs on a common grid; the bootstrap draws runs within their stratum."""
    known = [[(x, y) for x, y in runs if len(x)] for runs in strata]
    known = [runs for runs in known if runs]
    if not known:
        return None
    every = [x for runs in known for x, _ in runs]
    grid = np.linspace(min(x[0] for x in every), max(x[-1] for x in every), POINTS)
    on_grid = [np.array([_on_grid(grid, x, y) for x, y in runs]) for runs in known]
    found = iqm_curve(on_grid, seed=BOOTSTRAP_SEED, resamples=1000)
    return Curve(x=grid, found=found, runs=np.isfinite(np.concatenate(on_grid)).sum(axis=0))


def _on_grid(grid: np.ndarray, steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    slack = float(np.median(np.diff(steps))) / 2 if len(steps) > 1 else 0.0
    is_known = (grid >= steps[0] - slack) & (grid <= steps[-1] + slack)
    return np.where(is_known, np.interp(grid, steps, values), np.nan)


def points(run: Run, metric: str, x: str) -> Points:
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
