"""Draws the figure of a run in a notebook, anew in place while a cell trains.

    with rlx.notebook.live("my_run"):
        summary = rlx.run(cfg, "my_run")

pip install 'rlx[notebook]'
"""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlx.runs.folders import METRICS_FILE, read_rows
from rlx.runs.metrics import rungs_in
from rlx.runs.times import bottleneck

CURVES = {
    "train/return_mean": ("training", "#4477aa"),
    "evaluation/return_mean": ("evaluation", "#cc6677"),
}


@contextmanager
def live(folder: Path | str, *, every_s: float = 1.0) -> Iterator[None]:
    """Shows the run of that folder, from its metrics.jsonl, until the block ends.

    It only reads, in a thread of its own, so training never waits for it. Ctrl-C (the stop button)
    ends the run with a checkpoint, and the figure stays.
    """
    from IPython.display import Image, display

    path, ended = Path(folder) / METRICS_FILE, threading.Event()
    handle = display(Image(png([])), display_id=True)

    def follow() -> None:
        seen = -1
        while not ended.wait(every_s):
            size = path.stat().st_size if path.exists() else -1
            if size != seen:
                handle.update(Image(png(_rows(path))))
            seen = size

    thread = threading.Thread(target=follow, name="rlx-live", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        handle.update(Image(png(_rows(path))))


def png(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Returns and rates over env steps, as a picture."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(9, 3), layout="constrained")
    returns, rates = figure.subplots(1, 2)
    curves = dict(CURVES)
    if len(rungs := rungs_in(name for row in rows for name in row)) > 1:
        curves[rungs[0]] = (f"training, {rungs[0].rpartition('/')[2]}", "#66ccee")
    for name, (label, colour) in curves.items():
        points = [(row["env_steps"], row[name]) for row in rows if row.get(name) is not None]
        if points:
            mark = "o" if name.startswith("evaluation") else ""
            returns.plot(*zip(*points, strict=True), mark + "-", color=colour, label=label)
    returns.set(title="mean return", xlabel="env steps")
    if returns.get_lines():
        returns.legend(frameon=False)
    name = "acting/env_steps_per_s"
    speeds = [(row["env_steps"], row[name]) for row in rows if row.get(name) is not None]
    if speeds:
        rates.plot(*zip(*speeds, strict=True), color="#228833")
    rates.set(title="env steps per second", xlabel="env steps", ylim=(0, None))
    if rows:
        figure.suptitle(bottleneck(rows[-1]).partition(":")[0], fontsize=9, color="#666666")
    for axes in (returns, rates):
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 50k
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return file.getvalue()


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        return read_rows(path)
    except (OSError, ValueError):
        return []
