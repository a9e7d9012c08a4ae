"""Small networks, agents and batches for tests."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from rlx import trees
from rlx.agents import running
from rlx.agents.optimizers import Optimizer
from rlx.agents.r2d2 import R2D2
from rlx.networks.cores import GRU, LSTM, Core, Feedforward
from rlx.networks.heads import Dueling, Head
from rlx.networks.recurrent import RecurrentNetwork
from rlx.networks.torsos import MLP, NatureCNN, Torso
from rlx.types import (
    ArraySpec,
    Batch,
    BoxSpec,
    Carry,
    DiscreteSpec,
    EnvSpec,
    MultiDiscreteSpec,
    NetInput,
    QActing,
    Row,
    TrainState,
    UpdateOutput,
)

CORES: dict[str, Core] = {
    "lstm": LSTM(units=8),
    "gru": GRU(units=8),
    "none": Feedforward(units=8, activation="relu", layer_norm=False),
}
SMALL_CNN = NatureCNN(
    channels=(4, 4), kernels=(8, 4), strides=(8, 4), layer_norm=False, remat=False
)
VECTOR = EnvSpec(
    id="vector",
    observation={"observation": ArraySpec(shape=(3,), dtype="float32")},
    action=DiscreteSpec(n=4),
    frames_per_env_step=1,
)
IMAGE = EnvSpec(
    id="image",
    observation={"observation": ArraySpec(shape=(1, 84, 84), dtype="uint8")},
    action=DiscreteSpec(n=4),
    frames_per_env_step=4,
)
BOX = EnvSpec(
    id="box",
    observation=VECTOR.observation,
    action=BoxSpec(shape=(2,), low=(-1.0, -1.0), high=(1.0, 1.0)),
    frames_per_env_step=1,
)
CHOICES = EnvSpec(
    id="choices",
    observation=VECTOR.observation,
    action=MultiDiscreteSpec(counts=(3, 2)),
    frames_per_env_step=1,
)
MASKED = EnvSpec(
    id="masked",
    observation=VECTOR.observation | {"mask": ArraySpec(shape=(4,), dtype="int8")},
    action=DiscreteSpec(n=4),
    frames_per_env_step=1,
    action_mask="mask",
)


def mlp(*layers: int) -> MLP:
    return MLP(layers=layers, activation="relu", layer_norm=False)


def network(spec: EnvSpec = VECTOR, core: str = "lstm", **changes: Any) -> RecurrentNetwork:
    image = any(len(leaf.shape) == 3 for leaf in spec.observation.values())
    torso: Torso = SMALL_CNN if image else mlp(8)
    settings: dict[str, Any] = {
        "torso": torso,
        "dense_before_core": None,
        "layer_norm": False,
        "core": CORES[core],
        "stack": {"observation": 4} if image else {},
        "discrete": "one_hot",
        "prev_action": True,
        "prev_reward": True,
        "time": False,
        "time_scale": 1e-5,
        "orthogonal": False,
        "frozen": [],
        "compute_dtype": "float32",
        "spec": spec,
    }
    return RecurrentNetwork(**settings | changes)


HEAD = Dueling(hidden=8, noise=None)


def init(net: RecurrentNetwork, key: Any, head: Head = HEAD) -> Any:
    """Parameters of a body and one head."""
    import jax

    return jax.jit(lambda key: net.init(key, {"head": head}))(key)


def q_values(agent: Any, params: Any, inputs: NetInput, carry: Carry) -> tuple[Any, Carry]:
    """(Q of every action [T, B, A], the carry after the last row) of an agent with one head."""
    features, carry = agent.network.apply(params, inputs, carry)
    return agent.network.read(params, "head", agent.head, features), carry


def adam(**changes: Any) -> Optimizer:
    settings: dict[str, Any] = {
        "rule": "adam",
        "learning_rate": 1e-3,
        "b1": 0.9,
        "b2": 0.999,
        "epsilon": 1e-3,
        "max_grad_norm": 80.0,
        "max_grad_norm_ratio": None,
        "warmup_gradient_steps": 0,
        "decay_gradient_steps": None,
        "decay": "linear",
        "final_learning_rate": 0.0,
    }
    return Optimizer(**settings | changes)


def agent(net: RecurrentNetwork | None = None, **changes: Any) -> R2D2:
    net = net or network()
    settings: dict[str, Any] = {
        "burn_in": 4,
        "unroll": 6,
        "n_step": 3,
        "stride": 4,
        "block_rows": 4,
        "discount": 0.97,
        "double_q": True,
        "rescale_epsilon": 1e-3,
        "reward": "raw",
        "stored_state": True,
        "error": "squared",
        "loss_over_time": "mean",
        "munchausen": None,
        "target_period_updates": 10,
        "target_period_env_steps": None,
        "target_rate": None,
        "head": HEAD,
        "optimizer": adam(),
        "network": net,
        "spec": net.spec,
    }
    return R2D2(**settings | changes)


def random_state(agent: Any) -> TrainState:
    """A state of random parameters, whose target network is another one; nothing is compiled."""
    shapes = jax.eval_shape(agent.init, jax.random.PRNGKey(0))
    rng = np.random.default_rng(0)

    def drawn(spec: Any) -> np.ndarray:
        wide = spec.shape[0] if spec.ndim > 1 else 4
        return (rng.normal(size=spec.shape) * wide**-0.5).astype(spec.dtype)

    zeros = jax.tree.map(lambda spec: np.zeros(spec.shape, spec.dtype), shapes)
    return dataclasses.replace(
        zeros,
        params=jax.tree.map(drawn, shapes.params),
        target_params=jax.tree.map(drawn, shapes.target_params),
        key=jax.random.PRNGKey(0),
    )


def told(agent: Any, state: TrainState, batch: Batch) -> tuple[np.ndarray, float]:
    """(priorities, loss) of an update, compiled without what only the new state needs."""
    priorities, loss = _told(agent)(state, batch)
    return np.asarray(priorities), float(loss)


@functools.lru_cache(maxsize=2)
def _told(agent: Any) -> Any:
    def update(state: TrainState, batch: Batch) -> tuple[Any, Any]:
        output = agent.update(state, batch)[1]
        return output.priorities, output.metrics["learner/loss"]

    return jax.jit(update)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Watching:
    """R2D2 that also keeps the moments of the observations that it learns from."""

    r2d2: R2D2

    def __getattr__(self, name: str) -> Any:
        return getattr(self.r2d2, name)

    def init(self, key: Any) -> TrainState:
        moments = running.nothing(self.r2d2.spec.observation["observation"].shape)
        return dataclasses.replace(self.r2d2.init(key), statistics={"observation": moments})

    def update(
        self, state: TrainState, batch: Batch, *, axis_name: str | None = None
    ) -> tuple[TrainState, UpdateOutput]:
        after, output = self.r2d2.update(state, batch, axis_name=axis_name)
        moments = running.observe(
            state.statistics["observation"],
            batch.rows.inputs.observation["observation"],
            batch.rows.valid,
            axis_name,
        )
        return dataclasses.replace(after, statistics={"observation": moments}), output


def inputs(spec: EnvSpec, *leading: int, rng: np.random.Generator) -> NetInput:
    """Random inputs with resets here and there."""
    first = rng.random(leading) < 0.2
    observation = {
        name: observed(name, leaf, spec, *leading, rng=rng)
        for name, leaf in spec.observation.items()
    }
    action = actions(spec, *leading, rng=rng)
    every_element = first.reshape(*leading, *(1 for _ in spec.action.array.shape))
    none = np.asarray(spec.action.none, action.dtype)
    return NetInput(
        observation=observation,
        prev_action=np.where(every_element, none, action),
        prev_reward=np.where(first, 0, rng.normal(size=leading)).astype(np.float32),
        time=np.zeros(leading, np.int32),
        first=first,
    )


def observed(
    name: str, leaf: ArraySpec, spec: EnvSpec, *leading: int, rng: np.random.Generator
) -> np.ndarray:
    """Noise for a leaf; a mask that allows fewer than half of the actions, and sometimes none."""
    shape = (*leading, *leaf.shape)
    if name == spec.action_mask:
        return (rng.random(shape) < 0.4).astype(leaf.dtype)
    noise = rng.integers(0, 256, shape) if leaf.dtype == "uint8" else rng.normal(size=shape)
    return noise.astype(leaf.dtype)


def actions(spec: EnvSpec, *leading: int, rng: np.random.Generator) -> np.ndarray:
    """Random actions [*leading, *], those of a box beyond its bounds, too."""
    if isinstance(spec.action, DiscreteSpec):
        return rng.integers(0, spec.action.n, leading).astype(np.int32)
    if isinstance(spec.action, MultiDiscreteSpec):
        counts = spec.action.counts
        return rng.integers(0, counts, (*leading, len(counts))).astype(np.int32)
    return (2 * rng.normal(size=(*leading, *spec.action.shape))).astype(np.float32)


def random_carry(net: RecurrentNetwork, batch: int, rng: np.random.Generator) -> Carry:
    """Draws a carry as if acting had gone on for a while."""
    import jax

    def noise(x: Any) -> np.ndarray:
        if x.dtype == np.uint8:
            return rng.integers(0, 256, x.shape).astype(np.uint8)
        return rng.normal(size=x.shape).astype(x.dtype) / 2

    return jax.tree.map(noise, net.initial_carry(batch))


def batch(agent: R2D2, size: int, *, seed: int = 0) -> Batch:
    """Random sequences in which episodes end, by termination and by truncation."""
    rng = np.random.default_rng(seed)
    length = agent.sequence.length + 1  # with the row whose input is `next`
    net_inputs = inputs(agent.spec, size, length, rng=rng)
    # The row before a first row is an episode's last observation: not valid.
    valid = np.ones((size, length), bool)
    valid[:, :-1] = ~net_inputs.first[:, 1:]
    terminated = rng.random((size, length)) < 0.5
    discount = np.ones((size, length), np.float32)
    discount[:, :-1] = np.where(~valid[:, 1:] & terminated[:, 1:], 0, 1)
    discount = np.where(valid, discount, 0).astype(np.float32)
    scalar = rng.normal(size=(2, size, length)).astype(np.float32)
    assert isinstance(agent.spec.action, DiscreteSpec)
    rows = Row(
        inputs=net_inputs,
        action=rng.integers(0, agent.spec.action.n, (size, length)).astype(np.int32),
        reward=np.where(valid, rng.normal(size=(size, length)), 0).astype(np.float32),
        discount=discount,
        valid=valid,
        acting=QActing(q=scalar[0], q_max=np.maximum(scalar[0], scalar[1])),
    )
    importance = rng.uniform(0.2, 1, size).astype(np.float32)
    return cut(rows, random_carry(agent.network, size, rng), importance)


def cut(rows: Row, carry: Carry, importance: np.ndarray) -> Batch:
    """A batch of rows [B, L + 1, ...], of whose last row only the input is there."""
    return Batch(
        rows=trees.tree_map(lambda x: x[:, :-1], rows),
        next=trees.tree_map(lambda x: x[:, -1], rows.inputs),
        carry=carry,
        importance=importance,
    )


def all_inputs(batch: Batch) -> NetInput:
    """The inputs [B, L + 1, ...] of a batch, `next` among them."""
    joined: NetInput = trees.tree_map(
        lambda rows, after: np.concatenate([rows, after[:, None]], axis=1),
        batch.rows.inputs,
        batch.next,
    )
    return joined
