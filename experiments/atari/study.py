"""Trains on Atari games on two CPU cores, and writes what README.md shows.

python experiments/atari/study.py run FOLDER [TASK ...]    trains; runs that ended are kept
python experiments/atari/study.py write FOLDER             raw numbers, figures, the table

A run that was stopped goes on from its checkpoint, replay and all, when `run` is given again.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from studies import Study, command

SMALL = "experiment=atari_r2d2_small"
SHORTER = ("total_env_steps=1_000_000", "agent.optimizer.decay_gradient_steps=49_500")

STUDY = Study(
    here=Path(__file__).parent,
    measured="ad5ae2b, 2026-11-30",
    again=dict.fromkeys(("breakout/r2d2", "freeway/r2d2"), "a53644c, 2026-11-30"),
    tasks={
        "pong": {"r2d2": [SMALL, "env.id=Pong-v5"]},
        "breakout": {"r2d2": [SMALL, "env.id=Breakout-v5", *SHORTER]},
        "freeway": {"r2d2": [SMALL, "env.id=Freeway-v5", *SHORTER]},
    },
    goals={"pong": 18},
    figures={"curves": ("pong", "breakout", "freeway")},
    evaluated="evaluation.every_env_steps=100_000",
    episodes=10,
    seeds={"pong": 3, "breakout": 2, "freeway": 2},
    goes_on=True,
)

if __name__ == "__main__":
    command(STUDY, sys.argv[1:])
