"""The one mutable owner of the TrainState: replicates, pmaps, donates, counts, publishes.

The only module that knows the learner's devices. Nothing here waits for a device except
`priorities`, `gradient_steps`, `state` and `Published.weights`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlx import trees
from rlx.interfaces import Agent, SharesBatches
from rlx.problems import show
from rlx.seeding import spawn_int
from rlx.types import (
    Array,
    Batch,
    OfTheRun,
    Params,
    Range,
    TrainState,
    UpdateOutput,
    Weights,
)

Update = Callable[..., tuple[TrainState, UpdateOutput]]

AXIS = "devices"
FINITE = "learner/finite"  # share of the updates

trees.register()


@dataclass(frozen=True, kw_only=True)
class Published:
    """Acting parameters on their way to the host."""

    version: int
    params: Params  # device arrays, a copy that no later update donates

    def weights(self) -> Weights:
        """Waits for the update that made them."""
        return Weights(version=self.version, params=jax.tree.map(np.asarray, self.params))


@dataclass(frozen=True, kw_only=True)
class Group:
    """Learner processes on a Ray cluster: where they run, and when they begin anew."""

    address: str | None
    cpus_per_learner: Annotated[float, Range(ge=0)]
    gpus_per_learner: Annotated[float, Range(ge=0)]
    placement: Literal["PACK", "SPREAD"]
    start_timeout_s: Annotated[float, Range(gt=0)]
    silence_timeout_s: Annotated[float, Range(gt=0)]
    max_restarts: Annotated[int, Range(ge=0)]


@dataclass(frozen=True, kw_only=True)
class Learner:
    """The settings of the learner (conf/learner); some are read before it is opened."""

    processes: Annotated[int, Range(ge=1)]
    group: Group  # read by rlx.training.group, which starts these processes
    batch_size: Annotated[int, Range(ge=1), OfTheRun(exactly=True)]
    platform: Literal["cpu", "gpu"] | None
    devices: Annotated[int, Range(ge=1)] | None
    memory_fraction: Annotated[float, Range(gt=0, le=1)] | None  # read by rlx.machine.xla.prepare
    publish_every_updates: Annotated[int, Range(ge=1)] | None
    publish_every_env_steps: Annotated[int, Range(ge=1)] | None  # of the whole run
    on_nonfinite: Literal["stop", "skip"]

    def __post_init__(self) -> None:
        if (self.publish_every_updates is None) == (self.publish_every_env_steps is None):
            raise ValueError(
                f"publish_every_updates={show(self.publish_every_updates)} and "
                f"publish_every_env_steps={show(self.publish_every_env_steps)}: one of them says "
                "when actors get new weights; set the other to null."
            )

    def publishes(self, *, updates: int, env_steps: int, published_env_steps: int) -> bool:
        """Says whether actors get the weights of now, the last ones being of that env step."""
        if self.publish_every_updates is not None:
            return updates % self.publish_every_updates == 0
        assert self.publish_every_env_steps is not None
        every = self.publish_every_env_steps
        return env_steps // every != published_env_steps // every

    def open(self, agent: Agent, seed: int, update: Update | None = None) -> OpenLearner:
        """The learner of an agent; raises ValueError for devices that are not there.

        update: in the place of the agent's own, with the same arguments.
        """
        return OpenLearner(self, agent, seed, update or agent.update)


class OpenLearner:
    """Updates of one agent over 1 .. n local devices, each with an equal share of the batch."""

    def __init__(self, settings: Learner, agent: Agent, seed: int, update: Update) -> None:
        """Raises ValueError for devices that are not there.

        settings.batch_size is of this process; all processes share the gradients.
        """
        self.batch_size = settings.batch_size
        self.publishes = settings.publishes
        self.on_nonfinite: Literal["stop", "skip"] = settings.on_nonfinite
        self.updates = 0
        self._agent = agent
        self._newest: Any = None  # a future of the last update
        self._devices = choose_devices(settings.platform, settings.devices, settings.batch_size)
        if isinstance(agent, SharesBatches):
            agent.check_share(settings.batch_size // len(self._devices))
        everywhere = _everywhere(self._devices, settings.processes)
        mesh = Mesh(np.array(self._devices), (AXIS,))
        self._sharding = NamedSharding(mesh, PartitionSpec(AXIS))
        self._update = jax.pmap(
            functools.partial(_guarded, update),
            axis_name=AXIS,
            donate_argnums=0,
            devices=everywhere,  # of all processes together
            axis_size=len(everywhere),
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
        """The devices that share a batch, in this order."""
        return tuple(self._devices)

    def update(self, batch: Batch, largest_importance: float | None = None) -> UpdateOutput:
        """One update, without waiting: priorities [D, B / D, T] and metrics [D] are futures.

        largest_importance: the number that this batch's importance was divided by, if other
        processes divided by others; the importance is then divided by the largest of all.
        """
        if largest_importance is None:
            self._state, output = self._update(self._state, batch)
        else:
            largest = np.full(len(self._devices), largest_importance, np.float32)
            self._state, output = self._update(self._state, batch, largest)
        self._newest = output.metrics[FINITE]
        self.updates += 1
        return output

    @property
    def gradient_steps(self) -> int:
        """The gradient steps made so far; waits for the last update."""
        return int(np.asarray(self._state.gradient_steps.addressable_data(0))[0])

    @property
    def is_busy(self) -> bool:
        """Says whether the last update has not ended yet."""
        return self._newest is not None and not self._newest.is_ready()

    def priorities(self, output: UpdateOutput) -> np.ndarray | None:
        """An update's priorities f32[B, T], for which it waits; None if the agent gives none."""
        jax.block_until_ready(output)
        if output.priorities is None:
            return None
        priorities = np.asarray(output.priorities)
        return priorities.reshape(-1, priorities.shape[-1])

    def has_ended(self, output: UpdateOutput) -> bool:
        """Says whether an update has ended; it never waits."""
        return bool(output.metrics[FINITE].is_ready())

    def is_finite(self, output: UpdateOutput) -> bool:
        """Says whether an update had finite losses and gradients; waits for it.

        An update without them changed nothing but the count of updates.
        """
        return bool(np.asarray(output.metrics[FINITE]).all())

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


def _guarded(
    update: Callable[..., tuple[TrainState, UpdateOutput]],
    state: TrainState,
    batch: Batch,
    largest: Array | None = None,
) -> tuple[TrainState, UpdateOutput]:
    """The update; the state stays as it was where anything the agent measures is not finite.

    That is its metrics, its priorities, and its running statistics, which would stay so for ever.
    """
    if largest is not None:
        scale = largest / jax.lax.pmax(largest, AXIS)
        batch = replace(batch, importance=batch.importance * scale)
    new, output = update(state, batch, axis_name=AXIS)
    said = jax.tree.leaves((output.priorities, output.metrics, new.statistics))
    measured = [jnp.isfinite(x).all() for x in said]
    finite = jax.lax.pmin(jnp.stack(measured).all().astype(jnp.float32), AXIS)
    kept = jax.tree.map(lambda x, old: jnp.where(finite > 0, x, old), new, state)
    metrics = {**output.metrics, FINITE: finite}
    return replace(kept, updates=new.updates), replace(output, metrics=metrics)


def choose_devices(platform: str | None, count: int | None, batch_size: int) -> list[jax.Device]:
    """The first `count` (None: all) local devices of a platform (None: JAX's own choice).

    Raises ValueError if they are not there, or cannot share the batch.
    """
    try:
        local = jax.local_devices(backend=platform)
    except RuntimeError as error:
        there = jax.default_backend()
        raise ValueError(
            f"learner.platform={platform}, but this process has {there} devices only; install JAX "
            f"for it (pip install 'jax[cuda12]'; unset JAX_PLATFORMS), or set {there}, or null."
        ) from error
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


def _everywhere(local: Sequence[jax.Device], processes: int) -> list[jax.Device]:
    """The devices of all processes, each with as many as this one; raises ValueError if not."""
    if processes != jax.process_count():
        raise ValueError(
            f"learner.processes={processes}, but JAX was joined by {jax.process_count()}; "
            "start them with rlx.train or rlx.run."
        )
    if processes == 1:
        return list(local)
    kind, devices = local[0].platform, []
    for process in range(processes):
        own = [d for d in jax.devices(kind) if d.process_index == process]
        if len(own) < len(local):
            raise ValueError(
                f"learner process {process} has {len(own)} devices, this one uses {len(local)}; "
                "give all of them as many, or set learner.devices to the least of them."
            )
        devices += own[: len(local)]
    return devices


def _shard_0(state: TrainState) -> TrainState:
    return jax.tree.map(lambda x: x.addressable_data(0), state)
