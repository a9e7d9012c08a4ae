"""The tables that a report shows, made from a study: `tables(study(folder))`, as pandas."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rlx.results.reading import Run, need, run_rows
from rlx.results.scorecard import by_game, over_games
from rlx.results.study import BOOTSTRAP_SEED, Study, columns, iqm_of_last, task_of
from rlx.runs.folders import number
from rlx.runs.metrics import TASK_RETURN, tasks_in
from rlx.runs.times import STAGES, bottleneck
from rlx.statistics import stratified

if TYPE_CHECKING:
    import pandas as pd


def tables(given: Study) -> dict[str, pd.DataFrame]:
    """name -> table, without empty ones; columns X_low and X_high are the 95 % interval of X."""
    pd = need("pandas")
    makers: dict[str, Callable[[Study], list[dict[str, Any]]]] = {
        "unfinished": unfinished,
        "scores": scores,
        "tasks": each_task,
        "human_normalized": over_games,
        "atari": by_game,
        "improvement": lambda given: given.improvements,
        "speed": speed,
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


def each_task(given: Study) -> list[dict[str, Any]]:
    """Last training returns of each task of the finished runs that have several."""
    rows = []
    for label, runs in given.groups.items():
        own = [run for run in runs if run in given.finished and run.rows]
        for task in tasks_in(name for run in own for name in run.rows[-1]):
            name = TASK_RETURN.replace("*", task)
            found = [number(run.rows[-1].get(name)) for run in own]
            values = np.array([value for value in found if value is not None])
            rows.append({"group": label, "task": task, "runs": len(values), **_summary(values)})
    return rows


def _summary(values: np.ndarray) -> dict[str, float | None]:
    if not len(values):
        return dict.fromkeys(("IQM", "IQM_low", "IQM_high", "mean", "min", "max"))
    found = stratified([values], iqm_of_last, seed=BOOTSTRAP_SEED)
    bounds = {"mean": values.mean(), "min": values.min(), "max": values.max()}
    return columns("IQM", found, [values]) | {name: float(value) for name, value in bounds.items()}


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
