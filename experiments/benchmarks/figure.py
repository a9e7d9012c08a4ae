"""Draws ray_scaling.png from what `python -m rlx.bench what=scaling acting=ray_pool` printed last.

python experiments/benchmarks/figure.py FILE, with the JSON line in it
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
POINT = re.compile(r"(?:acting|scaling)/(\w+)/ray_pool/(\d+) actors$")
NAMES = {"cartpole": "CartPole, default network", "pong": "Pong, the paper's network"}


def draw(found: dict) -> None:
    """Env steps per second over the number of actors, one panel for each setup."""
    points: dict[str, list[tuple[int, float]]] = {}
    for row in found["rows"]:
        if match := POINT.match(row["name"]):
            points.setdefault(match[1], []).append((int(match[2]), row["value"]))
    figure, axes = plt.subplots(
        1, len(points), figsize=(4.5 * len(points), 3.6), layout="constrained", squeeze=False
    )
    for axis, (setup, values) in zip(axes[0], points.items(), strict=True):
        actors, rates = zip(*values, strict=True)
        axis.plot(actors, rates, marker="o", linewidth=2)
        axis.set(
            xscale="log",
            xlabel="Ray actors of 32 lanes",
            ylabel="env steps per second",
            title=f"{NAMES[setup]}\n({found['machine']['cores']} cores)",
            ylim=(0, 1.15 * max(rates)),
        )
        axis.set_xticks(actors, [str(n) for n in actors])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.savefig(HERE / "ray_scaling.png", dpi=120)


if __name__ == "__main__":
    lines = Path(sys.argv[1]).read_text().splitlines()
    draw(json.loads(next(line for line in reversed(lines) if line.startswith('{"what"'))))
