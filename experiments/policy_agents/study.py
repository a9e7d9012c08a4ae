"""Trains the on-policy and continuous agents on small tasks, and writes what README.md shows.

python experiments/policy_agents/study.py run FOLDER [TASK ...]    trains; runs that ended are kept
python experiments/policy_agents/study.py write FOLDER             raw numbers, figures, the table
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from studies import Study, command, each

RAY = (
    "acting=ray_pool",
    "acting.instances=2",
    "acting.envs_per_actor=8",
    "acting.cpus_per_actor=0.01",
)
# task -> variant -> overrides of its run
TASKS: dict[str, dict[str, list[str]]] = {
    "cartpole": each("cartpole_{}", ("a2c", "ppo", "impala", "pqn")),
    "cartpole_memory": each("cartpole_memory_{}", ("ppo", "pqn")),
    "asynchronous": {
        "in the process": ["experiment=cartpole_impala"],
        "2 Ray actors": ["experiment=cartpole_impala", *RAY],
        "rounds": ["experiment=cartpole_impala", "agent.on_policy=true"],
    },
    "pendulum": each("pendulum_{}", ("sac", "ppo")),
    "pendulum_memory": each("pendulum_memory_{}", ("sac",)),
    "mountaincar_continuous": each("mountaincar_continuous_{}", ("sac", "ppo")),
    "acrobot": each("acrobot_{}", ("ppo",)),
    "mountaincar": each("mountaincar_{}", ("ppo", "pqn")),
    "memory_chain": each("memory_chain_{}", ("pqn", "r2d2")),
    "halfcheetah": each("halfcheetah_{}", ("sac", "ppo")),
}
GOALS = {
    "cartpole": 475,
    "asynchronous": 475,
    "cartpole_memory": 450,
    "pendulum": -170,
    "pendulum_memory": -220,
    "mountaincar_continuous": 90,
    "acrobot": -90,
    "mountaincar": -110,
    "memory_chain": 1,
}
# Means of ten seeds of HalfCheetah-v3 in Tianshou's benchmark: test_rew_10seeds.csv of sac and ppo
# in examples/mujoco/benchmark/HalfCheetah-v3, commit 39acf20 of thu-ml/tianshou.
PUBLISHED = {
    "halfcheetah": {
        "Tianshou's sac": [
            *((0, -2), (10_000, 865), (20_000, 2641), (50_000, 4747), (100_000, 6515)),
            *((150_000, 7465), (200_000, 8208), (250_000, 8836), (300_000, 9059)),
        ],
        "Tianshou's ppo": [
            *((0, -275), (30_720, 12), (61_440, 346), (122_880, 1371), (184_320, 2466)),
            *((245_760, 3256), (307_200, 3927)),
        ],
    }
}
COLOURS = {"a2c": "C0", "ppo": "C1", "impala": "C2", "pqn": "C3", "sac": "C4", "r2d2": "C5"}
STUDY = Study(
    here=Path(__file__).parent,
    measured="7a42ec2, 2026-11-29",
    again={"pendulum/ppo": "3855761, 2026-11-30"},
    tasks=TASKS,
    goals=GOALS,
    figures={
        "curves": [task for task in GOALS if task != "asynchronous"],
        "asynchronous": ["asynchronous"],
        "halfcheetah": ["halfcheetah"],
    },
    published=PUBLISHED,
    colours=COLOURS,
    lowest={"memory_chain": -1},
)


if __name__ == "__main__":
    command(STUDY, sys.argv[1:])
