"""A real sweep of four tiny runs, of which the last fails, for tests of what is made of runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.training.test_run import TINY

TASK = "CartPole-v1"
SWEEP = [
    *(text for text in TINY if not text.startswith("network.core")),
    "network=mlp",
    "exploration=ladder,constant",
    "seed=0,1",
    "total_env_steps=400",
    "logging.every_env_steps=50",
    "evaluation.every_env_steps=100",
    "checkpoint.every_env_steps=100000",
]
# The 4th job's 10th update is not finite, which stops it.
FAILING = """
import numpy
from hydra.core.hydra_config import HydraConfig
from rlx import train
from rlx.training.learner import OpenLearner
put = OpenLearner.put
def poisoned(learner, batch):
    if HydraConfig.get().job.num == 3 and learner.updates == 9:
        batch.importance[0] = numpy.nan
    return put(learner, batch)
OpenLearner.put = poisoned
train.main()
"""


def make(folder: Path) -> Path:
    """Runs the sweep: 0 and 1 with exploration=ladder, 2 and 3 with constant; 3 fails."""
    command = [sys.executable, "-c", FAILING, "-m", *SWEEP, f"hydra.sweep.dir={folder}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (folder / "3" / "status.json").exists(), done.stderr
    return folder
