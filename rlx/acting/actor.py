"""The one acting loop: every pool runs this, in the process, in a thread or on another machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

import numpy as np

from rlx import trees
from rlx.acting.writer import BlockWriter, Index, row_spec
from rlx.envs.lanes import lane_index
from rlx.interfaces import Env, Exploration
from rlx.types import (
    ActionSpec,
    Array,
    Carry,
    Episode,
    NetInput,
    Observation,
    Request,
    Rollout,
    SequenceSpec,
    Timestep,
    Weights,
)

ONE = np.int32(1)


class ActingPolicy(Protocol):
    """What an actor needs of a policy (`rlx.acting.policy.Policy` runs it on a device)."""

    version: int

    def take(self, weights: Weights) -> None: ...
    def start(self, inputs: NetInput, lane: np.ndarray | None, exploration: np.ndarray) -> Any: ...
    def finish(self, started: Any) -> tuple[np.ndarray, Any]: ...
    def carry(self, lane: np.ndarray) -> Carry: ...


@dataclass(frozen=True, kw_only=True)
class _Answered:
    """The lanes that have answered and wait for their actions."""

    lane: np.ndarray  # i32[n]
    index: Index  # the same
    inputs: NetInput  # [n, ...]
    starts: np.ndarray  # lanes that open a block with their next row


class Actor:
    """Steps N lanes of an environment and ships finished blocks.

    A request asks for env steps, and the lanes go on from one request to the next; or it asks for
    blocks of each lane. After the last of them the lanes rest: the answer that ended it is kept,
    and acted on when the next request has brought its weights.

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
        self._exploring = np.zeros(env.lanes, np.float32)
        self._steps = False  # the lanes are stepping
        self._resting: _Answered | None = None  # between two requests that ask for blocks
        self._request: Request | None = None
        self._begun = 0  # blocks of each lane, since the last `begin`; if it asked for blocks
        self._finished: list[tuple] = []
        rows, carry = self._writer.nothing
        none, following = np.zeros(0, np.int64), trees.tree_map(lambda x: x[:, 0], rows.inputs)
        self._nothing = (rows, carry, following, self._global[:0], self._chain[:0], none, none)
        self.env_steps = 0  # made since the last `begin`
        self._began = self._env_s = self._policy_s = 0.0

    def collect(self, request: Request) -> Rollout:
        """Steps until the request is fulfilled; returns the blocks finished by then."""
        return collect_in_turn([self], request, lambda: True)[0]

    def begin(self, request: Request) -> None:
        """Takes a request's weights and counts from 0."""
        self._began = perf_counter()
        if request.weights is not None:
            self._policy.take(request.weights)
        self._exploring = self._exploration.amount(
            self._global, self._total_lanes, request.env_steps
        )
        self._request, self._begun = request, 0
        self.env_steps, self._env_s, self._policy_s = 0, 0.0, 0.0

    @property
    def rests(self) -> bool:
        """Whether the actor has made all blocks that the request asks for."""
        return self._resting is not None and self._begun > 0

    def advance(self) -> None:
        """Waits for the lanes' answer and acts; when it returns the lanes step on, or rest."""
        asked = perf_counter()
        if (kept := self._resting) is not None:
            self._resting = None
            self._open_rows(kept, self._start(kept))
            self._policy_s += perf_counter() - asked
            return
        timestep = self._env.recv() if self._steps else self._env.reset()
        self._steps = True
        answered = perf_counter()
        self._act(timestep)
        self._env_s += answered - asked
        self._policy_s += perf_counter() - answered

    def end(self) -> Rollout:
        """The rollout made since `begin`."""
        total = perf_counter() - self._began
        timings = {"policy_s": self._policy_s, "env_s": self._env_s, "total_s": total}
        return self._rollout(timings)

    def restart(self, lane: np.ndarray) -> None:
        """Begins new chains for lanes (intp[n]) that lost their environments."""
        self._chain[lane] += 1
        self._writer.restart(lane)
        self._started[lane] = False
        self._all_started = False

    def new_chains(self) -> None:
        """Begins new chains after blocks were dropped; the episodes go on."""
        self._chain += 1
        self._writer.renumber()

    @property
    def weights_version(self) -> int:
        """The version of the weights it acts with now; -1 before the first."""
        return self._policy.version

    @property
    def chain(self) -> int:
        """The newest chain of its lanes."""
        return int(self._chain.max())

    def close(self) -> None:
        self._env.close()

    def _act(self, timestep: Timestep) -> None:
        """Closes these lanes' rows with the answer, opens the next ones and sends their actions.

        The host writes rows while the device and then the environments are busy.
        """
        index = self._tracker.index(timestep.lane)
        inputs = self._tracker.inputs(timestep, index)
        starts = self._writer.next_starts(index)
        answered = _Answered(lane=timestep.lane, index=index, inputs=inputs, starts=starts)
        if self._is_last(answered):
            self._close_rows(timestep, answered)
            self._resting = answered
            return
        started = self._start(answered)
        self._close_rows(timestep, answered)
        self._open_rows(answered, started)

    def _is_last(self, answered: _Answered) -> bool:
        """Whether this answer ends the last block that was asked for."""
        assert self._request is not None
        return bool(len(answered.starts)) and self._begun == self._request.want_blocks

    def _start(self, answered: _Answered) -> tuple[Any, Carry | None]:
        """Returns (what the policy has begun, the carry of the lanes that open a block)."""
        starts, index = answered.starts, answered.index
        carry = self._policy.carry(starts) if len(starts) else None
        lane = None if isinstance(index, slice) else answered.lane
        return self._policy.start(answered.inputs, lane, self._exploring[index]), carry

    def _open_rows(self, answered: _Answered, begun: tuple[Any, Carry | None]) -> None:
        (started, carry), writer = begun, self._writer
        if carry is not None:
            writer.begin(answered.starts, carry, self._policy.version)
            self._begun += 1
        place = writer.open(answered.index, answered.inputs)
        action, acting = self._policy.finish(started)
        self._env.send(action, answered.lane)
        writer.decide(place, action, acting)
        self._tracker.acted(answered.index, action)

    def _close_rows(self, timestep: Timestep, answered: _Answered) -> None:
        """Closes the rows that these lanes opened; a reset as answer ignored the row's action."""
        index, lane, inputs = answered.index, answered.lane, answered.inputs
        if not self._all_started:
            timestep, index = self._started_lanes(timestep)
        valid = ~timestep.first
        discount = (valid & ~timestep.terminated).astype(np.float32)
        self.env_steps += int(np.count_nonzero(valid))
        full = self._writer.close(index, timestep.reward, discount, valid)
        if len(full):
            self._finish(full, lane, inputs)

    def _started_lanes(self, timestep: Timestep) -> tuple[Timestep, np.ndarray]:
        """The answer without the lanes whose very first observation it is: that closes no row."""
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
        episode.epsilon = float(self._exploring[episode.lane])
        episode.chain = int(self._chain[episode.lane])
        episode.lane = int(self._global[episode.lane])
        episode.weights_version = self._policy.version
        return episode


def collect_in_turn(
    actors: Sequence[Actor], request: Request, goes_on: Callable[[], bool]
) -> list[Rollout]:
    """Collects what was asked for from several actors together, or stops when `goes_on` is false.

    The host acts for one actor while the others' lanes step, so device and environments overlap.
    """
    for actor in actors:
        actor.begin(request)
    while not _is_done(actors, request) and goes_on():
        for actor in actors:
            if not actor.rests:
                actor.advance()
    return [actor.end() for actor in actors]


def _is_done(actors: Sequence[Actor], request: Request) -> bool:
    if request.want_blocks is not None:
        return all(actor.rests for actor in actors)
    return sum(actor.env_steps for actor in actors) >= request.want_env_steps


class InputTracker:
    """Makes of each lane's timesteps what the network reads: previous action and reward, time."""

    def __init__(self, lanes: int, action: ActionSpec) -> None:
        self._all = np.arange(lanes, dtype=np.int32)
        self._spec = action
        self._action = np.full((lanes, *action.array.shape), action.none, action.array.dtype)
        self._time = np.zeros(lanes, np.int32)

    def index(self, lane: np.ndarray) -> slice | np.ndarray:
        """The index of these lanes: a slice if it is all of them in order (much cheaper)."""
        return lane_index(lane, self._all)

    def inputs(self, timestep: Timestep, index: slice | np.ndarray) -> NetInput:
        """The network's input [n, ...] for the lanes of this answer."""
        made = network_input(
            observation=timestep.observation,
            reward=timestep.reward,
            first=timestep.first,
            last_action=self._action[index],
            last_time=self._time[index],
            action=self._spec,
            xp=np,
        )
        self._time[index] = made.time
        return made

    def acted(self, index: slice | np.ndarray, action: np.ndarray) -> None:
        """Remembers the actions just chosen."""
        self._action[index] = action


def network_input(
    *,
    observation: Observation,
    reward: Array,
    first: Array,
    last_action: Array,
    last_time: Array,
    action: ActionSpec,
    xp: Any,
) -> NetInput:
    """x_t of n lanes; where `first` bool[n], nothing before it counts.

    reward: f32[n], of last_action [n, *], which was taken at last_time i32[n]. xp: the namespace
    of the arrays, NumPy's or JAX's.
    """
    every_element = first.reshape(*first.shape, *(1 for _ in action.array.shape))
    none = np.asarray(action.none, action.array.dtype)
    return NetInput(
        observation=observation,
        prev_action=xp.where(every_element, none, last_action),
        prev_reward=xp.where(first, np.float32(0), reward),
        time=xp.where(first, np.int32(0), last_time + ONE),
        first=first,
    )
