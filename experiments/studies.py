"""A study: many runs of small tasks, and what their README.md shows of them.

The scripts of studies (`experiments/*/study.py`) say which runs there are. `command` is theirs:

python experiments/NAME/study.py run FOLDER [TASK ...]    trains; runs that ended are kept
python experiments/NAME/study.py write FOLDER             raw numbers, figures, the table

A TASK may name one variant, too: catch/dqn. `write` keeps the numbers of variants that
FOLDER has no run of.

Every run is one command of rlx in a process of its own, in FOLDER/<task>/<variant>/<seed>. As many
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
from dataclasses import dataclass, field
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

from rlx.machine.signals import sigterm_interrupts
from rlx.runs.folders import RunFolder, read_rows
from rlx.statistics import summarize

METRIC = "evaluation/return_mean"
COLUMNS = ("env_steps", "updates", "wall_s", "evaluation_return", "train_return")
SEEDS = range(5)
Variants = dict[str, list[str]]
Key = tuple[str, str, int]  # task, variant, seed
Points = Sequence[tuple[int, float]]  # (env steps, mean return)
BEGIN, END = "<!-- made by study.py -->", "<!-- until here -->"
HEADER = (
    "",
    "| task | variant | mean | IQM | 95 % | each seed "
    "| first at the goal, 1,000 env steps | wall, s |",
    "|---|---|---|---|---|---|---|---|",
)


@dataclass(frozen=True, kw_only=True)
class Study:
    """The tasks of a study, and how they are drawn."""

    here: Path  # the folder of README.md, raw numbers and figures
    measured: str  # the commit that recorded the numbers, and its day
    # task -> variant -> overrides of its run; {folder} in one is the FOLDER, {seed} the run's seed
    tasks: dict[str, Variants]
    goals: dict[str, float]  # of the tasks that have one
    figures: dict[str, Sequence[str]]  # tasks of each figure, by its file's name
    again: dict[str, str] = field(default_factory=dict)  # task/variant -> measured since then
    colours: dict[str, str] = field(default_factory=dict)  # of variants
    published: dict[str, dict[str, Points]] = field(default_factory=dict)  # task -> whose -> curve
    lowest: dict[str, float] = field(default_factory=dict)  # returns, where curves are flat
    default_goal: float | None = None  # of the tasks without one, in the table
    evaluated: str = "evaluation.every_env_steps=10000"
    episodes: int = 20  # of an evaluation during training
    seeds: dict[str, int] = field(default_factory=dict)  # of the tasks that have others than SEEDS
    # Tasks whose runs others begin with: they are trained first, in this order, and not drawn.
    sources: dict[str, Variants] = field(default_factory=dict)
    goes_on: bool = False  # a run that was stopped goes on from its checkpoint, else it begins anew

    def seeds_of(self, task: str) -> range:
        """The seeds of a task's runs."""
        return range(self.seeds.get(task, len(SEEDS)))

    @property
    def everything(self) -> dict[str, Variants]:
        """The tasks with those that they begin with, which come first."""
        return {**self.sources, **self.tasks}


def each(experiment: str, agents: Sequence[str], *more: str) -> Variants:
    """The overrides of each agent's run; `{}` in the experiment's name is the agent's."""
    return {a: [f"experiment={experiment.format(a)}", *(m.format(a) for m in more)] for a in agents}


def train(study: Study, folder: Path, wanted: Sequence[str]) -> None:
    """Makes the runs that are not there yet, seed by seed."""
    every = study.everything
    names = {*every, *(f"{task}/{variant}" for task in every for variant in every[task])}
    if unknown := set(wanted) - names:
        sys.exit(
            f"{', '.join(sorted(unknown))}: no such task; accepted: {', '.join(sorted(names))}"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"{folder}: it cannot be made ({error.strerror}); give another folder")
    for tasks in [*([task] for task in study.sources), list(study.tasks)]:
        keys = [
            (task, variant, seed)
            for task in tasks
            for seed in study.seeds_of(task)
            for variant in every[task]
            if not wanted or {task, f"{task}/{variant}"} & set(wanted)
        ]
        make_all(study, folder.resolve(), keys)


def make_all(study: Study, folder: Path, keys: Sequence[Key]) -> None:
    """Makes these runs, as many at a time as there are cores."""
    free = SimpleQueue[int]()
    cores = os.sched_getaffinity(0)
    for core in cores:
        free.put(core)
    started: set[subprocess.Popen[bytes]] = set()
    with ThreadPoolExecutor(len(cores)) as pool:
        runs = [pool.submit(make, study, folder, key, free, started) for key in keys]
        try:
            for run in as_completed(runs):
                print(*(run.result() if run.exception() is None else [run.exception()]), flush=True)
        except BaseException:  # a signal: the runs end with a checkpoint, and no other begins
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(started):
                process.terminate()
            raise
    if failed := sum(run.exception() is not None for run in runs):
        sys.exit(f"{failed} of {len(runs)} runs did not come to their end")


def make(
    study: Study,
    folder: Path,
    key: Key,
    free: SimpleQueue[int],
    started: set[subprocess.Popen[bytes]],
) -> tuple[str, str, int, float]:
    """(task, variant, seed, greedy return) of a run, which is made on a free core if need be.

    started: holds its process while it runs.
    """
    run = folder_of(folder, key)
    if not is_finished(study, folder, key):
        clear(study, run, key)
        core = free.get()
        resumes = ["resume=auto"] if study.goes_on else ["checkpoint.replay=false"]
        where = [f"seed={key[2]}", f"hydra.run.dir={run}"]
        given = overrides(study, folder, key)
        command = [sys.executable, "-m", "rlx.train", *given, *resumes, *where]
        bind = partial(os.sched_setaffinity, 0, {core})
        try:
            with subprocess.Popen(command, preexec_fn=bind) as process:
                started.add(process)
                process.wait()
            started.discard(process)
        finally:
            free.put(core)
        if not is_finished(study, folder, key):
            raise RuntimeError(f"{run} did not come to its end; exit status {process.returncode}")
    return *key, summary(run)["evaluation_return"]


def clear(study: Study, run: Path, key: Key) -> None:
    """Removes what a stopped study left, if the run is to begin anew."""
    if RunFolder(run).state()[0] in ("running", "silent"):
        raise RuntimeError(f"{run}: a process holds it; wait for it, or end it")
    if not study.goes_on:
        shutil.rmtree(run, ignore_errors=True)
    elif not is_of(study, run, key):
        raise RuntimeError(f"{run} was made with other settings; move it away")


def folder_of(folder: Path, key: Key) -> Path:
    task, variant, seed = key
    return folder / task / variant.replace(" ", "_") / str(seed)


def overrides(study: Study, folder: Path, key: Key) -> list[str]:
    """Returns what is learnt and how it is evaluated: the overrides that tell runs apart."""
    quiet = ["logging.console=off", f"evaluation.episodes={study.episodes}"]
    task, variant, seed = key
    named = {"{folder}": str(folder.resolve()), "{seed}": str(seed)}
    own = study.everything[task][variant]
    for name, value in named.items():
        own = [text.replace(name, value) for text in own]
    return [*own, study.evaluated, *quiet]


def is_of(study: Study, run: Path, key: Key) -> bool:
    """True if the run was begun, and last resumed, with the study's own overrides."""
    wanted = set(overrides(study, run.parents[2], key))
    ours = ("resume=", "checkpoint.replay=", "seed=", "hydra.run.dir=")
    for file in run.glob(".hydra/**/overrides.yaml"):
        given = yaml.safe_load(file.read_text())
        if {each for each in given if not each.startswith(ours)} != wanted:
            return False
    return True


def is_finished(study: Study, folder: Path, key: Key) -> bool:
    """True if the variant's run came to its end; one that was interrupted writes a summary, too."""
    run = folder_of(folder, key)
    done = (run / "summary.json").exists() and summary(run)["state"] == "finished"
    return done and is_of(study, run, key)


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


def write(study: Study, folder: Path) -> None:
    """Writes the raw numbers beside this file, draws them, and puts the table into README.md.

    Of variants that the folder has no run of, the numbers that are written already stay.
    """
    new = list(ended(study, folder))
    if not new:
        sys.exit(f"{folder}: no run of this study has ended there; give the folder that `run` got")
    replaced = {run.key[:2] for run in new}
    kept = [run for run in written(study) if run.key[:2] not in replaced]
    found = {run.key: run for run in (*kept, *new)}
    order = [
        (task, variant, seed)
        for task in study.tasks
        for variant in study.tasks[task]
        for seed in study.seeds_of(task)
    ]
    runs = [found[key] for key in order if key in found]
    save(study, "scores.csv", COLUMNS, ((*run.key, *run.numbers.values()) for run in runs))
    points = ((*run.key, *point) for run in runs for point in run.curve)
    save(study, "curves.csv", ("env_steps", "evaluation_return_mean"), points)
    for name, tasks in study.figures.items():
        if found_tasks := [task for task in tasks if any(run.task == task for run in runs)]:
            draw(study, name, found_tasks, runs)
    before, _, rest = (study.here / "README.md").read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    rows = [row for t in study.tasks for row in table(study, t, [r for r in runs if r.task == t])]
    (study.here / "README.md").write_text(
        "\n".join([before + BEGIN, *HEADER, *rows, "", END + after])
    )


def ended(study: Study, folder: Path) -> Iterator[Run]:
    """Reads the runs of a folder that came to their end."""
    for task, variants in study.tasks.items():
        for variant in variants:
            for path in sorted((folder / task / variant.replace(" ", "_")).glob("*/summary.json")):
                run, key = path.parent, (task, variant, int(path.parent.name))
                if is_finished(study, folder, key):
                    said = summary(run)
                    numbers = {name: said[name] for name in COLUMNS}
                    yield Run(*key, numbers, curve(run))
                else:
                    print(f"{run} is left out: not finished, or made with other settings")


def curve(run: Path) -> list[tuple[int, float]]:
    """(env steps, mean greedy return) of the evaluations during a run."""
    rows = [row for row in read_rows(run / "metrics.jsonl") if row[METRIC] is not None]
    return [(row["env_steps"], row[METRIC]) for row in rows]


def written(study: Study) -> Iterator[Run]:
    """Reads the runs whose numbers are beside this file."""
    curves = defaultdict[tuple[str, ...], list[tuple[int, float]]](list)
    for *key, env_steps, score in load(study, "curves.csv"):
        curves[tuple(key)].append((int(env_steps), float(score)))
    for task, variant, seed, *numbers in load(study, "scores.csv"):
        known = dict(zip(COLUMNS, map(json.loads, numbers), strict=True))
        yield Run(task, variant, int(seed), known, curves[task, variant, seed])


def load(study: Study, name: str) -> list[list[str]]:
    """The rows of a CSV beside this file, without its header; none if there is no file."""
    if not (study.here / name).exists():
        return []
    with (study.here / name).open(newline="") as file:
        return list(csv.reader(file))[1:]


def save(study: Study, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a CSV beside this file."""
    with (study.here / name).open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["task", "variant", "seed", *columns])
        writer.writerows(rows)


def table(study: Study, task: str, runs: Sequence[Run]) -> list[str]:
    """The rows of a task's variants, in Markdown."""
    rows = []
    for variant in study.tasks[task]:
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
            f"{interval} | {each_one} | {firsts(study, task, mine)} | {wall} |"
        )
    return rows


def firsts(study: Study, task: str, runs: Sequence[Run]) -> str:
    """The env steps, in thousands, of each run's first evaluation at the task's goal."""
    goal = study.goals.get(task, study.default_goal)
    if goal is None:
        return "-"
    found = [next((x for x, y in run.curve if y >= goal), None) for run in runs]
    return ", ".join("never" if x is None else f"{x / 1000:.0f}" for x in found)


def draw(study: Study, name: str, tasks: Sequence[str], runs: Sequence[Run]) -> None:
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
        for i, variant in enumerate(study.tasks[task]):
            mine = [np.array(run.curve) for run in runs if run.key[:2] == (task, variant)]
            if found := [points for points in mine if len(points)]:
                line(
                    axes,
                    found,
                    study.colours.get(variant, f"C{i}"),
                    f"{variant} ({len(found)} seeds)",
                )
        for style, (whose, points) in enumerate(study.published.get(task, {}).items()):
            x, y = zip(*points, strict=True)
            axes.plot(x, y, color="0.3", ls=(":", "--")[style], lw=1, label=whose)
        if task in study.goals:
            axes.axhline(study.goals[task], color="0.6", ls=":", lw=1)
        axes.set_ylim(bottom=study.lowest.get(task))
        axes.set(title=task, xlabel="env steps")
        axes.set_ylabel(f"greedy return, mean of {study.episodes} episodes")
        axes.legend(fontsize="small")
    for axes in panels.flat[len(tasks) :]:
        axes.remove()
    figure.savefig(study.here / f"{name}.png", dpi=90)
    plt.close(figure)


def line(axes: Axes, curves: Sequence[np.ndarray], colour: str, label: str) -> None:
    """Draws curves [points, 2] thin, and their mean where all of them have points."""
    for points in curves:
        axes.plot(points[:, 0], points[:, 1], color=colour, alpha=0.3, lw=0.8)
    first, last = max(c[0, 0] for c in curves), min(c[-1, 0] for c in curves)
    grid = np.linspace(first, last, 50)
    mean = np.mean([np.interp(grid, c[:, 0], c[:, 1]) for c in curves], axis=0)
    axes.plot(grid, mean, color=colour, lw=2, label=label)


def command(study: Study, arguments: Sequence[str]) -> None:
    """Does what the command line of a study's script asks for."""
    if len(arguments) < 2 or arguments[0] not in ("run", "write"):
        sys.exit("give: run FOLDER [TASK ...], or: write FOLDER")
    action, folder, *tasks = arguments
    if action == "run":
        try:
            with sigterm_interrupts():
                train(study, Path(folder), tasks)
        except KeyboardInterrupt:
            sys.exit("interrupted; the same command goes on")
    else:
        write(study, Path(folder))
