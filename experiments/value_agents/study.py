"""Trains the agents with values on small tasks, and writes what README.md shows.

python experiments/value_agents/study.py run FOLDER [TASK ...]    trains; runs that ended are kept
python experiments/value_agents/study.py write FOLDER             scores.csv, curves.csv, figures

Every run is one command of rlx in a process of its own, in FOLDER/<task>/<agent>/<seed>. As many
run at a time as this process has cores, each bound to one of them: a wall time is that of one core.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from rlx.runs.folders import read_rows
from rlx.statistics import summarize

HERE = Path(__file__).parent
METRIC = "evaluation/return_mean"
SEEDS = range(5)
FEEDFORWARD = ("dqn", "c51", "qr_dqn", "iqn")
RECURRENT = ("r2d2_small", *FEEDFORWARD)
EVALUATED = "evaluation.every_env_steps=10000"


def each(experiment: str, agents: Sequence[str], *more: str) -> dict[str, list[str]]:
    """The overrides of each agent's run; `{}` in the experiment's name is the agent's."""
    return {a: [f"experiment={experiment.format(a)}", *(m.format(a) for m in more)] for a in agents}


# task -> variant -> overrides of its run
TASKS: dict[str, dict[str, list[str]]] = {
    "cartpole": each("cartpole_{}", FEEDFORWARD),
    "cartpole_memory": {
        "r2d2": ["total_env_steps=100000", "agent.optimizer.decay_gradient_steps=7500"],
        **each("cartpole_memory_{}", FEEDFORWARD),
    },
    "acrobot": each("acrobot_{}", ["qr_dqn"]),
    "mountaincar": each("mountaincar_{}", ["dqn", "qr_dqn"]),
    "catch": each("catch", RECURRENT, "agent={}"),
    "minigrid_empty": each("minigrid_empty", RECURRENT, "agent={}"),
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
    "minigrid_empty": None,
}


def train(folder: Path, tasks: Sequence[str]) -> None:
    """Makes the runs that are not there yet, seed by seed."""
    free = SimpleQueue[int]()
    cores = os.sched_getaffinity(0)
    for core in cores:
        free.put(core)
    with ThreadPoolExecutor(len(cores)) as pool:
        runs = [
            pool.submit(make, folder, task, variant, seed, free)
            for task in tasks or TASKS
            for seed in SEEDS
            for variant in TASKS[task]
        ]
        for run in as_completed(runs):
            print(*run.result(), flush=True)


def make(
    folder: Path, task: str, variant: str, seed: int, free: SimpleQueue[int]
) -> tuple[str, str, int, float]:
    """(task, variant, seed, greedy return) of a run, which is made on a free core if need be."""
    run = folder / task / variant.replace(" ", "_") / str(seed)
    if not (run / "summary.json").exists():
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


def summary(run: Path) -> Any:
    """Reads the summary that a run wrote at its end."""
    return json.loads((run / "summary.json").read_text())


def ended(folder: Path) -> Iterator[tuple[str, str, int, Path]]:
    """(task, variant, seed, folder) of the runs that ended."""
    for task, variants in TASKS.items():
        for variant in variants:
            for path in sorted((folder / task / variant.replace(" ", "_")).glob("*/summary.json")):
                yield task, variant, int(path.parent.name), path.parent


def write(folder: Path) -> None:
    """Writes the raw numbers beside this file, draws them, and prints the tables."""
    runs = list(ended(folder))
    with (HERE / "scores.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        names = ("env_steps", "updates", "wall_s", "evaluation_return", "train_return")
        writer.writerow(["task", "variant", "seed", *names])
        for task, variant, seed, run in runs:
            found = summary(run)
            writer.writerow([task, variant, seed, *(round(found[name], 2) for name in names)])
    with (HERE / "curves.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["task", "variant", "seed", "env_steps", "evaluation_return_mean"])
        for task, variant, seed, run in runs:
            for env_steps, value in curve(run):
                writer.writerow([task, variant, seed, env_steps, round(value, 2)])
    for task in TASKS:
        mine = [(variant, seed, run) for name, variant, seed, run in runs if name == task]
        if mine:
            draw(task, mine)
            table(task, mine)


def curve(run: Path) -> list[tuple[int, float]]:
    """(env steps, mean greedy return) of the evaluations during a run."""
    rows = [row for row in read_rows(run / "metrics.jsonl") if row[METRIC] is not None]
    return [(row["env_steps"], row[METRIC]) for row in rows]


def table(task: str, runs: Sequence[tuple[str, int, Path]]) -> None:
    """Prints a task's table in Markdown."""
    print(f"\n### {task}\n\n| variant | seeds | greedy return, IQM | 95 % | each seed | wall |")
    print("|---|---|---|---|---|---|")
    for variant in TASKS[task]:
        found = [summary(run) for name, _, run in runs if name == variant]
        if not found:
            continue
        scores = [one["evaluation_return"] for one in found]
        said = summarize(scores, seed=0)
        walls = [one["wall_s"] for one in found]
        print(
            f"| {variant} | {len(scores)} | {said['iqm']:.1f} | {said['iqm_low']:.1f} to "
            f"{said['iqm_high']:.1f} | {', '.join(f'{s:.1f}' for s in scores)} | "
            f"{min(walls):.0f} to {max(walls):.0f} s |"
        )


def draw(task: str, runs: Sequence[tuple[str, int, Path]]) -> None:
    """Draws the curves of a task: each seed thin, the variant's mean thick."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for i, variant in enumerate(TASKS[task]):
        curves = [np.array(curve(run)) for name, _, run in runs if name == variant]
        curves = [found for found in curves if len(found)]
        if not curves:
            continue
        for found in curves:
            axes.plot(found[:, 0], found[:, 1], color=f"C{i}", alpha=0.3, lw=0.8)
        grid = np.linspace(
            max(found[0, 0] for found in curves), min(found[-1, 0] for found in curves), 50
        )
        mean = np.mean([np.interp(grid, found[:, 0], found[:, 1]) for found in curves], axis=0)
        axes.plot(grid, mean, color=f"C{i}", lw=2, label=f"{variant} ({len(curves)} seeds)")
    if GOALS.get(task) is not None:
        axes.axhline(GOALS[task], color="0.6", ls=":", lw=1)
    axes.set(title=task, xlabel="env steps", ylabel="greedy return, mean of 20 episodes")
    axes.legend(fontsize="small")
    figure.savefig(HERE / f"{task}.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    action, folder, *tasks = sys.argv[1:]
    {"run": train, "write": lambda folder, tasks: write(folder)}[action](Path(folder), tasks)
