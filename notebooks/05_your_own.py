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
# # An environment, a network and an agent of your own
#
# Each is one file and one YAML in a package of yours; rlx itself stays as it is.
# `pip install 'rlx[notebook,report]'`

# %%
import os
import sys
import tempfile
from pathlib import Path

from omegaconf import OmegaConf

import rlx
from rlx import notebook, results

SMALL = "RLX_SMALL" in os.environ  # set where these notebooks are only tested
folder = Path(tempfile.mkdtemp(prefix="rlx-"))
package = folder / "mypkg"
conf = package / "conf"


def write(path: str, text: str) -> None:
    (package / path).parent.mkdir(parents=True, exist_ok=True)
    (package / path).write_text(text.lstrip())


# %% [markdown]
# ## The environment
#
# A T-maze: the first observation shows a cue, a corridor follows, and at the junction the agent must turn
# to the side that the cue showed. It is a plain gymnasium environment; rlx's gymnasium family makes lanes
# of it.

# %%
write(
    "tmaze.py",
    '''
"""A T-maze: remember the first observation until the junction."""

import gymnasium
import numpy as np

FORWARD, LEFT, RIGHT = 0, 1, 2


class TMaze(gymnasium.Env):
    """Observes (cue: -1 left, 1 right, 0 after the first step; at the junction; noise)."""

    action_space = gymnasium.spaces.Discrete(3)
    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (3,), np.float32)

    def __init__(self, corridor: int) -> None:
        self._corridor = corridor  # env steps from the cue to the junction

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._place, self._right = 0, bool(self.np_random.integers(2))
        return self._seen(), {}

    def step(self, action):
        if self._place < self._corridor and action == FORWARD:
            self._place += 1
            return self._seen(), 0.0, False, False, {}
        goal = RIGHT if self._right else LEFT  # any turn before the junction hits a wall
        won = self._place == self._corridor and action == goal
        return self._seen(), 1.0 if won else -1.0, True, False, {}

    def _seen(self):
        cue = (1 if self._right else -1) if self._place == 0 else 0
        noise = self.np_random.uniform(-1, 1)
        return np.array([cue, self._place == self._corridor, noise], np.float32)


gymnasium.register("TMaze-v0", TMaze)
''',
)
write(
    "conf/env/tmaze.yaml",
    """
# T-maze: the cue of the first step says where to turn at the junction.
defaults: [gymnasium, _self_] # rlx's conf/env/gymnasium.yaml, with these changes
id: mypkg.tmaze:TMaze-v0      # module:id imports the module, which registers the id
kwargs:
  corridor: 8                 # env steps from the cue to the junction
""",
)

# %% [markdown]
# ## The network
#
# A network is torso and core, an agent adds its head, and any of them may be yours. This core is minGRU
# ([Feng et al. 2024](https://arxiv.org/abs/2410.01201)): its gate does not read the state, so that all rows of
# a sequence are computed at once. A core has one duty: where `first` is true the state is zero before that row.

# %%
write(
    "mingru.py",
    '''
"""minGRU: a recurrence without a loop over time."""

from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlx.networks.cores import Core
from rlx.types import Array, Range


class MinGRU(Core, kw_only=True):
    """h_t = (1 - z_t) h_{t-1} + z_t c_t, gate z and candidate c from the input alone."""

    units: Annotated[int, Range(ge=1)]
    gate_bias: float  # below 0 the state changes slowly at first

    def initial_carry(self, batch: int) -> dict[str, Array]:
        return {"h": jnp.zeros((batch, self.units), jnp.float32)}

    @nn.compact
    def __call__(self, x: Array, first: Array, carry: Any, dtype: Any) -> tuple[Array, Any]:
        both = nn.Dense(2 * self.units, dtype=dtype)(x).astype(jnp.float32)  # [T, B, 2 units]
        gate, candidate = jnp.split(both, 2, axis=-1)
        z = nn.sigmoid(gate + self.gate_bias)
        keep = jnp.where(first[..., None], 0.0, 1 - z)
        keep, added = jax.lax.associative_scan(_after, (keep, z * candidate))
        h = keep * carry["h"] + added
        return h, {"h": h[-1]}


def _after(a: Any, b: Any) -> Any:
    """One step of h -> keep * h + added after another."""
    return a[0] * b[0], a[1] * b[0] + b[1]
''',
)
write(
    "conf/network/mlp_mingru.yaml",
    """
# mlp_lstm with a minGRU.
defaults: [mlp_lstm, _self_]
core:
  _target_: mypkg.mingru.MinGRU
  units: 64
  gate_bias: -2.0         # 0.12 of the candidate enters per env step at first
""",
)

# %% [markdown]
# ## The agent
#
# An agent is a frozen dataclass of pure functions; it may hold another one, and inherits from none. This is R2D2 with
# *advantage learning* ([Bellemare et al. 2016](https://arxiv.org/abs/1512.04860)): the target network's
# `alpha (Q(x, a) - max Q(x, .))` is added to each reward, so that the best action stands out from the others.

# %%
write(
    "advantage.py",
    '''
"""R2D2 with advantage learning."""

from dataclasses import dataclass, replace
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np

from rlx import ops
from rlx.agents import common
from rlx.agents.q_learning import HEAD
from rlx.agents.r2d2 import R2D2
from rlx.types import (
    Array, Batch, Carry, EnvSpec, NetInput, Params, QActing, Range, Row, Runtime,
    SequenceSpec, TrainState, UpdateOutput,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class AdvantageR2D2:
    """An interfaces.Agent."""

    alpha: Annotated[float, Range(ge=0, lt=1)]  # Bellemare et al.: 0.9
    r2d2: R2D2
    spec: Runtime[EnvSpec]

    on_policy = False
    samples = False

    def __post_init__(self) -> None:
        if self.r2d2.reward != "raw":  # else the sum would be clipped, not the reward
            raise ValueError(f"agent.r2d2.reward={self.r2d2.reward}: advantage learning needs raw.")

    # --- what differs ----------------------------------------------------------------------------

    def initial_priorities(self, rows: Row) -> np.ndarray:
        return self.r2d2.initial_priorities(self._widened(rows, rows.acting.q, rows.acting.q_max, np))

    def update(
        self, state: TrainState, batch: Batch, *, axis_name: str | None = None
    ) -> tuple[TrainState, UpdateOutput]:
        rows, carry = common.time_major(batch.rows), batch.carry
        net, target = self.r2d2.network, state.target_params
        features, _ = net.apply(target, rows.inputs, carry)
        q = net.read(target, HEAD, self.r2d2.head, features)  # [L, B, A]
        rows = self._widened(rows, common.take_action(q, rows.action), q.max(axis=-1), jnp)
        rows = replace(batch.rows, reward=rows.reward.T)
        return self.r2d2.update(state, replace(batch, rows=rows), axis_name=axis_name)

    def _widened(self, rows: Row, q: Array, q_max: Array, xp: Any) -> Row:
        """Rows whose rewards hold the advantage, too; q and q_max are rescaled values."""
        if (epsilon := self.r2d2.rescale_epsilon) is not None:
            q, q_max = (ops.unrescale(x, epsilon, xp) for x in (q, q_max))
        return replace(rows, reward=rows.reward + self.alpha * (q - q_max))

    # --- what is R2D2's --------------------------------------------------------------------------

    @property
    def sequence(self) -> SequenceSpec:
        return self.r2d2.sequence

    @property
    def acting_spec(self) -> QActing:
        return self.r2d2.acting_spec

    def init(self, key: Array) -> TrainState:
        return self.r2d2.init(key)

    def initial_carry(self, batch: int) -> Carry:
        return self.r2d2.initial_carry(batch)

    def acting_params(self, state: TrainState) -> Params:
        return self.r2d2.acting_params(state)

    def act(
        self, params: Params, inputs: NetInput, carry: Carry, key: Array, exploration: Array
    ) -> tuple[Array, QActing, Carry]:
        return self.r2d2.act(params, inputs, carry, key, exploration)
''',
)
write(
    "conf/agent/advantage.yaml",
    """
# R2D2 with advantage learning.
defaults: [r2d2_small@r2d2, _self_] # agent.r2d2 are the settings of rlx's agent=r2d2_small
_target_: mypkg.advantage.AdvantageR2D2
alpha: 0.5                # share of the advantage in each reward
r2d2:
  n_step: 1               # the operator's: further steps would be charged for their exploration
""",
)

# %% [markdown]
# ## Used like rlx's own
#
# A `_target_` may name what an allowed package defines, and only code can allow one. An installed package does it with
# an entry point of the group `rlx.allow`; `python -m rlx.train --config-dir mypkg/conf env=tmaze network=mlp_mingru
# agent=advantage` is then the run below.

# %%
sys.path.insert(0, str(folder))  # instead of installing it
rlx.allow("mypkg.")
mine = ["env=tmaze", "network=mlp_mingru", "agent=advantage"]
cfg = rlx.compose(mine, extra_dir=conf)
print(OmegaConf.to_yaml(cfg.network.core), OmegaConf.to_yaml(cfg.agent), sep="\n")

# %% [markdown]
# Your settings are checked like all others: names, types, ranges, and what the class itself refuses.

# %%
try:
    rlx.compose([*mine, "agent.alhpa=0.3"], extra_dir=conf)
except Exception as error:
    print(error)

# %%
try:
    rlx.run(rlx.compose([*mine, "agent.alpha=1.5"], extra_dir=conf), folder / "refused")
except Exception as error:
    print(error)

# %% [markdown]
# A test that every core should pass: an unroll over T rows equals T unrolls of one row, resets included. Acting goes
# row by row, learning all at once, and both must see the same values.

# %%
import jax
import numpy as np
from mypkg.mingru import MinGRU

core, rng = MinGRU(units=4, gate_bias=-2.0), np.random.default_rng(0)
x = rng.normal(size=(12, 3, 5)).astype(np.float32)  # [T, B, features]
first = rng.random((12, 3)) < 0.2
carry = core.initial_carry(3)
params = core.init(jax.random.PRNGKey(0), x, first, carry, "float32")
unroll = jax.jit(core.apply, static_argnums=4)
whole, _ = unroll(params, x, first, carry, "float32")
for t in range(12):
    row, carry = unroll(params, x[t : t + 1], first[t : t + 1], carry, "float32")
    np.testing.assert_allclose(row[0], whole[t], rtol=1e-5, atol=1e-6)
print("the same, row by row and all at once")

# %% [markdown]
# ## Trained
#
# About half a minute on two CPU cores; 8,000 env steps are enough. The best return is 1; who cannot remember the cue
# guesses: 0 on average. Returns of training stay below those of the evaluation: its lanes explore.

# %%
steps = [
    "total_env_steps=30_000",
    "logging.every_env_steps=1000",
    "evaluation.every_env_steps=1000",
]
short = ["total_env_steps=1500", "evaluation.every_env_steps=700", "evaluation.final_episodes=8"]
short += ["agent.r2d2.burn_in=0", "agent.r2d2.unroll=10"]
common = ["logging.console=off", *steps, *(short if SMALL else [])]
with notebook.live(folder / "runs" / "mlp_mingru"):
    rlx.run(rlx.compose([*mine, *common], extra_dir=conf), folder / "runs" / "mlp_mingru")

# %% [markdown]
# The same agent with `network=mlp`, which is rlx's own and has no memory: the ablation. Over 200 episodes we saw
# 1.00 with the minGRU and -0.04 without memory.

# %%
cfg = rlx.compose([*mine, "network=mlp", *common], extra_dir=conf)
summary = rlx.run(cfg, folder / "runs" / "mlp")
for name in ("mlp_mingru", "mlp"):
    run = rlx.load(folder / "runs" / name)
    result = run.evaluate(episodes=8 if SMALL else 200, seed=7)
    print(f"{name}: mean return {result['mean']:.2f} of {result['episodes']} episodes")

# %%
import matplotlib.pyplot as plt

rows = results.load(folder / "runs").dropna(subset="evaluation/return_mean")
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
for name, colour in (("mlp_mingru", "#4477aa"), ("mlp", "#cc6677")):
    curve = rows[rows["run"] == name]
    axes.plot(curve["env_steps"], curve["evaluation/return_mean"], color=colour, label=name)
axes.axhline(0, color="#666666", linewidth=1, linestyle=":", label="a guess at the junction")
axes.set(xlabel="env steps", ylabel="mean return, 20 episodes", ylim=(-1.1, 1.1))
axes.legend(frameon=False, loc="lower right")
axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# What it does, step by step: forward through the corridor, then the turn that the cue asked for.

# %%
import gymnasium

run = rlx.load(folder / "runs" / "mlp_mingru")
env = gymnasium.make("mypkg.tmaze:TMaze-v0", corridor=8)
for seed in range(4):
    observation, _ = env.reset(seed=seed)
    cue, (action, state) = observation[0], run.act(observation)
    actions, ended = [], False
    while not ended:
        actions.append(action)
        observation, reward, ended, _, _ = env.step(action)
        if not ended:
            action, state = run.act(observation, state, reward=reward)
    print(f"cue {cue:+.0f}, actions {actions}, return {reward:+.0f}")
