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
# # Scaling out with Ray
#
# Actors in processes of their own, one of them killed on purpose, and what more of them are worth here.
# `pip install 'rlx[notebook]'`; the choice between pools is in `docs/acting.md`.

# %%
import os
import signal
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from time import sleep

import matplotlib.pyplot as plt
import psutil

import rlx
from rlx import notebook
from rlx.runs.folders import read_rows

SMALL = "RLX_SMALL" in os.environ  # set where these notebooks are only tested
folder = Path(tempfile.mkdtemp(prefix="rlx-")) / "catch"

# %% [markdown]
# ## A run on a Ray pool
#
# `acting=ray_pool` is the only change to an ordinary run. Without an address the run starts a Ray cluster on this
# machine and ends it afterwards; `acting.address=auto` joins one of many machines instead.

# %%
short = ["total_env_steps=8_000", "evaluation.every_env_steps=null"]
cfg = rlx.compose(
    [
        *("experiment=catch", "total_env_steps=60_000", "evaluation.every_env_steps=10_000"),
        *("acting=ray_pool", "acting.instances=2", "acting.cpus_per_actor=0.5"),
        "acting.max_in_flight_bytes=100_000_000",  # rollouts of Catch are small
        *("logging.console=off", "logging.every_env_steps=500"),
        *(short if SMALL else []),
    ]
)
print({key: cfg.acting[key] for key in ("instances", "envs_per_actor", "inference", "address")})

# %% [markdown]
# Machines are lost, processes run out of memory. So a thread waits until the run's metrics say that both actors are
# ready, and ends one of them with SIGKILL, which no process can catch. Ray names the processes: `ray::RemoteActor`.


# %%
def actors() -> list[int]:
    """The processes of this run's actors."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            if "ray::RemoteActor" in " ".join(process.cmdline()):
                found.append(process.pid)
    return found


def kill_one() -> None:
    path = folder / "metrics.jsonl"
    while not any(
        row["acting/actors_ready"] == 2 for row in (read_rows(path) if path.exists() else ())
    ):
        sleep(0.1)
    os.kill(actors()[0], signal.SIGKILL)


# %%
threading.Thread(target=kill_one, daemon=True).start()
with notebook.live(folder):
    summary = rlx.run(cfg, folder)
print(f"{summary['state']}: {summary['env_steps']:,} env steps, {summary['updates']:,} updates")
print(f"greedy return {summary['evaluation_return']:.2f} of at most 1")

# %% [markdown]
# The run ended as if nothing had been: all env steps were made, and the agent plays. The dead actor was replaced once,
# with the same lanes and the same epsilons. What it cost is counted: at most the requests that it had under way.

# %%
rows = read_rows(folder / "metrics.jsonl")
for name in ("actors_ready", "restarts", "restarts_died", "lost_env_steps_at_most"):
    print(f"acting/{name}: {rows[-1][f'acting/{name}']:.0f}")
killed = next(row for row in rows if row["acting/restarts"])
both = [row for row in rows if row["acting/restarts"] and row["acting/actors_ready"] == 2]
if both:  # a very short run may end before that
    print(f"both were ready again {both[0]['wall_s'] - killed['wall_s']:.1f} s after the death")

# %% [markdown]
# Its lanes began a new *chain* of blocks, number 1 after number 0. No sequence spans two chains, so none is spliced
# from what happened before the kill and after it.

# %%
print("newest chain of any lane:", rlx.load(folder).restore().meta["chain"])

# %%
seconds = [row["wall_s"] for row in rows]
figure, (top, bottom) = plt.subplots(
    2, 1, figsize=(7, 4), sharex=True, height_ratios=[1, 2], layout="constrained"
)
top.step(seconds, [row["acting/actors_ready"] for row in rows], where="post", color="#cc6677")
top.set(ylabel="actors ready", yticks=[0, 1, 2], ylim=(-0.2, 2.2))
bottom.plot(seconds, [row["env_steps"] for row in rows], color="#228833")
bottom.set(ylabel="env steps", xlabel="seconds of training", ylim=(0, None), xlim=(0, None))
for axes in (top, bottom):
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## What more actors are worth
#
# The measurements of `python -m rlx.bench what=acting acting=ray_pool setup=cartpole`, for a few numbers of actors: env
# steps per second that reach the loop. The roofline is what the cores could do: EnvPool and the policy in a process for
# each core, without rollouts, requests and a loop that takes them.

# %%
from rlx.bench import actors as ray_bench
from rlx.bench import measuring as bench_measuring
from rlx.cluster.cluster import Cluster
from rlx.config.build import build

setup = next(setup for setup in bench_measuring.SETUPS if setup.name == "cartpole")
agent = bench_measuring.make_agent(setup)
family = build(bench_measuring.settings("env", setup.env), "env")
cores = len(os.sched_getaffinity(0))
measured_s, counts = (1.0, (1,)) if SMALL else (10.0, (1, 2, 4))

cluster, rates = Cluster(address=None, store_bytes=500_000_000), []
for count in counts:
    pool = ray_bench.make_pool(setup, agent, family, instances=count)
    rates.append(ray_bench.rate(pool, measured_s))
    pool.close(10.0)
rooflines = ray_bench.make_rooflines(agent, family, instances=cores)
roofline = rooflines.rate(measured_s)
rooflines.close()
cluster.close()

# %%
for count, rate in zip(counts, rates, strict=True):
    print(f"actors: {count}, {rate:,.0f} env steps/s, {rate / roofline:.2f} of the roofline")
figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
axes.axhline(roofline / 1000, linestyle="--", color="#666666", label=f"roofline, {cores} cores")
ideal = [rates[0] * min(count, cores) / 1000 for count in counts]
axes.plot(counts, ideal, ":", color="#4477aa", label="one actor's rate times the cores in use")
axes.plot(counts, [rate / 1000 for rate in rates], "o-", color="#4477aa", label="Ray pool")
axes.set(xlabel="Ray actors of 32 lanes", ylabel="1000 env steps per second", xticks=counts)
axes.set_ylim(0, None)
axes.legend(frameon=False, loc="lower right")
axes.grid(alpha=0.2)
axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# Two cores show the step from one actor to two and no further: four actors only share them, and the loop that unpacks
# rollouts wants its part as well. On two busy cores we saw 57, 98 and 80 thousand env steps per second. A curve that
# goes on rising takes more cores or more machines.
#
# ## Thin actors
#
# With a big network, a copy of the policy in every actor is a waste. `acting.inference=server` leaves to the actors the
# environments alone: they send observations, and one batched policy on the learner's device answers all of them. Such
# an actor does not load JAX (101 MB instead of 235 MB), but each env step pays a remote call.
#
# ```
# python -m rlx.train acting=ray_pool acting.inference=server acting.instances=128 acting.envs_per_actor=1 acting.cpus_per_actor=0.01
# ```
