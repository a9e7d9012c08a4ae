"""The one mutable owner of the TrainState: replicates, pmaps, donates, counts, publishes.

The only module that knows the learner's devices. Nothing here waits for a device except `td`,
`state` and `Published.weights`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlx import trees
from rlx.interfaces import Agent
from rlx.seeding import spawn_int
from rlx.types import Batch, Params, Range, Runtime, TrainState, UpdateOutput, Weights

AXIS = "devices"

trees.register()


@dataclass(frozen=True, kw_only=True)
class Published:
    """Acting parameters on their way to the host."""

    version: int
    params: Params  # device arrays, a copy that no later update donates

    def weights(self) -> Weights:
        """Waits for the update that made them."""
        return Weights(version=self.version, params=jax.tree.map(np.asarray, self.params))


class Learner:
    """Updates of one agent over 1 .. n local devices, each with an equal share of the batch."""

    def __init__(
        self,
        *,
        batch_size: Annotated[int, Range(ge=1)],
        devices: Annotated[int, Range(ge=1)] | None,
        publish_every_updates: Annotated[int, Range(ge=1)],
        agent: Runtime[Agent],
        seed: Runtime[int],
    ) -> None:
        self.batch_size = batch_size
        self.publish_every_updates = publish_every_updates
        self.updates = 0
        self._agent = agent
        self._devices = choose_devices(devices, batch_size)
        mesh = Mesh(np.array(self._devices), (AXIS,))
        self._sharding = NamedSharding(mesh, PartitionSpec(AXIS))
        self._update = jax.pmap(
            functools.partial(agent.update, axis_name=AXIS),
            axis_name=AXIS,
            donate_argnums=0,
            devices=self._devices,
        )
        self._split = jax.jit(
            lambda x: x.reshape(len(self._devices), -1, *x.shape[1:]), out_shardings=self._sharding
        )
        self._copy = jax.jit(lambda tree: jax.tree.map(lambda x: jnp.copy(x[0]), tree))
        self._state = self._replicate(agent.init(jax.random.PRNGKey(spawn_int(seed, "learner"))))

    def put(self, batch: Batch) -> Batch:
        """Leaves [B, ...] of the host -> [D, B / D, ...] on the devices, without waiting.

        Leaves that are on the devices already, each with its share, stay there.
        """
        count = len(self._devices)

        def split(x: Any) -> Any:
            if isinstance(x, jax.Array):
                return self._split(x)
            return x.reshape(count, x.shape[0] // count, *x.shape[1:])

        shares = jax.tree.map(split, batch)
        if self._devices[0].platform == "cpu":
            return shares  # already where they are read; a device_put costs a fifth of an update
        return jax.device_put(shares, self._sharding)

    @property
    def devices(self) -> tuple[jax.Device, ...]:
        """That share a batch, in this order."""
        return tuple(self._devices)

    def update(self, batch: Batch) -> UpdateOutput:
        """One update, without waiting: td [D, B / D, T] and metrics [D] are futures."""
        self._state, output = self._update(self._state, batch)
        self.updates += 1
        return output

    def td(self, output: UpdateOutput) -> np.ndarray:
        """f32[B, T] of that update; waits for it."""
        td = np.asarray(output.td)
        return td.reshape(-1, td.shape[-1])

    def publish(self) -> Published:
        """A copy of the acting parameters as they are now; take it before the next update."""
        params = self._agent.acting_params(_shard_0(self._state))
        return Published(version=self.updates, params=self._copy(params))

    def state(self) -> TrainState:
        """The first replica, on the host; waits for the last update."""
        return jax.tree.map(lambda x: np.asarray(x)[0].copy(), _shard_0(self._state))

    def restore(self, state: TrainState) -> None:
        """Continues from `state()` of any number of devices."""
        self._state = self._replicate(state)
        self.updates = int(state.updates)

    def _replicate(self, state: TrainState) -> TrainState:
        """Copies every leaf: a donated buffer that two leaves share would be freed twice."""
        count = len(self._devices)

        def copies(x: Any) -> jax.Array:
            host = np.asarray(x)
            stacked = np.ascontiguousarray(np.broadcast_to(host, (count, *host.shape)))
            return jax.device_put(stacked, self._sharding, may_alias=False)

        return jax.tree.map(copies, state)


def choose_devices(count: int | None, batch_size: int) -> list[jax.Device]:
    """The first `count` local devices (None: all). Raises ValueError if that cannot work."""
    local = jax.local_devices()
    if count is not None and count > len(local):
        raise ValueError(
            f"learner.devices={count}, but there are {len(local)} ({local[0].platform}); "
            f"set learner.devices to at most {len(local)}, or to null for all of them."
        )
    chosen = local[: len(local) if count is None else count]
    if batch_size % len(chosen):
        raise ValueError(
            f"learner.batch_size={batch_size} does not divide over {len(chosen)} devices; "
            f"use a multiple of {len(chosen)}."
        )
    return chosen


def _shard_0(state: TrainState) -> TrainState:
    return jax.tree.map(lambda x: x.addressable_data(0), state)
