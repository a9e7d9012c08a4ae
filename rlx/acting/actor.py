"""The one acting loop: every pool runs this, in the process, in a thread or on another machine."""

from __future__ import annotations

import dataclasses
from time import perf_counter
from typing import Any, Protocol

import numpy as np

from rlx import trees
from rlx.acting.blocks import BlockWriter, row_spec
from rlx.interfaces import Env, Exploration
from rlx.types import Carry, Episode, NetInput, Request, Rollout, SequenceSpec, Timestep, Weights


class ActingPolicy(Protocol):
    """What an actor needs of a policy (`rlx.acting.policy.Policy` runs it on a device)."""

    version: int

    def take(self, weights: Weights) -> None: ...
    def start(self, inputs: NetInput, lane: np.ndarray | None, epsilon: np.ndarray) -> Any: ...
    def finish(self, started: Any) -> tuple[np.ndarray, Any]: ...
    def carry(self, lane: np.ndarray) -> Carry: ...


class InputTracker:
    """Makes of each lane's timesteps what the network reads: previous action and reward, time."""

    def __init__(self, lanes: int) -> None:
        self._all = np.arange(lanes, dtype=np.int32)
        self._action = np.full(lanes, -1, np.int32)
        self._time = np.zeros(lanes, np.int32)

    def index(self, lane: np.ndarray) -> slice | np.ndarray:
        """A slice if these are all lanes in order (much cheaper than their numbers)."""
        if len(lane) == len(self._all) and np.array_equal(lane, self._all):
            return slice(None)
        return lane

    def inputs(self, timestep: Timestep, index: slice | np.ndarray) -> NetInput:
        """[n, ...] for the lanes of this answer."""
        first = timestep.first
        time = np.where(first, 0, self._time[index] + 1)
        self._time[index] = time
        return NetInput(
            observation=timestep.observation,
            prev_action=np.where(first, np.int32(-1), self._action[index]),
            prev_reward=np.where(first, np.float32(0), timestep.reward),
            time=time,
            first=first,
        )

    def acted(self, index: slice | np.ndarray, action: np.ndarray) -> None:
        """Remembers the actions just chosen."""
        self._action[index] = action


class Actor:
    """Steps N lanes of an environment and ships finished blocks.

    `first_lane`: the global id of lane 0; `total_lanes`: of the whole run; `chain`: how many lives
    these lanes have had before.
    """

    def __init__(
        self,
        *,
        env: Env,
        policy: ActingPolicy,
        exploration: Exploration,
        sequence: SequenceSpec,
        acting_spec: object,
        carry_spec: Carry,
        first_lane: int,
        total_lanes: int,
        chain: int,
    ) -> None:
        self._env, self._policy, self._exploration = env, policy, exploration
        self._chain, self._total_lanes = chain, total_lanes
        self._global = np.arange(first_lane, first_lane + env.lanes, dtype=np.int32)
        self._tracker = InputTracker(env.lanes)
        self._writer = BlockWriter(
            lanes=env.lanes,
            block_rows=sequence.block_rows,
            row=row_spec(env.spec, acting_spec),
            carry=carry_spec,
        )
        self._started = np.zeros(env.lanes, bool)
        self._epsilon = np.zeros(env.lanes, np.float32)
        self._timestep: Timestep | None = None
        self._finished: list[tuple] = []
        self._env_steps = 0

    def collect(self, request: Request) -> Rollout:
        """Steps until that many env steps are made; answers the blocks finished by then."""
        began = perf_counter()
        if request.weights is not None:
            self._policy.take(request.weights)
        self._epsilon = self._exploration.epsilon(
            self._global, self._total_lanes, request.env_steps
        )
        self._env_steps, env_s, policy_s = 0, 0.0, 0.0
        timestep = self._env.reset() if self._timestep is None else self._timestep
        while self._env_steps < request.want_env_steps:
            acted = perf_counter()
            self._act(timestep)
            stepped = perf_counter()
            timestep = self._env.recv()
            policy_s += stepped - acted
            env_s += perf_counter() - stepped
        self._timestep = timestep
        timings = {"policy_s": policy_s, "env_s": env_s, "total_s": perf_counter() - began}
        return self._rollout(timings)

    @property
    def weights_version(self) -> int:
        """Of the weights it acts with now; -1 before the first."""
        return self._policy.version

    def close(self) -> None:
        self._env.close()

    def _act(self, timestep: Timestep) -> None:
        """Closes these lanes' rows with the answer, opens the next ones and sends their actions.

        The host writes rows while the device and then the environments are busy.
        """
        lane, policy, writer = timestep.lane, self._policy, self._writer
        index = self._tracker.index(lane)
        inputs = self._tracker.inputs(timestep, index)
        starts = writer.next_starts(lane)
        carry = policy.carry(starts) if len(starts) else None
        whole = isinstance(index, slice)
        started = policy.start(inputs, None if whole else lane, self._epsilon[index])

        full = self._close_rows(timestep)
        if len(full):
            self._finish(full, lane, inputs)
        if carry is not None:
            writer.begin(starts, carry, policy.version)
        place = writer.open(lane, inputs)

        action, acting = policy.finish(started)
        self._env.send(action, lane)
        writer.decide(place, action, acting)
        self._tracker.acted(index, action)

    def _close_rows(self, timestep: Timestep) -> np.ndarray:
        """The rows these lanes opened; a row answered by a reset had its action ignored."""
        lane, first = timestep.lane, timestep.first
        opened = self._started[lane]
        if not opened.all():  # a lane's very first observation answers no row
            self._started[lane] = True
            lane, first = lane[opened], first[opened]
            timestep = trees.tree_map(lambda x: x[opened], timestep)
        if not len(lane):
            return lane
        valid = ~first
        discount = (valid & ~timestep.terminated).astype(np.float32)
        self._env_steps += int(np.count_nonzero(valid))
        return self._writer.close(lane, np.where(first, 0, timestep.reward), discount, valid)

    def _finish(self, full: np.ndarray, lane: np.ndarray, inputs: NetInput) -> None:
        rows, carry, number, version = self._writer.take(full)
        at = np.flatnonzero(np.isin(lane, full))
        following = trees.tree_map(lambda x: np.asarray(x)[at], inputs)
        self._finished.append((rows, carry, following, self._global[full], number, version))

    def _rollout(self, timings: dict[str, float]) -> Rollout:
        rows, carry, following, lane, number, version = self._stack_finished()
        self._finished = []
        return Rollout(
            rows=rows,
            carry=carry,
            next=following,
            lane=lane,
            chain=np.full(len(lane), self._chain, np.int32),
            number=number,
            weights_version=version,
            episodes=tuple(self._complete(episode) for episode in self._env.episodes()),
            env_steps=self._env_steps,
            frames=self._env_steps * self._env.spec.frames_per_env_step,
            timings=timings,
        )

    def _stack_finished(self) -> tuple:
        if len(self._finished) == 1:
            return self._finished[0]
        if not self._finished:
            rows, carry = self._writer.nothing
            following = trees.tree_map(lambda x: x[:, 0], rows.inputs)
            number = np.zeros(0, np.int64)
            return rows, carry, following, self._global[:0], number, number
        return tuple(
            trees.tree_map(lambda *parts: np.concatenate(parts), *column)
            for column in zip(*self._finished, strict=True)
        )

    def _complete(self, episode: Episode) -> Episode:
        return dataclasses.replace(
            episode,
            lane=int(self._global[episode.lane]),
            chain=self._chain,
            epsilon=float(self._epsilon[episode.lane]),
            weights_version=self._policy.version,
        )
