"""Makes docs/metrics.md, every metric of a run: `python docs/make/metrics.py [--write]`."""

from __future__ import annotations

import sys
from pathlib import Path

from rlx.runs.names import MEANINGS

PAGE = Path(__file__).resolve().parents[1] / "metrics.md"
TITLES = {
    "": "Counts",
    "train": "Episodes of training",
    "task": "Tasks",
    "evaluation": "Evaluations",
    "acting": "Acting",
    "weights": "Weights",
    "replay": "Replay",
    "learner": "Learner",
    "schedule": "Schedules",
    "time": "Time",
}
INTRO = """# Every metric

This page is made by `python docs/make/metrics.py --write` of `rlx/runs/names.py`.
A test holds it against that file and against the code.
A row of `metrics.jsonl` is one JSON object; TensorBoard and Weights & Biases get the same names.
A row is written each `logging.every_env_steps`.
With `logging.every_s` one is also written when the last one is so old.
"The interval" is the time since the row before.
A name with a `*` stands for several: a part of the network, a task, or the number of a choice.
Returns are sums of raw rewards, beneath all wrappers, and their unit is that of the rewards.
Names that end in `_s` or `_per_s`, `learner/device_busy` and those of `time/` come from a clock.
All others are the same in two runs of one seed with `acting=local`.
[Hooks](hooks.md) add names of their own.
"""


def page() -> str:
    """The whole page."""
    lines = [INTRO]
    for group, title in TITLES.items():
        own = {name: says for name, says in MEANINGS.items() if group_of(name) == group}
        lines += [f"## {title}", "", "| name | meaning and unit |", "|---|---|"]
        lines += [
            f"| `{name}` | {says.replace('|', chr(92) + '|')} |" for name, says in own.items()
        ]
        lines += [""]
    return "\n".join(lines).rstrip("\n") + "\n"


def group_of(name: str) -> str:
    return name.partition("/")[0] if "/" in name else ""


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(page())
    else:
        print(page(), end="")
