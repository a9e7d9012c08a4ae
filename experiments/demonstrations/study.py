"""Trains with and without demonstrations, and writes what README.md shows.

python experiments/demonstrations/study.py run FOLDER [TASK ...]    trains; runs that ended are kept
python experiments/demonstrations/study.py write FOLDER             raw numbers, figures, the table
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from studies import Study, command

DOORKEY = ["experiment=minigrid_empty", "env.id=MiniGrid-DoorKey-5x5-v0"]
# A trained agent plays 10,000 env steps, nearly greedily, and learns next to nothing.
PLAYS = [
    "init_from={folder}/teacher/dqn/0",
    "total_env_steps=10_000",
    "exploration=constant",
    "exploration.value=0.05",
    "agent.optimizer.learning_rate=1e-8",
    "replay.record={folder}/rows",
]
DEMONSTRATIONS = ["replay=demonstrations", "replay.demonstrations.path={folder}/rows"]

STUDY = Study(
    here=Path(__file__).parent,
    measured="6d9012c, 2026-11-30",
    sources={
        "teacher": {"dqn": [*DOORKEY, "total_env_steps=400_000"]},
        "player": {"dqn": [*DOORKEY, *PLAYS]},
    },
    tasks={
        "doorkey": {
            "without": [*DOORKEY, "total_env_steps=200_000"],
            "a quarter of demonstrations": [
                *DOORKEY,
                "total_env_steps=200_000",
                *DEMONSTRATIONS,
                "replay.share=0.25",
            ],
        },
    },
    goals={"doorkey": 0.9},
    figures={"curves": ("doorkey",)},
    seeds={"teacher": 1, "player": 1, "doorkey": 3},
)

if __name__ == "__main__":
    command(STUDY, sys.argv[1:])
