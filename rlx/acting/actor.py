"""The one acting loop: every pool runs this, in the process, in a thread or on another machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import numpy as np

from rlx import trees
from rlx.acting.exploration import Amounts
from rlx.envs.finite import Cutting
from rlx.envs.lanes import lane_index
from rlx.interfaces import ActingPolicy, Env, Exploration
from rlx.problems import EnvironmentFailed
from rlx.types import (
    ActionSpec,
    Array,
    Carry,
    Episode,
    NetInput,
    Observation,
    Request,
    Rollout,
    Row,
    SequenceSpec,
    Timestep,
)

Index = slice | np.ndarray  # of lanes: a slice if it is all of them in order, else intp[n]
Place = tuple[Any, Any]  # (lanes, row) that index [N, K, ...]; a slice where all lanes keep pace


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
        row_spec: Row,
        carry_spec: Carry,
        first_lane: int,
        total_lanes: int,
        chain: int,
    ) -> None:
        self._env, self._policy = env, policy
        self._chain = np.full(env.lanes, chain, np.int32)
        self._global = np.arange(first_lane, first_lane + env.lanes, dtype=np.int32)
        self._amounts = Amounts(exploration, self._global, total_lanes)
        self._tracker = InputTracker(env.lanes, env.spec.action)
        self._writer = BlockWriter(
            lanes=env.lanes,
            block_rows=sequence.block_rows,
            row=row_spec,
            carry=carry_spec,
        )
        self._started, self._all_started = np.zeros(env.lanes, bool), False
        self._steps = False  # the lanes are stepping
        self._resting: _Answered | None = None  # between two requests that ask for blocks
        self._request: Request | None = None
        self._begun = 0  # blocks of each lane, since the last `begin`; if it asked for blocks
        self._finished: list[tuple] = []
        self._ended: list[Episode] = []  # and completed
        self._cuts_of = env.cuts if isinstance(env, Cutting) else list
        rows, carry = self._writer.nothing
        none, following = np.zeros(0, np.int64), trees.tree_map(lambda x: x[:, 0], rows.inputs)
        self._nothing = (rows, carry, following, self._global[:0], self._chain[:0], none, none)
        self.env_steps = 0  # made since the last `begin`
        self._began = self._env_s = self._policy_s = 0.0

    def collect(self, request: Request) -> Rollout:
        """Steps until the request is fulfilled; returns the blocks finished by then."""
        self.begin(request)
        while not are_done([self], request):
            self.advance()
        return self.end()

    def begin(self, request: Request) -> None:
        """Takes a request's weights and counts from 0."""
        self._began = perf_counter()
        if request.weights is not None:
            self._policy.take(request.weights)
        self._amounts.begin(request.env_steps)
        self._request, self._begun = request, 0
        self.env_steps, self._env_s, self._policy_s = 0, 0.0, 0.0

    @property
    def rests(self) -> bool:
        """Says whether the actor has made all blocks that the request asks for."""
        return self._resting is not None and self._begun > 0

    def advance(self) -> None:
        """Waits for the lanes' answer and acts; when it returns the lanes step on, or rest."""
        asked = perf_counter()
        if (kept := self._resting) is not None:
            self._resting = None
            self._open_rows(kept, self._start(kept))
            self._policy_s += perf_counter() - asked
            return
        try:
            timestep = self._env.recv() if self._steps else self._env.reset()
        except EnvironmentFailed as error:
            if error.lane is not None:
                error.lane = int(self._global[error.lane])
            raise
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
        self._complete_episodes()  # of the old chains
        self._chain[lane] += 1
        self._writer.restart(lane)
        self._amounts.restart(lane)
        self._started[lane] = self._all_started = False

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
        if self._amounts.by_episode and timestep.first.any():
            self._complete_episodes()  # those that ended had the amounts of now
            self._amounts.begin_episodes(timestep.lane[timestep.first], self._chain)
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
        """Says whether this answer ends the last block that was asked for."""
        assert self._request is not None
        return bool(len(answered.starts)) and self._begun == self._request.want_blocks

    def _start(self, answered: _Answered) -> tuple[Any, Carry | None]:
        """Returns (what the policy has begun, the carry of the lanes that open a block)."""
        starts, index = answered.starts, answered.index
        carry = self._policy.carry(starts) if len(starts) else None
        lane = None if isinstance(index, slice) else answered.lane
        return self._policy.start(answered.inputs, lane, self._amounts.now[index]), carry

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
        self._complete_episodes()
        episodes, self._finished, self._ended = tuple(self._ended), [], []
        return Rollout(
            rows=rows,
            carry=carry,
            next=following,
            lane=lane,
            chain=chain,
            number=number,
            weights_version=version,
            episodes=episodes,
            env_steps=self.env_steps,
            frames=self.env_steps * self._env.spec.frames_per_env_step,
            timings=timings,
            cuts=tuple(replace(cut, lane=int(self._global[cut.lane])) for cut in self._cuts_of()),
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

    def _complete_episodes(self) -> None:
        for episode in self._env.episodes():
            episode.epsilon = float(self._amounts.now[episode.lane])
            episode.chain = int(self._chain[episode.lane])
            episode.lane = int(self._global[episode.lane])
            episode.weights_version = self._policy.version
            self._ended.append(episode)


def are_done(actors: Sequence[Actor], request: Request) -> bool:
    """Says whether these actors together have made what was asked for."""
    if request.want_blocks is not None:
        return all(actor.rests for actor in actors)
    return sum(actor.env_steps for actor in actors) >= request.want_env_steps


class InputTracker:
    """Makes of each lane's timesteps what the network reads: previous action and reward, time."""

    def __init__(self, lanes: int, action: ActionSpec) -> None:
        self._all = np.arange(lanes, dtype=np.int32)
        self._spec, self._time = action, np.zeros(lanes, np.int32)
        self._action = np.full((lanes, *action.array.shape), action.none, action.array.dtype)

    def index(self, lane: np.ndarray) -> slice | np.ndarray:
        """The index of these lanes: a slice if it is all of them in order (much cheaper)."""
        return lane_index(lane, self._all)

    def inputs(self, timestep: Timestep, index: slice | np.ndarray) -> NetInput:
        """The network's input [n, ...] for the lanes of this answer."""
        made = network_input(
            observation=timestep.observation,
            reward=timestep.reward,
            first=timestep.first,
            last_action=self._action[index].copy(),  # the next one overwrites it
            last_time=self._time[index],
            action=self._spec,
            xp=np,
        )
        self._time[index] = made.time
        return made

    def acted(self, index: slice | np.ndarray, action: np.ndarray) -> None:
        """Remembers the actions just chosen."""
        self._action[index] = action


class BlockWriter:
    """The open blocks of N lanes: rows [N, K, ...] and the carry before each block's first row.

    A row is written in three parts: `open` with x_t, `decide` with a_t, `close` with r_{t+1}. Lanes
    keep pace while every call is for all of them in order; then slices are written, much cheaper.
    """

    def __init__(self, *, lanes: int, block_rows: int, row: Row, carry: Carry) -> None:
        self._lanes, self._block_rows = lanes, block_rows
        self._row_spec, self._carry_spec, self._all = row, carry, np.arange(lanes)
        self._none = np.arange(0)
        self._keep_pace = True  # and then the first lane's number holds for all
        self._filled, self._number = np.zeros((2, lanes), np.int64)  # of open blocks: rows closed
        self._is_open = np.zeros(lanes, bool)  # a row that no answer has closed
        self._version = np.full(lanes, -1, np.int64)
        self.nothing = trees.empty(row, 0, block_rows), trees.empty(carry, 0)  # no blocks
        self._renew()

    def next_starts(self, index: Index) -> np.ndarray:
        """The lanes among these whose next row opens a block, before this row is closed."""
        self._keep_pace = self._keep_pace and isinstance(index, slice)
        if self._keep_pace:
            starts = (self._filled.item(0) + self._is_open.item(0)) % self._block_rows == 0
            return self._all if starts else self._none
        open_rows = self._filled[index] + self._is_open[index]
        return self._all[index][open_rows % self._block_rows == 0]

    def begin(self, lane: np.ndarray, carry: Carry, version: int) -> None:
        """Notes the carry before the first row of these lanes' new blocks."""
        self._version[lane] = version
        for name, values in trees.flatten(carry).items():
            self._carry[name][lane] = values

    def place(self, index: Index) -> Place:
        """The places of these lanes' next rows."""
        if self._keep_pace:
            return index, self._filled.item(0)
        filled = self._filled[index]
        return self._all if isinstance(index, slice) else index, filled

    def open(self, index: Index, inputs: NetInput) -> Place:
        """Writes x_t; returns the place where `decide` puts the rest."""
        place, rows = self.place(index), self._rows.inputs
        for name, values in inputs.observation.items():
            rows.observation[name][place] = values
        rows.prev_action[place] = inputs.prev_action
        rows.prev_reward[place] = inputs.prev_reward
        rows.time[place] = inputs.time
        rows.first[place] = inputs.first
        self._is_open[index] = True
        return place

    def decide(self, place: Place, action: np.ndarray, acting: Any) -> None:
        """Writes a_t and the agent's record of acting time."""
        self._rows.action[place] = action
        for name, values in (trees.children(acting) or {}).items():
            self._acting[name][place] = values

    def close(
        self, index: Index, reward: np.ndarray, discount: np.ndarray, valid: np.ndarray
    ) -> np.ndarray:
        """Writes r_{t+1} into these lanes' open rows; returns the lanes whose block is now full."""
        place = self.place(index)
        self._rows.reward[place] = reward
        self._rows.discount[place] = discount
        self._rows.valid[place] = valid
        self._filled[index] += 1
        self._is_open[index] = False
        if self._keep_pace:
            return self._all if self._filled.item(0) == self._block_rows else self._none
        return self._all[index][self._filled[index] == self._block_rows]

    def take(self, lane: np.ndarray) -> tuple[Row, Carry, np.ndarray, np.ndarray]:
        """Takes these lanes' full blocks, in the order of `lane`, which may be any.

        Returns (rows [n, K, ...], carry [n, ...], number, weights version).
        """
        number, version = self._number[lane], self._version[lane]
        self._number[lane] += 1
        self._filled[lane] = 0
        if len(lane) == self._lanes and (lane == self._all).all():  # no need to copy them
            rows, carry = self._rows, trees.unflatten(self._carry_spec, self._carry)
            self._renew()
        else:
            rows = trees.tree_map(lambda x: x[lane], self._rows)
            carry = trees.unflatten(
                self._carry_spec, {name: x[lane] for name, x in self._carry.items()}
            )
        return rows, carry, number, version

    def restart(self, lane: np.ndarray) -> None:
        """Drops these lanes' open blocks; their next block is number 0."""
        self._keep_pace = False
        self._filled[lane] = 0
        self._is_open[lane] = False
        self._number[lane] = 0

    def renumber(self) -> None:
        """Gives the open blocks number 0."""
        self._number[:] = 0

    def _renew(self) -> None:
        self._rows: Row = trees.empty(self._row_spec, self._lanes, self._block_rows)
        self._acting = trees.children(self._rows.acting) or {}
        carry = trees.empty(self._carry_spec, self._lanes)
        self._carry: dict[str, np.ndarray] = trees.flatten(carry)


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

    reward: f32[n], of last_action [n, *], which was taken at last_time i32[n]. xp: NumPy, or JAX's.
    """
    time = last_time + np.int32(1)
    if xp is not np or np.count_nonzero(first):  # as in few answers
        every_element = first.reshape(*first.shape, *(1 for _ in action.array.shape))
        none = np.asarray(action.none, action.array.dtype)
        last_action = xp.where(every_element, none, last_action)
        reward, time = xp.where(first, np.float32(0), reward), xp.where(first, np.int32(0), time)
    return NetInput(
        observation=observation,
        prev_action=last_action,
        prev_reward=reward,
        time=time,
        first=first,
    )
