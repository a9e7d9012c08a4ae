# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A sweep, and an honest comparison
#
# Launch a sweep from Python, load what it left, and compare: all seeds, intervals, and how many runs
# there were. `pip install 'rlx[notebook]'`

# %%
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

from rlx import results, statistics

SMALL = "RLX_SMALL" in os.environ  # set where these notebooks are only tested
folder = Path(tempfile.mkdtemp(prefix="rlx-")) / "sweep"

# %% [markdown]
# The question: what is a memory worth where velocities are hidden? A sweep is a command line; each run
# gets a process of its own, so that one which dies takes no other with it. Full size: six runs of about
# a minute each, two at once.

# %%
size = ["total_env_steps=1500", "seed=0,1", "logging.every_env_steps=250"]
size += ["evaluation.final_episodes=4"]
sweep = [
    *("network=mlp_lstm,mlp", "hydra/launcher=rlx", "hydra.launcher.n_jobs=2"),
    *("logging.console=off", "logging.tensorboard=false", f"hydra.sweep.dir={folder}"),
    *(size if SMALL else ["seed=0,1,2", "logging.every_env_steps=5000"]),
]
done = subprocess.run(
    [sys.executable, "-m", "rlx.train", "-m", *sweep], capture_output=True, text=True
)
print(done.stderr)

# %% [markdown]
# One table of all runs, with the settings that vary as columns; runs that failed are in it, too.

# %%
runs = results.runs(folder)
runs[["run", "state", "network", "seed", "env_steps", "evaluation"]]

# %%
rows = results.load(folder)
colours = {"mlp_lstm": "#4477aa", "mlp": "#cc6677"}
figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
for (network, seed), run in rows.groupby(["network", "seed"]):
    label = network if seed == 0 else "_"
    axes.plot(run["env_steps"], run["train/return_mean"], color=colours[network], label=label)
axes.set(xlabel="env steps", ylabel="mean return in training", title="Every seed")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# With so few runs a mean says little by itself. The interquartile mean and its bootstrap interval say how
# much the seeds leave open; the probability of improvement, how often a run of one is better than one of
# the other.

# %%
scores = {name: group["evaluation"].to_numpy() for name, group in runs.groupby("network")}
for name, values in scores.items():
    low, high = statistics.iqm_interval(values, seed=0)
    print(f"{name}: {len(values)} runs, IQM {statistics.iqm(values):.1f} ({low:.1f} .. {high:.1f})")
better = statistics.probability_of_improvement([scores["mlp_lstm"]], [scores["mlp"]], seed=0)
print(
    f"a run with memory is the better one: {better.value:.2f} ({better.low:.2f} .. {better.high:.2f})"
)

# %% [markdown]
# The same as a page, with learning curves and figures as files: `python -m rlx.report runs=FOLDER`.

# %%
from IPython.display import Image, display

told = subprocess.run(
    [sys.executable, "-m", "rlx.report", f"runs={folder}", f"out={folder / 'report'}"],
    capture_output=True,
    text=True,
)
print(told.stdout, told.stderr)
for picture in sorted((folder / "report").glob("*curve*.png"))[:1]:
    display(Image(picture.read_bytes()))
