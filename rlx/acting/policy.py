"""The policy of one actor: owns the carries of its lanes as one table on a device."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from rlx import trees
from rlx.interfaces import Agent, Device
from rlx.machine import compiled
from rlx.seeding import spawn_int
from rlx.types import Carry, NetInput, Weights

trees.register()


class Policy:
    """Chooses actions for any n of its N lanes."""

    def __init__(
        self,
        *,
        agent: Agent,
        lanes: int,
        seed: int,
        path: tuple,
        device: Device,
        pad: bool = False,
    ) -> None:
        """`pad`: compile for 1, 2, 4, ... lanes only, for callers that bring any number of them."""
        self.version = -1
        self._lanes, self._pad = lanes, pad
        self._agent = agent
        # This process's own: of several learner processes each has some of `jax.devices()`.
        self._device = jax.local_devices(backend="cpu" if device == "cpu" else None)[0]
        self._params: Any = None
        with jax.default_device(self._device):
            self._key = jax.random.PRNGKey(spawn_int(seed, *path))
            carry = jax.tree.map(jnp.array, agent.initial_carry(lanes))
            table = (carry, jnp.zeros((), jnp.uint32))  # and how often it has acted
        self._table = jax.device_put(table, self._device)
        self._act = _compiled_act(cast(Hashable, agent))  # agents hash by identity

    def take(self, weights: Weights) -> None:
        """Takes weights to act with from now on."""
        self._params = jax.device_put(weights.params, self._device)
        self.version = weights.version

    def compile(self, inputs: NetInput, lane: np.ndarray | None = None) -> None:
        """Acts once for these lanes with parameters of zero; use another policy for real acting."""
        shapes = jax.eval_shape(lambda: self._agent.init(jax.random.PRNGKey(0)))
        params = jax.eval_shape(self._agent.acting_params, shapes)
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), params)
        self.take(Weights(version=0, params=zeros))
        self.act(inputs, lane, np.zeros(len(inputs.first), np.float32))

    def start(self, inputs: NetInput, lane: np.ndarray | None, exploration: np.ndarray) -> Any:
        """Sends inputs [n, ...] of these lanes (None: all N, in order) to the device.

        Returns at once what `finish` waits for: the host has work to do meanwhile.
        """
        if self._params is None:
            raise RuntimeError("Policy.start before Policy.take: the first request brings weights.")
        n = len(exploration)
        if self._pad and lane is not None:
            inputs, lane, exploration = _padded((inputs, lane, exploration), n, self._lanes)
        action, acting, self._table = self._act(
            self._params, self._table, inputs, lane, self._key, exploration
        )
        return action, acting, n

    def finish(self, started: Any) -> tuple[np.ndarray, Any]:
        """Waits for a `start`; returns (action [n, *], the agent's record of acting time [n])."""
        action, acting, n = started
        return np.asarray(action)[:n], jax.tree.map(lambda x: np.asarray(x)[:n], acting)

    def act(
        self, inputs: NetInput, lane: np.ndarray | None, exploration: np.ndarray
    ) -> tuple[np.ndarray, Any]:
        """Does `start` and `finish` in one call."""
        return self.finish(self.start(inputs, lane, exploration))

    def carry(self, lane: np.ndarray) -> Carry:
        """A copy of these lanes' carries [n, ...], before the next `start`."""
        return trees.tree_map(lambda x: np.asarray(x)[lane], self._table[0])


def _padded(parts: tuple[NetInput, np.ndarray, np.ndarray], n: int, lanes: int) -> Any:
    """The inputs padded to [m, ...], m the next power of 2; added lanes lie outside the table.

    For those JAX reads the last row and drops what is written.
    """
    size = 1 << (n - 1).bit_length()

    def pad(x: np.ndarray) -> np.ndarray:
        padded = np.zeros((size, *x.shape[1:]), x.dtype)
        padded[:n] = x
        return padded

    inputs, lane, exploration = trees.tree_map(pad, parts)
    lane[n:] = lanes
    return inputs, lane, exploration


@functools.lru_cache(maxsize=8)
def _compiled_act(agent: Any) -> Any:
    """Compiles one function per agent, however many actors use it in this process."""

    @functools.partial(jax.jit, donate_argnums=1)
    def act(
        params: Any, table: Any, inputs: NetInput, lane: Any, key: Any, exploration: Any
    ) -> Any:
        carries, step = table
        key = jax.random.fold_in(key, step)
        if lane is None:
            action, acting, carries = agent.act(params, inputs, carries, key, exploration)
            return action, acting, (carries, step + 1)
        carry = jax.tree.map(lambda x: x[lane], carries)
        action, acting, carry = agent.act(params, inputs, carry, key, exploration)
        carries = jax.tree.map(lambda x, new: x.at[lane].set(new), carries, carry)
        return action, acting, (carries, step + 1)

    return act


def prepare_process(*, compile_cache: bool, on_cpu: bool) -> None:
    """Sets JAX up for a process that only acts.

    compile_cache: one actor of a machine finds what another has compiled. on_cpu: refuse any other
    device, as an actor without GPUs of its own would take one of the learner's.
    """
    compiled.keep(compile_cache)
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # nothing here would overlap
    if on_cpu and jax.default_backend() != "cpu":
        raise RuntimeError(f"an actor runs on {jax.default_backend()!r}; it should be on the CPU")
