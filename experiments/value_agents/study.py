"""Trains the agents with values on small tasks, and writes what README.md shows.

python experiments/value_agents/study.py run FOLDER [TASK ...]    trains; runs that ended are kept
python experiments/value_agents/study.py write FOLDER             raw numbers, figures, the table
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from studies import Study, command, each

FEEDFORWARD = ("dqn", "c51", "qr_dqn", "iqn")
RECURRENT = (*FEEDFORWARD, "r2d2_small")


# 5-step, and a target that moves with each update
SLOWLY = ("agent.n_step=5", "agent.target_period_updates=null", "agent.target_rate=0.01")
# task -> variant -> overrides of its run
TASKS: dict[str, dict[str, list[str]]] = {
    "cartpole": each("cartpole_{}", FEEDFORWARD),
    "cartpole_memory": {
        **each("cartpole_memory_{}", (*FEEDFORWARD, "r2d2")),
        "default run": [],
    },
    "acrobot": each("acrobot_{}", ["qr_dqn"]),
    "mountaincar": each("mountaincar_{}", ["dqn", "qr_dqn"]),
    "catch": each("catch", RECURRENT, "agent={}", "agent.optimizer.decay_gradient_steps=5400"),
    "minigrid_empty": {
        **each("minigrid_empty", ("dqn", "qr_dqn", "iqn"), "agent={}"),
        "c51": [
            "experiment=minigrid_empty",
            "agent=c51",
            "agent.lowest=0",
            "agent.highest=1",
            *SLOWLY,
        ],
        "r2d2_small": [
            "experiment=minigrid_empty",
            "agent=r2d2_small",
            "agent.n_step=5",
            "agent.discount=0.99",
            "agent.optimizer.decay_gradient_steps=15000",
        ],
    },
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
    "minigrid_empty": 0.9,
}
COLOURS = {"dqn": "C0", "c51": "C1", "qr_dqn": "C2", "iqn": "C3", "r2d2": "C4", "r2d2_small": "C4"}
AGAIN = ("cartpole_memory/default run", "catch/r2d2_small")
LOWEST = {"catch": -1, "minigrid_empty": 0}  # returns that there are, where curves are flat
STUDY = Study(
    here=Path(__file__).parent,
    measured="d6e9ae1, 2026-11-29",
    again=dict.fromkeys(AGAIN, "4ca1058, 2026-11-30"),
    tasks=TASKS,
    goals=GOALS,
    figures={"curves": list(GOALS), "ablations": ["ablations"]},
    colours=COLOURS,
    lowest=LOWEST,
    default_goal=GOALS["cartpole"],
)


if __name__ == "__main__":
    command(STUDY, sys.argv[1:])
