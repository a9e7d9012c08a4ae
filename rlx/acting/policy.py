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
from rlx.seeding import spawn_int
from rlx.types import Carry, NetInput, Weights

trees.register()


class Policy:
    """Chooses actions for any n of its N lanes; the same function for one lane or all of them."""

    def __init__(self, *, agent: Agent, lanes: int, seed: int, path: tuple, device: Device) -> None:
        self.version = -1
        self._device = jax.devices("cpu" if device == "cpu" else None)[0]
        self._params: Any = None
        self._step = 0
        with jax.default_device(self._device):
            self._key = jax.random.PRNGKey(spawn_int(seed, *path))
            table = jax.tree.map(jnp.array, agent.initial_carry(lanes))
        self._table = jax.device_put(table, self._device)
        self._act = _compiled_act(cast(Hashable, agent))  # agents hash by identity

    def take(self, weights: Weights) -> None:
        """Acts with these from now on."""
        self._params = jax.device_put(weights.params, self._device)
        self.version = weights.version

    def act(
        self, inputs: NetInput, lane: np.ndarray | None, epsilon: np.ndarray
    ) -> tuple[np.ndarray, Any]:
        """inputs [n, ...] of these lanes (None: all N, in order) -> (action i32[n], record [n])."""
        if self._params is None:
            raise RuntimeError("Policy.act before Policy.take: the first request brings weights.")
        step = np.uint32(self._step)
        self._step += 1
        action, acting, self._table = self._act(
            self._params, self._table, inputs, lane, self._key, step, epsilon
        )
        return jax.device_get((action, acting))

    def carry(self, lane: np.ndarray) -> Carry:
        """A copy of these lanes' carries [n, ...], before the next `act`."""
        return trees.tree_map(lambda x: np.asarray(x)[lane], self._table)


@functools.lru_cache(maxsize=8)
def _compiled_act(agent: Any) -> Any:
    """One compiled function per agent, however many actors of it live in the process."""

    @functools.partial(jax.jit, donate_argnums=1)
    def act(
        params: Any, table: Carry, inputs: NetInput, lane: Any, key: Any, step: Any, epsilon: Any
    ) -> Any:
        key = jax.random.fold_in(key, step)
        if lane is None:
            return agent.act(params, inputs, table, key, epsilon)
        carry = jax.tree.map(lambda x: x[lane], table)
        action, acting, carry = agent.act(params, inputs, carry, key, epsilon)
        return action, acting, jax.tree.map(lambda x, new: x.at[lane].set(new), table, carry)

    return act
