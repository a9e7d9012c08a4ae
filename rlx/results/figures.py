"""The figures of a report, as PNG files: one palette, one style, the number of runs in each."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlx.results.reading import Run, need
from rlx.results.study import CURVES, Curve, Study, curve, human_curve, plural, profiles, task_of
from rlx.runs.metrics import TASK_RETURN, rungs_in, tasks_in
from rlx.runs.times import STAGES
from rlx.statistics import Estimate

# Okabe and Ito's colours, which the colour-blind tell apart; lines change their dashes after them.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.5)))
GREY = "#BBBBBB"
STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.8,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "text.parse_math": False,  # settings may have $ in them
}
TITLES = {CURVES[0]: "evaluation return, mean", CURVES[1]: "training return, mean"}
UNITS = {"env_steps": "env steps", "frames": "emulator frames"}
LINES = len(PALETTE) * len(DASHES)  # of groups that are told apart; further ones are grey
FURTHER = "further groups, which are in the tables"
PAIRS = 15  # of groups, in the figure of improvements
STAGES_SHOWN = 6
PANELS = 12  # of groups, in the figure of stages


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure that was written."""

    path: Path
    title: str
    caption: str


def draw(given: Study, folder: Path) -> list[Picture]:
    """Writes the figures there is something to show in."""
    makers: dict[str, Callable[[Study], tuple[Any, str, str] | None]] = {
        "curves_env_steps": lambda study: learning(study, "env_steps"),
        "curves_frames": lambda study: learning(study, "frames"),
        "curves_human": human,
        "tasks": each_task,
        "rungs": rungs,
        "profile": profile,
        "improvement": better,
        "throughput": throughput,
        "stages": stages,
    }
    pictures = []
    with _style():
        for name, make in makers.items():
            if made := make(given):
                figure, title, caption = made
                path = folder / f"{name}.png"
                figure.savefig(path.with_name(f".{path.name}"), format="png", dpi=150)
                path.with_name(f".{path.name}").replace(path)
                pictures.append(Picture(path=path, title=title, caption=caption))
    return pictures


@contextmanager
def _style() -> Iterator[None]:
    with need("matplotlib").rc_context(STYLE):
        yield


def _panels(number: int, height: float = 3.4) -> tuple[Any, list[Any]]:
    """A figure with that many axes, in at most three columns; inches."""
    from matplotlib.figure import Figure

    columns = min(number, 3 if number > 4 else 2)
    rows = -(-number // columns)
    width = {1: 6.4, 2: 8.0, 3: 10.0}[columns]
    figure = Figure(figsize=(width, rows * (height if columns == 1 else 0.8 * height) + 0.4))
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for spare in axes[number:]:
        spare.remove()
    return figure, axes[:number]


def _colors(given: Study) -> dict[str, dict[str, Any]]:
    """label -> how its line is drawn, the same in every figure."""
    size = len(PALETTE)
    further = {"color": GREY, "linestyle": "-", "zorder": 1}
    return {
        label: {"color": PALETTE[i % size], "linestyle": DASHES[i // size]}
        if i < LINES
        else further
        for i, label in enumerate(given.groups)
    }


def _name(label: str, runs: int, style: dict[str, Any], more: str = "") -> str:
    """Names a group's line in the legend."""
    return FURTHER if style["color"] == GREY else f"{label} ({more}{plural(runs)})"


def _wrapped(text: str, columns: int) -> str:
    return textwrap.fill(text, columns, break_on_hyphens=False)


def _legend(figure: Any, axes: Sequence[Any]) -> None:
    """One legend below all axes, for which the figure grows; one column where names are long."""
    width = int(12 * figure.get_figwidth()) - 6  # characters
    entries: dict[str, Any] = {}
    for ax in axes:
        handles, labels = ax.get_legend_handles_labels()
        entries |= dict(zip((_wrapped(name, width) for name in labels), handles, strict=True))
    if entries:
        columns = max(1, min(3, int(90 / (8 + max(map(len, entries))))))
        rows = sum(1 + name.count("\n") for name in entries) / columns
        figure.set_figheight(figure.get_figheight() + 0.2 * max(0, rows - 3))
        figure.legend(entries.values(), entries, loc="outside lower center", ncols=columns)


def _short(value: float, _: Any = None) -> str:
    """1,500,000 as 1.5M, for a tick."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


# --- curves --------------------------------------------------------------------------------------


def learning(given: Study, x: str) -> tuple[Any, str, str] | None:
    """Returns over env steps or frames, a panel for each task."""
    if x == "frames" and all(
        row.get("frames") in (None, row["env_steps"]) for r in given.runs for row in r.rows
    ):
        return None  # they would be the same picture
    figure, axes = _panels(len(given.tasks))
    drawn = 0
    for ax, task in zip(axes, given.tasks, strict=True):
        drawn += _group_lines(ax, given, task, given.metric, x)
        ax.set(title=task, xlabel=UNITS[x], ylabel=TITLES[given.metric])
    if not drawn:
        return None
    _legend(figure, axes)
    caption = (
        f"Interquartile mean of the runs and its pointwise 95 % bootstrap band; {plural(drawn)} "
        f"of {len(given.runs)} have values. Dashed: not all runs of the group have a value there."
    )
    return figure, f"Learning curves over {UNITS[x]}", caption


def human(given: Study) -> tuple[Any, str, str] | None:
    """Human-normalised returns over frames, all games of a group in one line."""
    figure, (ax,) = _panels(1)
    drawn, every = 0, [run for run in given.runs if task_of(run) in given.games]
    for label, style in _colors(given).items():
        runs = [run for run in given.groups[label] if run in every and run.state == "finished"]
        found = human_curve(runs, given.metric)
        if found is not None:
            drawn += (number := len(runs))
            games = plural(len({task_of(run) for run in runs}), "game")
            _line(ax, found, number, _name(label, number, style, f"{games}, "), style)
    if not drawn:
        return None
    ax.set(xlabel=UNITS["frames"], ylabel=f"human-normalised {TITLES[given.metric]}")
    ax.xaxis.set_major_formatter(_short)
    ax.margins(x=0.01)
    _legend(figure, [ax])
    caption = (
        "Interquartile mean of all finished runs of all games, 0: random play, 1: the human "
        "tester, and its pointwise 95 % bootstrap band, runs drawn anew within each game; "
        f"{plural(drawn)} of {len(every)} on Atari. A line ends where the first run of its group "
        "does, since games weigh differently beyond it."
    )
    return figure, "Human-normalised learning curves over emulator frames", caption


def each_task(given: Study) -> tuple[Any, str, str] | None:
    """Training returns of each task, a panel for each, where a run has several."""
    every = tasks_in(name for run in given.runs for row in run.rows for name in row)
    if not every:
        return None
    shown = every[:PANELS]
    figure, axes = _panels(len(shown))
    drawn = 0
    for ax, task in zip(axes, shown, strict=True):
        name = TASK_RETURN.replace("*", task)
        drawn = max(drawn, _group_lines(ax, given, None, name, "env_steps"))
        ax.set(title=task, xlabel=f"{UNITS['env_steps']} of all tasks", ylabel=TITLES[CURVES[1]])
    _legend(figure, axes)
    caption = (
        f"Interquartile mean and 95 % band over {plural(drawn)} of {len(given.runs)} at most; "
        "training episodes of the task alone. "
        + (f"The first {PANELS} of {len(every)} tasks." if len(every) > PANELS else "")
    ).strip()
    return figure, "Training returns of each task", caption


def rungs(given: Study) -> tuple[Any, str, str] | None:
    """Training returns by epsilon, a panel for each rung, where lanes explored differently."""
    names = rungs_in(name for run in given.runs for row in run.rows for name in row)
    if len(names) < 2 or len(given.tasks) > 1:
        return None
    figure, axes = _panels(len(names))
    drawn = 0
    for ax, name in zip(axes, names, strict=True):
        drawn = max(drawn, _group_lines(ax, given, None, name, "env_steps"))
        ax.set(title=name.rpartition("/")[2], xlabel=UNITS["env_steps"], ylabel=TITLES[CURVES[1]])
    _legend(figure, axes)
    caption = (
        f"Interquartile mean and 95 % band over {plural(drawn)} of {len(given.runs)} at most; "
        "episodes by the epsilon of their lane when they ended. The first panel explores least."
    )
    return figure, "Training returns by epsilon", caption


def _group_lines(ax: Any, given: Study, task: str | None, metric: str, x: str) -> int:
    """Draws each group's line; the number of runs that are in it."""
    drawn = 0
    for label, style in _colors(given).items():
        runs = [run for run in given.groups[label] if task in (None, task_of(run))]
        found = curve(runs, metric, x)
        if found is not None:
            drawn += (number := _has(runs, metric))
            _line(ax, found, number, _name(label, number, style), style)
    ax.xaxis.set_major_formatter(_short)
    ax.yaxis.set_major_formatter(_short)
    ax.margins(x=0.01)
    return drawn


def _has(runs: Sequence[Run], metric: str) -> int:
    return sum(any(row.get(metric) is not None for row in run.rows) for run in runs)


def _line(ax: Any, found: Curve, runs: int, label: str, style: dict[str, Any]) -> None:
    """Solid where all runs have a value, thin and dashed elsewhere; no band around one run."""
    value, whole, several = found.found.value, found.runs == runs, found.runs > 1
    marker = "o" if np.isfinite(value).sum() == 1 else None
    ax.plot(found.x, np.where(whole, value, np.nan), label=label, lw=2, marker=marker, **style)
    partly = ~whole
    partly[:-1] |= partly[1:]  # joins the solid part
    partly[1:] |= partly[:-1] & ~whole[1:]
    ax.plot(found.x, np.where(partly, value, np.nan), lw=1.1, color=style["color"], ls=(0, (3, 2)))
    low, high = (np.where(several, side, np.nan) for side in (found.found.low, found.found.high))
    ax.fill_between(found.x, low, high, color=style["color"], alpha=0.15, lw=0)


def throughput(given: Study) -> tuple[Any, str, str] | None:
    """Rates of acting and of updates."""
    figure, axes = _panels(2)
    names = {"acting/env_steps_per_s": "env steps per s", "learner/updates_per_s": "updates per s"}
    drawn = []
    for ax, (metric, title) in zip(axes, names.items(), strict=True):
        drawn.append(_group_lines(ax, given, None, metric, "env_steps"))
        ax.set(title=title, xlabel=UNITS["env_steps"], ylabel=title, ylim=(0, None))
    if not max(drawn):
        return None
    _legend(figure, axes)
    caption = (
        f"Interquartile mean and 95 % band over {plural(max(drawn))} of {len(given.runs)}; each "
        "point is the rate since the row of metrics before it."
    )
    return figure, "Throughput", caption


# --- final scores --------------------------------------------------------------------------------


def profile(given: Study) -> tuple[Any, str, str] | None:
    """The share of runs above each score."""
    panels = profiles(given)
    if not panels:
        return None
    figure, axes = _panels(len(panels))
    styles = _colors(given)
    for ax, (name, taus, found) in zip(axes, panels, strict=True):
        for label, shares in found.items():
            number = sum(len(scores) for scores in given.scores(label).values())
            _shares(ax, taus, shares, _name(label, number, styles[label]), styles[label])
        ax.set(xlabel=f"τ: {name}", ylabel="share of runs above τ", ylim=(-0.02, 1.02))
        ax.xaxis.set_major_formatter(_short)
    _legend(figure, axes)
    number = sum(len(s) for label in given.groups for s in given.scores(label).values())
    caption = (
        f"Performance profiles of {plural(number)} of {len(given.runs)}, with pointwise 95 % "
        "bootstrap bands. Higher is better; where a line crosses 0.5 is the median run."
    )
    return figure, "Performance profiles", caption


def _shares(ax: Any, taus: np.ndarray, found: Estimate, label: str, style: dict[str, Any]) -> None:
    ax.plot(taus, found.value, label=label, lw=2, **style)
    ax.fill_between(taus, found.low, found.high, color=style["color"], alpha=0.13, lw=0)


def better(given: Study) -> tuple[Any, str, str] | None:
    """The probability that a run of one group beats one of another."""
    from matplotlib.figure import Figure

    every = given.improvements
    pairs = every[:PAIRS]
    if not pairs:
        return None
    sides = [(row["group"], f"over {row['is better than']}  ({row['runs']} runs)") for row in pairs]
    names = ["\n".join(_wrapped(side, 48) for side in both) for both in sides]
    lines = max(1 + name.count("\n") for name in names)
    figure = Figure(figsize=(6.4, 1.3 + (0.3 + 0.16 * lines) * len(pairs)))
    ax, colors = figure.subplots(), _colors(given)
    for y, row in enumerate(pairs):
        color = colors[row["group"]]["color"]
        if row["probability_low"] is not None:
            ends = [row["probability_low"], row["probability_high"]]
            ax.plot(ends, [y, y], color=color, lw=5, alpha=0.3)
        ax.plot(row["probability"], y, "o", color=color, ms=7)
    ax.axvline(0.5, color="#666666", lw=1)
    ax.set_yticks(range(len(pairs)), names, fontsize=8.5)
    ax.set(xlim=(-0.02, 1.02), ylim=(len(pairs) - 0.5, -0.5), xlabel="probability of improvement")
    ax.grid(visible=False, axis="y")
    left_off = (
        f" {len(every) - PAIRS} further pairs are in the table." if len(every) > PAIRS else ""
    )
    number = sum(len(s) for label in given.groups for s in given.scores(label).values())
    caption = (
        f"How probably a run of the first group beats one of the second, ties counting half, "
        f"and the 95 % bootstrap interval; {plural(number)} of {len(given.runs)}.{left_off}"
    )
    return figure, "Probability of improvement", caption


# --- where the time goes -------------------------------------------------------------------------


def stages(given: Study) -> tuple[Any, str, str] | None:
    """Shares of the loop's time, stacked, a panel for each group."""
    found = {label: _times(runs) for label, runs in given.groups.items()}
    every = {label: times for label, times in found.items() if times is not None}
    if not every:
        return None
    known = dict(list(every.items())[:PANELS])
    totals = {s: sum(shares[s].mean() for _, shares, _ in known.values()) for s in STAGES}
    most = sorted(totals, key=lambda stage: -totals[stage])[:STAGES_SHOWN]
    figure, axes = _panels(len(known), height=3.0)
    for ax, (label, (x, shares, number)) in zip(axes, known.items(), strict=True):
        rest = 1 - np.sum([shares[stage] for stage in most], axis=0)
        layers = [*(100 * shares[stage] for stage in most), 100 * rest]
        colors = [*PALETTE[:STAGES_SHOWN], GREY]
        ax.stackplot(x, layers, labels=[*most, "all others"], colors=colors, alpha=0.85, lw=0)
        title = _wrapped(f"{label} ({plural(number)})", 40)
        ax.set(title=title, xlabel=UNITS["env_steps"], ylim=(0, 100))
        ax.set_ylabel("% of the loop's time")
        ax.xaxis.set_major_formatter(_short)
        ax.margins(x=0)
    _legend(figure, axes)
    number = sum(number for _, _, number in known.values())
    left_off = f" The first {PANELS} of {len(every)} groups." if len(every) > PANELS else ""
    caption = (
        f"Mean over {plural(number)} of {len(given.runs)}, at each point over those that came so "
        f"far. The largest area is the bottleneck.{left_off}"
    )
    return figure, "Where the time goes", caption


def _times(runs: Sequence[Run]) -> tuple[np.ndarray, dict[str, np.ndarray], int] | None:
    """(env steps, stage -> mean share of the runs that have rows there, number of runs)."""
    known = [run for run in runs if len(run.rows) > 1]
    if not known:
        return None
    steps = [np.array([row["env_steps"] for row in run.rows]) for run in known]
    grid = np.linspace(min(each[0] for each in steps), max(each[-1] for each in steps), 100)
    is_there = np.array([(grid >= each[0]) & (grid <= each[-1]) for each in steps])
    weights = is_there / np.maximum(1, is_there.sum(axis=0))
    shares = {}
    for stage in STAGES:
        values = ([row.get(f"time/{stage}") or 0 for row in run.rows] for run in known)
        on_grid = [np.interp(grid, x, y) for x, y in zip(steps, values, strict=True)]
        shares[stage] = (weights * on_grid).sum(axis=0)
    return grid, shares, len(known)
