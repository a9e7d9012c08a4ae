"""Finished, running and failed runs as tables: `rlx.results.load("multirun/2026-11-20")`.

`load` gives one row per row of metrics, `runs` one row per run; both are pandas DataFrames and
list every run that was begun below a folder, whatever became of it. pip install 'rlx[report]'
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlx.machine.packages import import_package
from rlx.problems import cut
from rlx.runs.folders import MARKS, METRICS_FILE, RunFolder, find, flat, number, read_rows

if TYPE_CHECKING:
    import pandas as pd

JSON = dict[str, Any]

SEED = "seed"
IGNORED = ("resume", "compile_cache")  # settings that say nothing about what was learnt
COUNTS = ("env_steps", "frames", "updates", "wall_s")
# Where a run's score may come from, the best first.
SCORES: Mapping[str, str] = {
    "evaluation.json": "mean return of the newest evaluation by rlx.evaluate, as the run's own",
    "evaluation": "mean return of the run's own last evaluation",
    "training": "mean return of the last episodes of training",
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """The content of one run's folder."""

    name: str  # relative to the folder that was searched
    path: Path
    state: str  # as RunFolder.state says
    error: str | None
    settings: Mapping[str, Any]  # dotted name -> value
    choices: Mapping[str, str]  # group -> the YAML chosen, where Hydra wrote it down
    overrides: frozenset[str]  # settings that were named on the command line
    rows: Sequence[JSON]
    summary: JSON
    evaluations: Sequence[JSON]  # of evaluation.json, by the run's own protocol, the newest last

    @property
    def scores(self) -> dict[str, float | None]:
        """The final mean returns, by the names of SCORES; None where there is none."""
        newest = self.evaluations[-1].get("mean") if self.evaluations else None
        return {
            "evaluation.json": number(newest),
            "evaluation": number(self.summary.get("evaluation_return")),
            "training": number(self.summary.get("train_return")),
        }

    @property
    def episodes(self) -> dict[str, float | None]:
        """The number of episodes that each of `scores` is the mean of; None where none is told."""
        newest = self.evaluations[-1].get("episodes") if self.evaluations else None
        final, usual = (
            self.settings.get(f"evaluation.{n}") for n in ("final_episodes", "episodes")
        )
        counts = self._last("train/episodes"), number(self.settings.get("logging.window_episodes"))
        return {
            "evaluation.json": number(newest),
            "evaluation": number(final) or number(usual),
            "training": None if None in counts else min(n for n in counts if n is not None),
        }

    @property
    def frames(self) -> float | None:
        """Emulator frames of the last row of metrics, over all lanes; None where it has none."""
        return self._last("frames")

    def _last(self, name: str) -> float | None:
        return number(self.rows[-1].get(name)) if self.rows else None


# --- tables --------------------------------------------------------------------------------------


def load(folder: Path | str) -> pd.DataFrame:
    """One row per row of metrics of every run below a folder (or of the run that it is).

    Columns: run, state, the settings that vary between the runs, and the metrics. A run without
    metrics has one row without them. Raises ValueError where there is no run.
    """
    pd = need("pandas")
    found = read(folder)
    settings = varying(found)
    rows = [
        {"run": run.name, "state": run.state} | _shown(run, settings) | row
        for run in found
        for row in (run.rows or [{}])
    ]
    return pd.DataFrame(rows)


def runs(folder: Path | str) -> pd.DataFrame:
    """One row per run below a folder, failed ones too.

    Columns: run, state, error, the settings that vary, the counts of the last row of metrics, and
    the final mean returns by where they come from (SCORES). ValueError where there is no run.
    """
    pd = need("pandas")
    found = read(folder)
    return pd.DataFrame(run_rows(found, varying(found)))


def run_rows(found: Sequence[Run], settings: Iterable[str]) -> list[JSON]:
    """The rows of `runs`, in its order."""
    settings = list(settings)
    rows = []
    for run in found:
        last = run.rows[-1] if run.rows else {}
        about: JSON = {"run": run.name, "state": run.state, "error": run.error}
        rows.append(about | _shown(run, settings) | {k: last.get(k) for k in COUNTS} | run.scores)
    return rows


def need(library: str) -> Any:
    """Imports a module, or raises an ImportError that says what to install."""
    try:
        return import_package(library)
    except ImportError as error:
        raise ImportError(f"{library} is not installed; pip install 'rlx[report]'") from error


# --- settings ------------------------------------------------------------------------------------


def varying(found: Sequence[Run]) -> list[str]:
    """The settings and group choices that are not the same in all runs; choices come first.

    A setting that follows from the groups chosen, and that nobody named, is left out.
    """
    known = [run.choices for run in found]
    groups = [g for g in _names(known) if all(known) and len({c.get(g) for c in known}) > 1]
    named = frozenset[str]().union(*(run.overrides for run in found))
    settings = [
        name
        for name in _names(run.settings for run in found)
        if name not in IGNORED
        and len({value_of(run, name) for run in found}) > 1
        and (name == SEED or name in named or not _follows(found, name, groups))
    ]
    return [*groups, *settings]


def value_of(run: Run, name: str) -> Any:
    """A setting's value, or a group's choice; lists as text, None where the run has none."""
    value = run.settings.get(name, run.choices.get(name))
    return json.dumps(value) if isinstance(value, list | dict) else value


def _follows(found: Sequence[Run], name: str, groups: Sequence[str]) -> bool:
    """Says whether the chosen groups determine a setting's value."""
    values: dict[tuple[Any, ...], set[Any]] = {}
    for run in found:
        chosen = tuple(run.choices.get(group) for group in groups)
        values.setdefault(chosen, set()).add(value_of(run, name))
    return bool(groups) and all(len(several) == 1 for several in values.values())


def _names(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def _shown(run: Run, settings: Iterable[str]) -> JSON:
    return {name: value_of(run, name) for name in settings}


# --- reading folders -----------------------------------------------------------------------------


def read(folder: Path | str) -> list[Run]:
    """Every run below a folder, in the order of their names; a ValueError if there is none."""
    root = Path(folder)
    paths = find(root)
    if not paths:
        marks = ", ".join(MARKS)
        raise ValueError(f"{folder} has no run in it (below it is none of {marks})")
    return [_read(path, root) for path in paths]


def _read(path: Path, root: Path) -> Run:
    folder = RunFolder(path)
    state, note = folder.state()
    error = note or None
    rows: list[JSON] = []
    try:
        rows = read_rows(path / METRICS_FILE)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as broken:
        error = str(broken)
    return Run(
        name=cut(path.relative_to(root).as_posix() if path != root else path.resolve().name, 1000),
        path=path,
        state=state,
        error=error,
        settings=flat(folder.settings),
        choices=folder.choices,
        overrides=frozenset(text.partition("=")[0].lstrip("+~") for text in folder.overrides),
        rows=rows,
        summary=folder.summary,
        evaluations=folder.evaluations,
    )
