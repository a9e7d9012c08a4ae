"""Draws NAME.png and writes NAME.csv from the runs that README.md's commands made.

python experiments/recurrence/figure.py FOLDER NAME, with FOLDER/<variant>/<seed>/metrics.jsonl
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from rlx.runs.metrics import read_rows

HERE = Path(__file__).parent
VARIANTS = {
    "stored-burn_in": "stored state, burn-in 10 (R2D2)",
    "stored": "stored state, no burn-in",
    "zero-burn_in": "zero state, burn-in 10",
    "zero": "zero state, no burn-in",
    "no-core": "no core (network=mlp)",
}
METRIC = "evaluation/return_mean"
TITLES = {
    "recurrence": "CartPole without velocities, sequences of 20 trained rows",
    "short_sequences": "CartPole without velocities, sequences of 2 trained rows",
}


def curves(folder: Path) -> dict[str, list[tuple[int, np.ndarray, np.ndarray]]]:
    """variant -> (seed, env steps, greedy return) of each of its runs."""
    found: dict[str, list[tuple[int, np.ndarray, np.ndarray]]] = {}
    for variant in VARIANTS:
        for path in sorted((folder / variant).glob("*/metrics.jsonl")):
            rows = [row for row in read_rows(path) if row[METRIC] is not None]
            steps, returns = (np.array([row[key] for row in rows]) for key in ("env_steps", METRIC))
            found.setdefault(variant, []).append((int(path.parent.name), steps, returns))
    return found


def write_csv(found: dict[str, Any], name: str) -> None:
    with (HERE / f"{name}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["variant", "seed", "env_steps", "evaluation_return_mean"])
        for variant, runs in found.items():
            for seed, steps, returns in runs:
                for step, value in zip(steps, returns, strict=True):
                    writer.writerow([variant, seed, int(step), round(float(value), 2)])


def draw(found: dict[str, Any], name: str) -> None:
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for variant, runs in found.items():
        grid = np.arange(10_000, min(steps[-1] for _, steps, _ in runs) + 1, 10_000)
        values = np.array([np.interp(grid, steps, returns) for _, steps, returns in runs])
        (line,) = axes.plot(grid, values.mean(axis=0), label=VARIANTS[variant], linewidth=2)
        axes.fill_between(
            grid, values.min(axis=0), values.max(axis=0), color=line.get_color(), alpha=0.12
        )
    axes.set(
        xlabel="env steps",
        ylabel="greedy return, mean of 20 episodes",
        title=f"{TITLES[name]}:\nmean and range over "
        f"{min(len(runs) for runs in found.values())} seeds",
        ylim=(0, 510),
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(HERE / f"{name}.png", dpi=120)


def table(found: dict[str, Any]) -> None:
    print("| variant | mean greedy return over the run | last three evaluations | per seed |")
    print("|---|---|---|---|")
    for variant, runs in found.items():
        whole = [returns.mean() for _, _, returns in runs]
        last = [returns[-3:].mean() for _, _, returns in runs]
        each = ", ".join(f"{value:.0f}" for value in last)
        name = VARIANTS[variant]
        print(f"| {name} | {np.mean(whole):.0f} | {np.mean(last):.0f} | {each} |")


if __name__ == "__main__":
    all_curves, chosen = curves(Path(sys.argv[1])), sys.argv[2]
    write_csv(all_curves, chosen)
    draw(all_curves, chosen)
    table(all_curves)
