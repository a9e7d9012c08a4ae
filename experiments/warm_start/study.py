"""Trains with and without another run's weights, and writes what README.md shows.

python experiments/warm_start/study.py run FOLDER [TASK ...]    trains; runs that ended are kept
python experiments/warm_start/study.py write FOLDER             raw numbers, figures, the table
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from studies import Study, command

SEEN = "init_from={folder}/cartpole_seen/r2d2/{seed}"
OTHER = "init_from={folder}/catch_dqn/dqn/{seed}"
CATCH = ["experiment=catch"]

STUDY = Study(
    here=Path(__file__).parent,
    measured="d78cf83, 2026-11-30",
    sources={
        "cartpole_seen": {"r2d2": ["env=cartpole", "total_env_steps=60_000"]},
        "catch_dqn": {
            "dqn": ["experiment=catch", "agent=dqn", "agent.optimizer.decay_gradient_steps=5400"]
        },
    },
    tasks={
        "cartpole without velocities": {
            "from scratch": [],
            # The first layer reads two numbers in the place of four.
            "from a run that saw them": [SEEN, "init_params=['*','!torso/Dense_0/kernel']"],
        },
        "catch": {
            "from scratch": CATCH,
            "torso of a DQN trained on": [*CATCH, OTHER, "init_params=[torso/*]"],
            "torso of a DQN frozen": [
                *CATCH,
                OTHER,
                "init_params=[torso/*]",
                "network.frozen=[torso/*]",
            ],
        },
    },
    goals={"cartpole without velocities": 450, "catch": 0.95},
    figures={"curves": ("cartpole without velocities", "catch")},
    evaluated="evaluation.every_env_steps=2000",
    seeds=dict.fromkeys(("cartpole_seen", "catch_dqn", "cartpole without velocities", "catch"), 3),
)

if __name__ == "__main__":
    command(STUDY, sys.argv[1:])
