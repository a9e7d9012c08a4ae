"""Trains the agents with values on small tasks, and writes what README.md shows.

python experiments/value_agents/study.py run FOLDER [TASK ...]    trains; runs that ended are kept
python experiments/value_agents/study.py write FOLDER             raw numbers, figures, the table

A TASK may name one variant, too: catch/dqn. `write` keeps the numbers of variants that
FOLDER has no run of.

Every run is one command of rlx in a process of its own, in FOLDER/<task>/<agent>/<seed>. As many
run at a time as this process has cores, each bound to one of them: a wall time is that of one core.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import yaml
from matplotlib.axes import Axes

from rlx.runs.folders import read_rows
from rlx.statistics import summarize

HERE = Path(__file__).parent
METRIC = "evaluation/return_mean"
COLUMNS = ("env_steps", "updates", "wall_s", "evaluation_return", "train_return")
SEEDS = range(5)
FEEDFORWARD = ("dqn", "c51", "qr_dqn", "iqn")
RECURRENT = (*FEEDFORWARD, "r2d2_small")
EVALUATED = "evaluation.every_env_steps=10000"


def each(experiment: str, agents: Sequence[str], *more: str) -> dict[str, list[str]]:
    """The overrides of each agent's run; `{}` in the experiment's name is the agent's."""
    return {a: [f"experiment={experiment.format(a)}", *(m.format(a) for m in more)] for a in agents}


# 5-step, and a target that moves with each update
SLOWLY = ("agent.n_step=5", "agent.target_period_updates=null", "agent.target_rate=0.01")
# task -> variant -> overrides of its run
TASKS: dict[str, dict[str, list[str]]] = {
    "cartpole": each("cartpole_{}", FEEDFORWARD),
    "cartpole_memory": {
        **each("cartpole_memory_{}", (*FEEDFORWARD, "r2d2")),
        "default run": [
            "total_env_steps=100000",
            "agent.optimizer.decay_gradient_steps=7500",
        ],
    },
    "acrobot": each("acrobot_{}", ["qr_dqn"]),
    "mountaincar": each("mountaincar_{}", ["dqn", "qr_dqn"]),
    "catch": each("catch", RECURRENT, "agent={}", "agent.optimizer.decay_gradient_steps=5400"),
    "minigrid_empty": {
        **each("minigrid_empty", ("dqn", "qr_dqn", "iqn"), "agent={}"),
        "c51": [
            "experiment=minigrid_empty",
            "agent=c51",
            "agent.lowest=0",
            "agent.highest=1",
            *SLOWLY,
        ],
        "r2d2_small": ["experiment=minigrid_empty", "agent=r2d2_small", *SLOWLY],
    },
    "ablations": {
        "dqn": ["experiment=cartpole_dqn"],
        "without double": ["experiment=cartpole_dqn", "agent.double_q=false"],
        "1-step": ["experiment=cartpole_dqn", "agent.n_step=1"],
        "dueling": [
            "experiment=cartpole_dqn",
            "agent.head._target_=rlx.networks.heads.Dueling",
            "agent.head.hidden=64",
        ],
        "Munchausen": [
            "experiment=cartpole_dqn",
            "agent.munchausen={_target_: rlx.agents.munchausen.Munchausen, scale: 0.9, "
            "temperature: 0.03, lowest: -1.0}",
            "agent.double_q=false",
            "agent.rescale_epsilon=null",
        ],
        "prioritised": ["experiment=cartpole_dqn", "replay=prioritized"],
        "without rescaling": ["experiment=cartpole_dqn", "agent.rescale_epsilon=null"],
        "copied target": [
            "experiment=cartpole_dqn",
            "agent.target_period_updates=200",
            "agent.target_rate=null",
        ],
    },
}
GOALS = {
    "cartpole": 475,
    "cartpole_memory": 450,
    "acrobot": -80,
    "mountaincar": -110,
    "catch": 1,
    "minigrid_empty": 0.9,
}
COLOURS = {"dqn": "C0", "c51": "C1", "qr_dqn": "C2", "iqn": "C3", "r2d2": "C4", "r2d2_small": "C4"}
LOWEST = {"catch": -1, "minigrid_empty": 0}  # returns that there are, where curves are flat
BEGIN, END = "<!-- made by study.py -->", "<!-- until here -->"
HEADER = (
    "",
    "| task | variant | mean | IQM | 95 % | each seed | first at the goal | wall, s |",
    "|---|---|---|---|---|---|---|---|",
)


def train(folder: Path, wanted: Sequence[str]) -> None:
    """Makes the runs that are not there yet, seed by seed."""
    names = {*TASKS, *(f"{task}/{variant}" for task in TASKS for variant in TASKS[task])}
    if unknown := set(wanted) - names:
        sys.exit(
            f"{', '.join(sorted(unknown))}: no such task; accepted: {', '.join(sorted(names))}"
        )
    free = SimpleQueue[int]()
    cores = os.sched_getaffinity(0)
    for core in cores:
        free.put(core)
    with ThreadPoolExecutor(len(cores)) as pool:
        runs = [
            pool.submit(make, folder, task, variant, seed, free)
            for task in TASKS
            for seed in SEEDS
            for variant in TASKS[task]
            if not wanted or {task, f"{task}/{variant}"} & set(wanted)
        ]
        for run in as_completed(runs):
            print(*run.result(), flush=True)


def make(
    folder: Path, task: str, variant: str, seed: int, free: SimpleQueue[int]
) -> tuple[str, str, int, float]:
    """(task, variant, seed, greedy return) of a run, which is made on a free core if need be."""
    run = folder / task / variant.replace(" ", "_") / str(seed)
    if not is_finished(run, task, variant):
        shutil.rmtree(run, ignore_errors=True)  # what a stopped study left
        core = free.get()
        command = [sys.executable, "-m", "rlx.train", *TASKS[task][variant], EVALUATED]
        quiet = ["logging.console=off", "checkpoint.replay=false"]
        where = [f"seed={seed}", f"hydra.run.dir={run}"]
        bind = partial(os.sched_setaffinity, 0, {core})
        try:
            subprocess.run([*command, *quiet, *where], check=True, preexec_fn=bind)
        finally:
            free.put(core)
    return task, variant, seed, summary(run)["evaluation_return"]


def is_finished(run: Path, task: str, variant: str) -> bool:
    """True if the variant's run came to its end; one that was interrupted writes a summary, too."""
    if not (run / "summary.json").exists() or summary(run)["state"] != "finished":
        return False
    given = yaml.safe_load((run / ".hydra/overrides.yaml").read_text())
    return set(TASKS[task][variant]) <= set(given)


def summary(run: Path) -> Any:
    """Reads the summary that a run wrote at its end."""
    return json.loads((run / "summary.json").read_text())


@dataclass(frozen=True)
class Run:
    """Holds what is written of a run that came to its end."""

    task: str
    variant: str
    seed: int
    numbers: dict[str, float]  # by the names of COLUMNS
    curve: list[tuple[int, float]]  # (env steps, mean greedy return) of evaluations on the way

    @property
    def key(self) -> tuple[str, str, int]:
        return self.task, self.variant, self.seed


def write(folder: Path) -> None:
    """Writes the raw numbers beside this file, draws them, and puts the table into README.md.

    Of variants that the folder has no run of, the numbers that are written already stay.
    """
    new = list(ended(folder))
    replaced = {run.key[:2] for run in new}
    kept = [run for run in written() if run.key[:2] not in replaced]
    found = {run.key: run for run in (*kept, *new)}
    order = [(task, variant, seed) for task in TASKS for variant in TASKS[task] for seed in SEEDS]
    runs = [found[key] for key in order if key in found]
    save("scores.csv", COLUMNS, ((*run.key, *run.numbers.values()) for run in runs))
    points = ((*run.key, *point) for run in runs for point in run.curve)
    save("curves.csv", ("env_steps", "evaluation_return_mean"), points)
    draw("curves", [task for task in GOALS if any(run.task == task for run in runs)], runs)
    if any(run.task == "ablations" for run in runs):
        draw("ablations", ["ablations"], runs)
    before, _, rest = (HERE / "README.md").read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    rows = [row for task in TASKS for row in table(task, [run for run in runs if run.task == task])]
    (HERE / "README.md").write_text("\n".join([before + BEGIN, *HEADER, *rows, "", END + after]))


def ended(folder: Path) -> Iterator[Run]:
    """Reads the runs of a folder that came to their end."""
    for task, variants in TASKS.items():
        for variant in variants:
            for path in sorted((folder / task / variant.replace(" ", "_")).glob("*/summary.json")):
                if is_finished(path.parent, task, variant):
                    said = summary(path.parent)
                    numbers = {name: said[name] for name in COLUMNS}
                    yield Run(task, variant, int(path.parent.name), numbers, curve(path.parent))


def curve(run: Path) -> list[tuple[int, float]]:
    """(env steps, mean greedy return) of the evaluations during a run."""
    rows = [row for row in read_rows(run / "metrics.jsonl") if row[METRIC] is not None]
    return [(row["env_steps"], row[METRIC]) for row in rows]


def written() -> Iterator[Run]:
    """Reads the runs whose numbers are beside this file."""
    curves = defaultdict[tuple[str, ...], list[tuple[int, float]]](list)
    for *key, env_steps, score in load("curves.csv"):
        curves[tuple(key)].append((int(env_steps), float(score)))
    for task, variant, seed, *numbers in load("scores.csv"):
        known = dict(zip(COLUMNS, map(json.loads, numbers), strict=True))
        yield Run(task, variant, int(seed), known, curves[task, variant, seed])


def load(name: str) -> list[list[str]]:
    """The rows of a CSV beside this file, without its header; none if there is no file."""
    if not (HERE / name).exists():
        return []
    with (HERE / name).open(newline="") as file:
        return list(csv.reader(file))[1:]


def save(name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a CSV beside this file."""
    with (HERE / name).open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["task", "variant", "seed", *columns])
        writer.writerows(rows)


def table(task: str, runs: Sequence[Run]) -> list[str]:
    """The rows of a task's variants, in Markdown."""
    rows = []
    for variant in TASKS[task]:
        mine = [run for run in runs if run.variant == variant]
        if not mine:
            continue
        scores = [run.numbers["evaluation_return"] for run in mine]
        walls = [run.numbers["wall_s"] for run in mine]
        said = summarize(scores, seed=0)
        digits = 2 if max(map(abs, scores)) < 10 else 1
        each_one = ", ".join(f"{score:.{digits}f}" for score in scores)
        wall = f"{min(walls):.0f} to {max(walls):.0f}"
        interval = f"{said['iqm_low']:.{digits}f} to {said['iqm_high']:.{digits}f}"
        rows.append(
            f"| {task} | {variant} | {np.mean(scores):.{digits}f} | {said['iqm']:.{digits}f} | "
            f"{interval} | {each_one} | {firsts(task, mine)} | {wall} |"
        )
    return rows


def firsts(task: str, runs: Sequence[Run]) -> str:
    """The env steps, in thousands, of each run's first evaluation at the task's goal."""
    goal = GOALS.get(task, GOALS["cartpole"])
    found = [next((x for x, y in run.curve if y >= goal), None) for run in runs]
    return ", ".join("never" if x is None else f"{x / 1000:.0f}" for x in found)


def draw(name: str, tasks: Sequence[str], runs: Sequence[Run]) -> None:
    """Draws a panel for each task: each seed thin, the variant's mean thick."""
    columns = min(len(tasks), 2)
    figure, panels = plt.subplots(
        -(-len(tasks) // columns),
        columns,
        figsize=(8 if columns == 1 else 12, 4 * -(-len(tasks) // columns)),
        layout="constrained",
        squeeze=False,
    )
    for task, axes in zip(tasks, panels.flat, strict=False):
        for i, variant in enumerate(TASKS[task]):
            mine = [np.array(run.curve) for run in runs if run.key[:2] == (task, variant)]
            if found := [points for points in mine if len(points)]:
                line(axes, found, COLOURS.get(variant, f"C{i}"), f"{variant} ({len(found)} seeds)")
        if task in GOALS:
            axes.axhline(GOALS[task], color="0.6", ls=":", lw=1)
        axes.set_ylim(bottom=LOWEST.get(task))
        axes.set(title=task, xlabel="env steps", ylabel="greedy return, mean of 20 episodes")
        axes.legend(fontsize="small")
    for axes in panels.flat[len(tasks) :]:
        axes.remove()
    figure.savefig(HERE / f"{name}.png", dpi=90)
    plt.close(figure)


def line(axes: Axes, curves: Sequence[np.ndarray], colour: str, label: str) -> None:
    """Draws curves [points, 2] thin, and their mean where all of them have points."""
    for points in curves:
        axes.plot(points[:, 0], points[:, 1], color=colour, alpha=0.3, lw=0.8)
    first, last = max(c[0, 0] for c in curves), min(c[-1, 0] for c in curves)
    grid = np.linspace(first, last, 50)
    mean = np.mean([np.interp(grid, c[:, 0], c[:, 1]) for c in curves], axis=0)
    axes.plot(grid, mean, color=colour, lw=2, label=label)


if __name__ == "__main__":
    action, folder, *tasks = sys.argv[1:]
    {"run": train, "write": lambda folder, tasks: write(folder)}[action](Path(folder), tasks)
