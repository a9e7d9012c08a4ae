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
# # A first run
#
# Compose a configuration, train with a figure that moves, evaluate, and watch an episode.
# `pip install 'rlx[notebook]'`

# %%
import os
import tempfile
from pathlib import Path

from omegaconf import OmegaConf

import rlx
from rlx import notebook

SMALL = "RLX_SMALL" in os.environ  # set where these notebooks are only tested
folder = Path(tempfile.mkdtemp(prefix="rlx-")) / "first"

# %% [markdown]
# What the command line takes, `rlx.compose` takes: groups by name, single values with dots. A misspelt
# key is answered with the nearest one.

# %%
cfg = rlx.compose(["env=cartpole_memory", "seed=1"])
print(OmegaConf.to_yaml(cfg.agent))

# %%
try:
    rlx.compose(["agent.n_setp=3"])
except Exception as error:
    print(error)

# %% [markdown]
# The default task hides CartPole's velocities: without memory it cannot be solved. On two CPU cores this
# takes about a minute. The stop button (or Ctrl-C) ends the run with a checkpoint;
# `rlx.compose([..., "resume=auto"])` in the same folder goes on from there.

# %%
short = ["total_env_steps=3000", "evaluation.final_episodes=4", "logging.every_env_steps=500"]
cfg = rlx.compose(
    ["logging.console=off", "logging.every_env_steps=2000", *(short if SMALL else [])]
)
with notebook.live(folder):
    summary = rlx.run(cfg, folder)
print(f"greedy return {summary['evaluation_return']:.1f} of at most 500")

# %% [markdown]
# A run is its folder: configuration, metrics, checkpoints. `rlx.load` reads it, also days later.

# %%
run = rlx.load(folder)
result = run.evaluate(episodes=4 if SMALL else 50, seed=7)
print(f"{result['episodes']} episodes: mean {result['mean']:.1f}, least {result['min']:.0f}")

# %% [markdown]
# The trained agent in an environment of your own: gymnasium's CartPole, of which it needs the two
# positions only (`docs/using.md` says more).

# %%
import gymnasium
from IPython.display import Image, display

env = gymnasium.make("CartPole-v1", render_mode="rgb_array")
observation, _ = env.reset(seed=3)
action, state = run.act(observation)
frames, ended, total = [], False, 0.0
while not ended and len(frames) < (20 if SMALL else 200):
    observation, reward, terminated, truncated, _ = env.step(action)
    ended, total = terminated or truncated, total + reward
    action, state = run.act(observation, state, reward=reward)
    frames.append(env.render())
env.close()
print(f"return so far {total:.0f}")

# %%
import imageio.v3 as iio

iio.imwrite(folder / "episode.gif", frames[::2], duration=40, loop=0)
display(Image((folder / "episode.gif").read_bytes()))
