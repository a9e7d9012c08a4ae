"""Writes the one table of README.md: every claim, with its command, cost, score and figure.

python experiments/claims.py

Claims of the studies come from their raw numbers (scores.csv); claims.csv and speed.csv have the
others. A commit is the one that recorded the numbers, or that was measured, where it is known.
"""

from __future__ import annotations

import csv
import importlib
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from studies import Run, Study, written

from rlx.statistics import summarize

HERE = Path(__file__).resolve().parent
STUDIES = ("value_agents", "policy_agents", "atari", "warm_start", "demonstrations")
BEGIN, END = "<!-- made by claims.py -->", "<!-- until here -->"
NAMES = ("claim", "command", "machine", "wall", "env steps", "seeds", "score", "commit", "more")
SPEED = ("claim", "command", "machine", "figure", "date", "more")


def study_rows(name: str) -> Iterator[list[str]]:
    """The rows of a study: one for each task and variant that has runs."""
    study: Study = importlib.import_module(f"{name}.study").STUDY
    runs = list(written(study))
    for task, variants in study.tasks.items():
        figure = next((f for f, tasks in study.figures.items() if task in tasks), None)
        for variant, overrides in variants.items():
            mine = [run for run in runs if run.key[:2] == (task, variant)]
            if mine:
                drawn = f", [figure]({name}/{figure}.png)" if figure else ""
                yield [
                    f"{task}, {variant}",
                    f"`{shlex.join(['python', '-m', 'rlx.train', *overrides])}`",
                    "1 core",
                    *numbers(mine),
                    study.again.get(f"{task}/{variant}", study.measured),
                    f"[{name}]({name}/README.md){drawn}",
                ]


def numbers(runs: Sequence[Run]) -> list[str]:
    """Wall time, env steps, seeds, and the mean score with the interval of the IQM."""
    scores = [run.numbers["evaluation_return"] for run in runs]
    walls = [run.numbers["wall_s"] for run in runs]
    said, digits = summarize(scores, seed=0), 2 if max(map(abs, scores)) < 10 else 1
    score = f"{np.mean(scores):.{digits}f}"
    if len(scores) > 1:
        score += f" ({said['iqm_low']:.{digits}f} to {said['iqm_high']:.{digits}f})"
    env_steps = min(int(run.numbers["env_steps"]) for run in runs)
    wall = f"{duration(min(walls))} to {duration(max(walls))}"
    return [wall, f"{env_steps:,}", f"{len(scores)}", score]


def duration(seconds: float) -> str:
    """Seconds, or minutes where there are many."""
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"


def table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    return [f"| {' | '.join(row)} |" for row in (names, ["---"] * len(names), *rows)]


def others(name: str) -> list[list[str]]:
    """The rows of a file of claims, without its header."""
    with (HERE / name).open(newline="") as file:
        return list(csv.reader(file))[1:]


def page() -> str:
    """README.md with today's tables."""
    before, _, rest = (HERE / "README.md").read_text().partition(BEGIN)
    learnt = [row for name in STUDIES for row in study_rows(name)] + others("claims.csv")
    lines = [
        *("## What is learnt", "", *table(NAMES, learnt), ""),
        *("## How fast it is", "", *table(SPEED, others("speed.csv")), ""),
    ]
    return "\n".join([before + BEGIN, "", *lines, END + rest.partition(END)[2]])


if __name__ == "__main__":
    (HERE / "README.md").write_text(page())
