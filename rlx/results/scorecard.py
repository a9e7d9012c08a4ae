"""Shows Atari runs as papers do: human-normalised over games, each game beside published scores.

After Agarwal et al. 2021: the median and the mean are of the games' mean scores, the IQM and the
optimality gap of all runs of all games; intervals draw runs anew within each game. Only finished
runs count, and each row says how many runs, frames and episodes its numbers rest on.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlx.results import atari
from rlx.results.reading import SEED, Run, need, value_of
from rlx.results.study import BOOTSTRAP_SEED, Study, columns, iqm_of_last, study, task_of
from rlx.runs.folders import number
from rlx.statistics import Estimate, optimality_gap, stratified, stratified_means

if TYPE_CHECKING:
    import pandas as pd

NO_CURVE = "no published curve at this many frames"
NAMED = 3  # runs or games that a remark names
LIMITS = ("evaluation.max_env_steps_per_episode", "env.max_episode_steps")  # env steps
WHOLE = 108_000  # emulator frames after which an episode ends in the papers (30 minutes of play)

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ScoreCard:
    """The Atari runs of a study as pandas tables."""

    over_games: pd.DataFrame  # a row for each group
    by_game: pd.DataFrame  # a row for each game and group


def score_card(folder: Path | str, by: Sequence[str] | None = None) -> ScoreCard:
    """Makes the score card of all Atari runs below a folder.

    by: the settings that make groups; None: all that vary but the seed and the task. Raises
    ValueError where no run is of one of the 57 games, ConfigError for an unknown setting.
    """
    pd = need("pandas")
    given = study(Path(folder), by)
    if not given.games:
        says = f"{folder} has no run of one of the 57 Atari games; its tasks are "
        raise ValueError(says + ", ".join(given.tasks))
    return ScoreCard(
        over_games=pd.DataFrame(over_games(given)), by_game=pd.DataFrame(by_game(given))
    )


# --- over games ----------------------------------------------------------------------------------


def over_games(given: Study) -> list[Row]:
    """The human-normalised scores of each group over its games, and what they rest on."""
    rows = []
    for label, every in given.groups.items():
        runs = [run for run in every if task_of(run) in given.games]
        found = list(given.normalized(label).values())
        if not runs:
            continue
        counted = _counted(given, runs)
        row = {"group": label, "games": len(found), "runs": len(counted)}
        row |= {"not counted": len(runs) - len(counted)} | _basis(given, counted)
        rows.append(row | _aggregates(found) | {"remarks": "; ".join(_remarks(given, runs))})
    return rows


def _aggregates(games: list[np.ndarray]) -> Row:
    """The four aggregates; their intervals only if each game has two runs to draw from."""
    makers: dict[str, Callable[[list[np.ndarray]], Estimate]] = {
        "median": lambda games: stratified_means(games, _median, seed=BOOTSTRAP_SEED),
        "mean": lambda games: stratified_means(games, _mean, seed=BOOTSTRAP_SEED),
        "IQM": lambda games: stratified(games, iqm_of_last, seed=BOOTSTRAP_SEED),
        "optimality gap": lambda games: optimality_gap(games, seed=BOOTSTRAP_SEED),
    }
    if not games:
        return {f"{name}{part}": None for name in makers for part in ("", "_low", "_high")}
    row: Row = {}
    for name, make in makers.items():
        row |= columns(name, make(games), *([scores] for scores in games))
    return row


def _median(values: np.ndarray) -> Any:
    return np.median(values, axis=-1)


def _mean(values: np.ndarray) -> Any:
    return values.mean(axis=-1)


def _remarks(given: Study, runs: Sequence[Run]) -> list[str]:
    """Says what a reader of a group's numbers must know, beginning with what is not in them."""
    counted = _counted(given, runs)
    runs_of = Counter(task_of(run) for run in counted)
    seeds = {(task_of(run), value_of(run, SEED)) for run in counted}
    said = []
    if left := [run for run in runs if run not in counted]:
        said.append(f"not counted: {_few([f'{run.name} ({run.state})' for run in left])}")
    if without := [task for task in given.games if task not in runs_of]:
        said.append(f"no finished run of {_few(without)}")
    if single := [task for task, n in runs_of.items() if n == 1]:
        said.append(f"no interval: one run of {_few(single)}")
    if len(set(runs_of.values())) > 1:
        said.append("unequal numbers of runs: games with more weigh more in IQM and gap")
    if len({given.games[task] for task in runs_of}) < len(runs_of):
        said.append("a game under two ids counts twice")
    if len(seeds) < len(counted):
        said.append("several runs of one seed in a game")
    cut = min(map(_cut_at, counted), default=math.inf)
    if cut < WHOLE and given.score != "training":
        said.append(f"evaluated episodes are cut at {cut:,.0f} frames")
    frames = _frames(counted)
    if frames and max(frames) > (1 + atari.EQUAL) * min(frames):
        said.append("runs of unequal frames")
    return said


def _cut_at(run: Run) -> float:
    """The emulator frames after which an evaluated episode is ended; infinity: none."""
    limits = (number(run.settings.get(name)) for name in LIMITS)
    row = run.rows[-1] if run.rows else {}
    frames, env_steps = number(row.get("frames")), number(row.get("env_steps"))
    skip = frames / env_steps if frames and env_steps else 1
    return min((limit * skip for limit in limits if limit is not None), default=math.inf)


def _few(names: Sequence[str]) -> str:
    further = f" and {len(names) - NAMED} further" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + further


# --- each game -----------------------------------------------------------------------------------


def by_game(given: Study) -> list[Row]:
    """Each game's scores, group by group, beside published ones with their own frames."""
    rows = []
    for task, name in sorted(given.games.items(), key=lambda pair: pair[1]):
        for label, every in given.groups.items():
            runs = [run for run in every if task_of(run) == task]
            if runs:
                ours = _ours(given, label, task, runs)
                rows.append((ours | _published(name), _at_equal_frames(name, ours)))
    agents = sorted({agent for _, points in rows for agent in points})
    return [row | _beside(points, agents) for row, points in rows]


def _ours(given: Study, label: str, task: str, runs: Sequence[Run]) -> Row:
    counted, name = _counted(given, runs), given.games[task]
    row = {"game": name, "task": task, "group": label, "runs": len(counted)}
    row |= {"not counted": len(runs) - len(counted)} | _basis(given, counted)
    scores = given.scores(label).get(task, np.array([]))
    for title, values in {
        "score": scores,
        "human-normalised": atari.human_normalized(name, scores),
    }.items():
        if len(values):
            row |= columns(title, stratified([values], _mean, seed=BOOTSTRAP_SEED), [values])
        else:
            row |= dict.fromkeys((title, f"{title}_low", f"{title}_high"))
    return row


def _published(name: str) -> Row:
    known = atari.scores()[name]
    final = {published.title: known.get(key) for key, published in atari.PUBLISHED.items()}
    return {"random": known["random"], "human": known["human"]} | final


def _at_equal_frames(name: str, ours: Row) -> dict[str, atari.Point]:
    least, most = ours["frames, least"], ours["frames, most"]
    return {} if least is None else atari.at_equal_frames(name, least, most)


def _beside(points: dict[str, atari.Point], agents: Sequence[str]) -> Row:
    """The scores of published curves at as many frames as ours, or that there is none."""
    told = {f"{point.frames:,.0f} frames, {point.runs} runs" for point in points.values()}
    row: Row = {"published at equal frames": "; ".join(sorted(told)) or NO_CURVE}
    scores = {agent: points[agent].score if agent in points else None for agent in agents}
    return row | {f"{agent}, equal frames": score for agent, score in scores.items()}


# --- what numbers rest on ------------------------------------------------------------------------


def _counted(given: Study, runs: Sequence[Run]) -> list[Run]:
    """The runs that a final score is of, as Study.scores has them."""
    return [r for r in runs if r.state == "finished" and r.scores[given.score] is not None]


def _frames(runs: Sequence[Run]) -> list[float]:
    return [run.frames for run in runs if run.frames is not None]


def _basis(given: Study, runs: Sequence[Run]) -> Row:
    """Seeds, emulator frames of a run and episodes of all runs; None where a run does not tell."""
    frames = _frames(runs)
    is_known = bool(runs) and len(frames) == len(runs)
    episodes = [run.episodes[given.score] for run in runs]
    return {
        "seeds": len({value_of(run, SEED) for run in runs}),
        "frames, least": min(frames) if is_known else None,
        "frames, most": max(frames) if is_known else None,
        "episodes": None if not runs or None in episodes else sum(n for n in episodes if n),
    }


def left_out(given: Study) -> list[str]:
    """The tasks that are none of the 57 games, which no human-normalised number includes."""
    return [task for task in given.tasks if task not in given.games]
