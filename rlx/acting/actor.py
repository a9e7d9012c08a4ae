"""The one acting loop: every pool runs this, in the process, in a thread or on another machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any, Protocol

import numpy as np

from rlx import trees
from rlx.acting.blocks import BlockWriter, Index, row_spec
from rlx.acting.inputs import InputTracker
from rlx.interfaces import Env, Exploration
from rlx.types import Carry, Episode, NetInput, Request, Rollout, SequenceSpec, Timestep, Weights


class ActingPolicy(Protocol):
    """What an actor needs of a policy (`rlx.acting.policy.Policy` runs it on a device)."""

    version: int

    def take(self, weights: Weights) -> None: ...
    def start(self, inputs: NetInput, lane: np.ndarray | None, epsilon: np.ndarray) -> Any: ...
    def finish(self, started: Any) -> tuple[np.ndarray, Any]: ...
    def carry(self, lane: np.ndarray) -> Carry: ...


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
        self._total_lanes = total_lanes
        self._chain = np.full(env.lanes, chain, np.int32)
        self._global = np.arange(first_lane, first_lane + env.lanes, dtype=np.int32)
        self._tracker = InputTracker(env.lanes, env.spec.action)
        self._writer = BlockWriter(
            lanes=env.lanes,
            block_rows=sequence.block_rows,
            row=row_spec(env.spec, acting_spec),
            carry=carry_spec,
        )
        self._started = np.zeros(env.lanes, bool)
        self._all_started = False
        self._epsilon = np.zeros(env.lanes, np.float32)
        self._steps = False  # the lanes are stepping
        self._finished: list[tuple] = []
        rows, carry = self._writer.nothing
        none, following = np.zeros(0, np.int64), trees.tree_map(lambda x: x[:, 0], rows.inputs)
        self._nothing = (rows, carry, following, self._global[:0], self._chain[:0], none, none)
        self.env_steps = 0  # made since the last `begin`
        self._began = self._env_s = self._policy_s = 0.0

    def collect(self, request: Request) -> Rollout:
        """Steps until that many env steps are made; answers the blocks finished by then."""
        self.begin(request)
        while self.env_steps < request.want_env_steps:
            self.advance()
        return self.end()

    def begin(self, request: Request) -> None:
        """Takes a request's weights and counts from 0."""
        self._began = perf_counter()
        if request.weights is not None:
            self._policy.take(request.weights)
        self._epsilon = self._exploration.epsilon(
            self._global, self._total_lanes, request.env_steps
        )
        self.env_steps, self._env_s, self._policy_s = 0, 0.0, 0.0

    def advance(self) -> None:
        """Waits for the lanes' answer and acts; the lanes step on when it returns."""
        asked = perf_counter()
        timestep = self._env.recv() if self._steps else self._env.reset()
        self._steps = True
        answered = perf_counter()
        self._act(timestep)
        self._env_s += answered - asked
        self._policy_s += perf_counter() - answered

    def end(self) -> Rollout:
        """What was made since `begin`."""
        total = perf_counter() - self._began
        timings = {"policy_s": self._policy_s, "env_s": self._env_s, "total_s": total}
        return self._rollout(timings)

    def restart(self, lane: np.ndarray) -> None:
        """These lanes (intp[n]) have lost their environments: their next answer begins a chain."""
        self._chain[lane] += 1
        self._writer.restart(lane)
        self._started[lane] = False
        self._all_started = False

    def new_chains(self) -> None:
        """Blocks were dropped: what follows continues none of them, though the episodes go on."""
        self._chain += 1
        self._writer.renumber()

    @property
    def weights_version(self) -> int:
        """Of the weights it acts with now; -1 before the first."""
        return self._policy.version

    @property
    def chain(self) -> int:
        """The newest of its lanes' chains."""
        return int(self._chain.max())

    def close(self) -> None:
        self._env.close()

    def _act(self, timestep: Timestep) -> None:
        """Closes these lanes' rows with the answer, opens the next ones and sends their actions.

        The host writes rows while the device and then the environments are busy.
        """
        lane, policy, writer = timestep.lane, self._policy, self._writer
        index = self._tracker.index(lane)
        inputs = self._tracker.inputs(timestep, index)
        starts = writer.next_starts(index)
        carry = policy.carry(starts) if len(starts) else None
        whole = isinstance(index, slice)
        started = policy.start(inputs, None if whole else lane, self._epsilon[index])

        full = self._close_rows(timestep, index)
        if len(full):
            self._finish(full, lane, inputs)
        if carry is not None:
            writer.begin(starts, carry, policy.version)
        place = writer.open(index, inputs)

        action, acting = policy.finish(started)
        self._env.send(action, lane)
        writer.decide(place, action, acting)
        self._tracker.acted(index, action)

    def _close_rows(self, timestep: Timestep, index: Index) -> np.ndarray:
        """The rows these lanes opened; a row answered by a reset had its action ignored."""
        if not self._all_started:
            timestep, index = self._started_lanes(timestep)
        valid = ~timestep.first
        discount = (valid & ~timestep.terminated).astype(np.float32)
        self.env_steps += int(np.count_nonzero(valid))
        return self._writer.close(index, timestep.reward, discount, valid)

    def _started_lanes(self, timestep: Timestep) -> tuple[Timestep, np.ndarray]:
        """Without the lanes whose very first observation this is: it answers no row."""
        opened = self._started[timestep.lane]
        self._started[timestep.lane] = True
        self._all_started = bool(self._started.all() and opened.all())
        timestep = trees.tree_map(lambda x: x[opened], timestep)
        return timestep, timestep.lane.astype(np.intp)

    def _finish(self, full: np.ndarray, lane: np.ndarray, inputs: NetInput) -> None:
        rows, carry, number, version = self._writer.take(full)
        following = inputs
        if len(full) < len(self._global):
            at = np.flatnonzero(np.isin(lane, full))
            following = trees.tree_map(lambda x: x[at], inputs)
        lanes, chain = self._global[full], self._chain[full]
        self._finished.append((rows, carry, following, lanes, chain, number, version))

    def _rollout(self, timings: dict[str, float]) -> Rollout:
        rows, carry, following, lane, chain, number, version = self._stack_finished()
        self._finished = []
        return Rollout(
            rows=rows,
            carry=carry,
            next=following,
            lane=lane,
            chain=chain,
            number=number,
            weights_version=version,
            episodes=tuple(self._complete(episode) for episode in self._env.episodes()),
            env_steps=self.env_steps,
            frames=self.env_steps * self._env.spec.frames_per_env_step,
            timings=timings,
        )

    def _stack_finished(self) -> tuple:
        if len(self._finished) == 1:
            return self._finished[0]
        if not self._finished:
            return self._nothing
        return tuple(
            trees.tree_map(lambda *parts: np.concatenate(parts), *column)
            for column in zip(*self._finished, strict=True)
        )

    def _complete(self, episode: Episode) -> Episode:
        episode.epsilon = float(self._epsilon[episode.lane])
        episode.chain = int(self._chain[episode.lane])
        episode.lane = int(self._global[episode.lane])
        episode.weights_version = self._policy.version
        return episode


def collect_in_turn(
    actors: Sequence[Actor], request: Request, goes_on: Callable[[], bool]
) -> list[Rollout]:
    """Several actors' rollouts, that many env steps of all together, or as far as it `goes_on`.

    Each is acted for while the others' lanes step, so that device and environments overlap.
    """
    for actor in actors:
        actor.begin(request)
    while sum(actor.env_steps for actor in actors) < request.want_env_steps and goes_on():
        for actor in actors:
            actor.advance()
    return [actor.end() for actor in actors]
