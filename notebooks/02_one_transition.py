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
# # One transition, from environment to gradient
#
# The parts of a run, without the loop around them: one row is acted, stored, drawn, unrolled and learnt
# from, and each step is looked at. All records and their shapes: `rlx/types.py`.
# `pip install 'rlx[notebook]'`

# %%
import dataclasses
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import rlx
from rlx import ops, trees
from rlx.agents import common
from rlx.config.build import plain
from rlx.replay.prioritized import sequence_priority
from rlx.training.assemble import assemble
from rlx.types import Timestep

jax.config.update("jax_default_matmul_precision", "highest")

# %% [markdown]
# A small agent, so that everything fits into a picture: sequences of 4 rows of burn-in, 8 trained ones,
# and 3 more for the n-step targets of the last of those. Episodes are cut to 9 env steps: ends are where
# mistakes live.

# %%
cfg = rlx.compose(
    [
        *("agent.burn_in=4", "agent.unroll=8", "agent.n_step=3", "agent.stride=4"),
        *("agent.block_rows=4", "env.max_episode_steps=9", "acting.envs_per_actor=4"),
        *("learner.batch_size=16", "replay.capacity=2000", "seed=3"),
    ]
)
parts = assemble(plain(cfg), Path(tempfile.mkdtemp()), resume=False)
agent, pool, replay, learner = parts.agent, parts.pool, parts.replay, parts.learner
agent.sequence

# %% [markdown]
# ## 1. The environment answers
#
# A timestep holds the lanes that answered. `first` is an episode's first observation. After the last one
# the environment ignores the action and begins anew: that row exists, and is marked as not valid.

# %%
env = parts.family.make(lanes=2, seeds=[0, 1])
timestep = env.reset()
for name, leaf in trees.flatten(timestep).items():
    print(f"{name:25} {leaf.dtype!s:8} {leaf.shape}")

# %%
lanes = np.arange(2, dtype=np.int32)
print("step  reward  terminated  truncated  first   (lane 0)")
for step in range(1, 12):
    timestep: Timestep = env.step(np.full(2, step % 2, np.int32), lanes)
    t = trees.tree_map(lambda x: x[0], timestep)
    print(f"{step:4}  {t.reward:6}  {t.terminated!s:10}  {t.truncated!s:9}  {t.first!s}")
env.close()

# %% [markdown]
# ## 2. The actor acts
#
# It keeps what the network ate (`NetInput`), what it did, what came of it, and its Q-values. Rows are
# shipped as blocks of one lane each, with the carry (what the network remembered) before their first row.

# %%
pool.publish(learner.publish().weights(), env_steps=0)
rollouts = [r for _ in range(4) for r in pool.collect(timeout_s=60, updates=0)]
rollout = rollouts[0]
print(f"{len(rollout.lane)} blocks of {agent.sequence.block_rows} rows, lanes {set(rollout.lane)}")
for name, leaf in trees.flatten(rollout.rows).items():
    print(f"rows.{name:30} {leaf.dtype!s:8} {leaf.shape}")
for name, leaf in trees.flatten(rollout.carry).items():
    print(f"carry.{name:29} {leaf.dtype!s:8} {leaf.shape}")

# %% [markdown]
# One lane's rows in order. The row whose observation is an episode's last is not valid; its reward and
# discount are 0. Where an episode was cut, the row before has discount 1: its value may be bootstrapped.

# %%
own = np.flatnonzero(rollout.lane == 0)
rows = trees.tree_map(lambda x: x[own].reshape(-1, *x.shape[2:]), rollout.rows)
print("row  time  first  prev_action  action  reward  discount  valid      Q")
for i in range(14):
    r = trees.tree_map(lambda x, i=i: x[i], rows)
    print(
        f"{i:3}  {r.inputs.time:4}  {r.inputs.first!s:5}  {r.inputs.prev_action:11}  {r.action:6}"
        f"  {r.reward:6}  {r.discount:8}  {r.valid!s:5}  {r.acting.q:6.3f}"
    )

# %% [markdown]
# ## 3. The replay stores blocks and draws sequences
#
# A sequence is a window over blocks, so overlapping ones share their rows. Its first priority comes from
# the Q-values of acting time.

# %%
for rollout in rollouts:
    replay.add(rollout)
print(f"{replay.rows} rows, {replay.startable} sequences, {replay.nbytes / 1e6:.2f} MB")
sample = replay.sample(16)
batch = trees.tree_map(np.array, sample.batch)  # a copy: the next sample uses the same memory again
print(f"observation {batch.rows.inputs.observation['observation'].shape}: sequences, rows, leaf")
print("importance", np.round(batch.importance, 2))

# %% [markdown]
# ## 4. The keystone, by hand
#
# With unchanged weights, acting once more over a drawn sequence from its stored carry must give the
# Q-values that were stored. A carry one row late, a wrong previous action, a forgotten reset: each one
# shows here. rlx measures it in every run (`learner/q_drift`).

# %%
params = learner.publish().weights().params
value = jax.jit(agent.values)


def acted_again(batch):
    """Q of the actions taken, [B, L]: from the stored carry, row by row."""
    carry, q = batch.carry, []
    for row in range(batch.rows.action.shape[1]):
        inputs = trees.tree_map(lambda x, row=row: x[:, row], batch.rows.inputs)
        values, carry = value(params, inputs, carry)
        q.append(np.take_along_axis(np.asarray(values), batch.rows.action[:, row, None], 1)[:, 0])
    return np.stack(q, axis=1)


difference = np.abs(acted_again(batch) - batch.rows.acting.q).max()
print(f"largest difference to the Q-values of acting time: {difference:.1e}")
assert difference < 1e-4

# %%
late = trees.tree_map(lambda x: np.roll(x, 1, axis=1), batch.rows.inputs.prev_action)
inputs = dataclasses.replace(batch.rows.inputs, prev_action=late)
wrong = dataclasses.replace(batch, rows=dataclasses.replace(batch.rows, inputs=inputs))
print(f"previous action one row late: {np.abs(acted_again(wrong) - batch.rows.acting.q).max():.1e}")

# %% [markdown]
# ## 5. Burn-in: what the gradient may see
#
# How much does the Q of each trained row depend on each row's observation? Not on later rows (below the
# diagonal is the past), not across an episode's end (the carry is reset there), and not on the burn-in:
# that part is unrolled, but no gradient crosses its edge.

# %%
ends = (~batch.rows.valid).sum(axis=1)
which = int(np.argmax((ends == 1) & ~batch.rows.valid[:, 8]))  # an end in the trained part, if any
one = trees.tree_map(lambda x: jnp.asarray(x[which : which + 1]), batch)
time_major = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), one.rows)
every = common.batch_inputs(one)  # [L + 1]: the rows' inputs, and the one after them


def trained_q(observation):
    """[T + n]: as the update unrolls it."""
    inputs = dataclasses.replace(every, observation={"observation": observation})
    stacked, _ = agent.network.stack_frames(inputs, one.carry)
    burn_in, trained = common.window(stacked, 0, 4), common.window(stacked, 4, None)
    _, core = agent.network.unroll(params, burn_in, one.carry.core)
    features, _ = agent.network.unroll(params, trained, jax.lax.stop_gradient(core))
    return agent.network.read(params, "head", agent.head, features)[:, 0].max(axis=-1)


jacobian = jax.jacobian(trained_q)(every.observation["observation"])  # [T + n, L + 1, 1, *]
influence = np.asarray(jnp.linalg.norm(jacobian[:, :, 0], axis=-1))
assert (influence[:, :4] == 0).all()  # nothing flows into the burn-in

# %%
figure, axes = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
image = axes.imshow(np.log10(influence.T + 1e-6), origin="upper", cmap="viridis", aspect="auto")
figure.colorbar(image, label="log10 of the gradient's norm")
axes.axhline(3.5, color="w", ls="--", lw=1)
axes.text(10.4, 3.2, "burn-in", color="w", ha="right")
for row in np.flatnonzero(every.first[:, 0]):
    axes.axhline(row - 0.5, color="#ee6677", lw=1)
    axes.text(10.4, row - 0.2, "an episode begins", color="#ee6677", ha="right", va="top")
axes.set(xlabel="Q of row", ylabel="observation of row", title="What the gradient sees")
axes.set(xticks=range(11), xticklabels=range(4, 15), yticks=range(15))
plt.show()

# %% [markdown]
# ## 6. n-step targets
#
# A trained row sums up to three rewards and then bootstraps: three rows later, or from its episode's last
# observation where that comes first. After a termination the discount is 0 and nothing is bootstrapped.

# %%
T, n = agent.sequence.unroll, agent.sequence.n_step
reward, discount, valid = (
    np.asarray(x)[4:, 0] for x in (time_major.reward, time_major.discount, time_major.valid)
)
bootstrap = np.asarray(trained_q(every.observation["observation"]))
gamma = cfg.agent.discount


def by_hand(t):
    """(target, row that is bootstrapped) of trained row t, in plain Python."""
    target, factor = 0.0, 1.0
    for k in range(t, t + n):
        if not valid[k]:
            return target + factor * bootstrap[k], k
        target, factor = target + factor * reward[k], factor * gamma * discount[k]
    return target + factor * bootstrap[t + n], t + n


targets = ops.n_step_return(
    *(x[:, None] for x in (reward, discount, valid, bootstrap)), n=n, gamma=gamma, xp=np
)[:, 0]
np.testing.assert_allclose(targets, [by_hand(t)[0] for t in range(T)], rtol=1e-5)

# %%
figure, axes = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
for t in range(T):
    if not valid[t]:
        axes.text(
            t + 4, t + 4, "not trained", color="#999999", ha="center", va="center", fontsize=8
        )
        continue
    last = by_hand(t)[1]
    axes.plot([t + 4, last + 4], [t + 4, t + 4], color="#bbbbbb", lw=1, zorder=0)
    summed = axes.scatter(np.arange(t, last) + 4, [t + 4] * (last - t), s=45, color="#4477aa")
    value_at = axes.scatter([last + 4], [t + 4], s=60, marker="*", color="#cc6677")
for row in np.flatnonzero(~valid) + 4:
    axes.axvspan(row - 0.5, row + 0.5, color="#eeeeee", zorder=-1)
    axes.text(row, 11.9, "last observation", ha="center", va="bottom", fontsize=8, color="#666666")
axes.legend(
    [summed, value_at],
    ["reward is summed", "value is bootstrapped"],
    frameon=False,
    loc="upper right",
)
axes.set(
    xlabel="row of the sequence", ylabel="target of row", xticks=range(4, 15), yticks=range(4, 12)
)
axes.set(ylim=(12, 3.5), title="n-step targets, n = 3")
plt.show()

# %% [markdown]
# ## 7. The update
#
# Before the first update the target network is the online one, so the learner's TD errors are those that
# acting gave as first priorities. Rows that are not valid have none (-1).

# %%
scalars = dataclasses.replace(
    batch.rows, inputs=dataclasses.replace(batch.rows.inputs, observation={})
)
# Of the row after the last one the batch holds the input only: the last row stands in for its value.
scalars = trees.tree_map(lambda x: np.concatenate([x, x[:, -1:]], axis=1), scalars)
initial_priorities = agent.initial_priorities(scalars)[:, :-1]
before = learner.state().params
output = learner.update(learner.put(sample.batch))
td = learner.priorities(output)
print(f"TD errors {td.shape}: sequences, trained rows; {(td == -1).sum()} rows not valid")
difference = np.abs(td[:, :-1] - initial_priorities).max()
print(f"largest difference to those of acting time: {difference:.1e}")
assert difference < 1e-4
for name, metric in sorted(output.metrics.items()):
    print(f"{name:22} {float(np.asarray(metric)[0]):.4f}")

# %%
after = learner.state().params
for name, leaf in trees.flatten(after).items():
    moved = np.abs(leaf - trees.flatten(before)[name]).max()
    print(f"{name:45} {leaf.shape!s:12} moved by at most {moved:.1e}")

# %% [markdown]
# ## 8. Priorities go back
#
# A sequence's priority is 0.9 of its largest TD error and 0.1 of their mean: one surprising row is enough
# to be seen again. It is drawn in proportion to priority^0.9, which the importance weights correct. First
# 200 more updates, as the loop makes them, so that some sequences are understood better than others.

# %%
replay.update_priorities(sample.keys, td)
newest = dict(zip(sample.keys, td, strict=True))  # the last TD errors of each sequence
for _ in range(200):
    sample = replay.sample(16)
    td = learner.priorities(learner.update(learner.put(sample.batch)))
    replay.update_priorities(sample.keys, td)
    newest |= zip(sample.keys, td, strict=True)
keys, td = np.array(list(newest)), np.stack(list(newest.values()))
priority = sequence_priority(td, eta=0.9)
drawn = np.concatenate([replay.sample(16).keys for _ in range(1000)])
times = (drawn == keys[:, None]).sum(axis=1)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.4), layout="constrained")
shown = np.argsort(priority)[:: len(priority) // 16]
errors = np.where(td == -1, np.nan, td)[shown]
places = np.arange(len(shown))
left.plot(places, errors, ".", color="#bbbbbb", label=["rows"] + ["_"] * (T - 1))
left.plot(places, np.nanmax(errors, axis=1), "_", color="#4477aa", ms=12, label="largest")
left.plot(places, np.nanmean(errors, axis=1), "_", color="#228833", ms=12, label="mean")
left.plot(places, priority[shown], "x", color="#cc6677", label="priority")
left.set(xlabel="some sequences, by priority", ylabel="absolute TD error", title="Priorities")
left.set(ylim=(0, None))
left.legend(frameon=False, fontsize=8)

weight = (priority + 0.001) ** 0.9
right.plot(weight, times, "o", ms=4, color="#4477aa", alpha=0.6)
line = np.array([0, weight.max()])
right.plot(line, line * (times.sum() / weight.sum()), color="#cc6677", label="in proportion")
right.set(xlabel="(priority + epsilon)^0.9", ylabel="times drawn", title=f"{len(drawn):,} draws")
right.set(ylim=(0, None))
right.legend(frameon=False)
plt.show()

# %% [markdown]
# That is the whole path. `rlx/loop.py` walks it again and again, lets acting and learning keep their
# ratio, publishes weights, evaluates, and writes checkpoints.

# %%
parts.close()
