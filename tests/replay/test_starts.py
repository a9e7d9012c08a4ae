"""Starts at any row, and the input after a sequence, against a plain list of all rows ever made.

Each lane's history is made row by row, with episodes of any length; its blocks carry the frames
that are stacked before them. What the ring gives must be the history's rows, and `stack_frames`
must make the history's stacks of it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from replay_streams import blocks_of, carry_spec, fill, row_spec

from rlx import trees
from rlx.networks.cores import stack_frames
from rlx.replay.ring import storage
from rlx.replay.ring.block_spec import BlockSpec
from rlx.replay.ring.ring import BlockRing, Draw, Drawn
from rlx.replay.ring.storage import Storing
from rlx.types import ArraySpec, Carry, NetInput, Rollout, Row, SequenceSpec

SHAPE = (1, 2, 3)
DEPTH = 3
ROW = row_spec(SHAPE)
CARRY = Carry(core=(), frames={"image": ArraySpec(shape=(DEPTH - 1, *SHAPE), dtype="uint8")})


def ones(keys: np.ndarray) -> np.ndarray:
    return np.ones(len(keys))


@pytest.fixture(params=["memory", "threads", "mmap", "lz4", "device"])
def storing(request, monkeypatch, tmp_path) -> Storing:
    monkeypatch.setattr(storage, "WORTH_COMPRESSING", 1)
    monkeypatch.setattr(storage, "WORTH_THREADS", 1)
    return {
        "memory": Storing(),
        "threads": Storing(gather_threads=3),
        "mmap": Storing(storage="mmap", folder=tmp_path / "ring"),
        "lz4": Storing(compress="lz4", gather_threads=2),
        "device": Storing(storage="device"),
    }[request.param]


class Chain:
    """One lane's rows, as an actor would make them."""

    def __init__(self, lane: int, chain: int, rng: np.random.Generator, rows: int) -> None:
        self.lane, self.chain = lane, chain
        self.first = rng.random(rows) < 0.3
        self.first[0] = True
        self.rows: Row = fill(ROW, (rows,))
        self.rows.inputs.observation["image"][:] = rng.integers(0, 256, (rows, *SHAPE), np.uint8)
        self.rows.inputs.first[:] = self.first
        self.rows.inputs.time[:] = np.arange(rows)
        self.rows.action[:] = lane
        self.rows.reward[:] = chain
        self.rows.valid[:] = True
        self.rows.acting.q_max[:] = rng.random(rows)
        self.stacks, self.frames = self._stacked()

    def _stacked(self) -> tuple[np.ndarray, np.ndarray]:
        """([rows, S * C, H, W]: each row's stack, [rows, S-1, *]: the frames carried before it)."""
        stack, stacks, carried = [np.zeros(SHAPE, np.uint8)] * DEPTH, [], []
        for frame, first in zip(self.rows.inputs.observation["image"], self.first, strict=True):
            carried.append(np.stack(stack[1:]))
            stack = [frame] * DEPTH if first else [*stack[1:], frame]
            stacks.append(np.concatenate(stack))
        return np.stack(stacks), np.stack(carried)

    def block(self, number: int, k: int) -> Rollout:
        begin = number * k
        return Rollout(
            rows=trees.tree_map(lambda x: x[None, begin : begin + k], self.rows),
            carry=Carry(core=(), frames={"image": self.frames[None, begin]}),
            next=trees.tree_map(lambda x: x[None, begin + k], self.rows.inputs),
            lane=np.array([self.lane], np.int32),
            chain=np.array([self.chain], np.int32),
            number=np.array([number]),
            weights_version=np.array([100 * number + self.lane]),
            episodes=(),
            env_steps=0,
            frames=0,
            timings={},
        )


@dataclass(frozen=True, kw_only=True)
class Added:
    """A block as it was added."""

    chain: Chain
    number: int


def make_ring(sequence: SequenceSpec, slots: int, lanes: int, storing: Storing | None) -> BlockRing:
    spec = BlockSpec(sequence=sequence, row=ROW, carry=CARRY)
    capacity = slots * sequence.block_rows
    return BlockRing(capacity_rows=capacity, spec=spec, lanes=lanes, storing=storing)


def expected_starts(added: list[Added], slots: int, sequence: SequenceSpec) -> dict[int, tuple]:
    """key -> (chain, first row) of all sequences whose rows are there."""
    oldest = max(0, len(added) - slots)
    live = {(id(a.chain), a.number) for a in added[oldest:]}
    found, rows = {}, sequence.start_rows
    for key, a in list(enumerate(added))[oldest:]:
        if a.number % sequence.blocks_per_stride:
            continue
        for i, row in enumerate(rows):
            begin = a.number * sequence.block_rows + row
            touched = range(a.number, (begin + sequence.length - 1) // sequence.block_rows + 1)
            if all((id(a.chain), n) in live for n in touched):
                found[key * len(rows) + i] = (a.chain, begin)
    return found


def assert_is_history(drawn: Drawn, expected: dict[int, tuple], sequence: SequenceSpec) -> None:
    drawn = replace(drawn, **{n: trees.tree_map(np.asarray, getattr(drawn, n))
                              for n in ("rows", "next", "carry")})  # fmt: skip
    for b, key in enumerate(drawn.keys.tolist()):
        chain, begin = expected[key]
        assert_is_sequence(drawn, b, chain, slice(begin, begin + sequence.length))
        assert drawn.weights_version[b] == 100 * (begin // sequence.block_rows) + chain.lane


def assert_is_sequence(drawn: Drawn, b: int, chain: Chain, rows: slice) -> None:
    assert same(at(drawn.rows, b), at(chain.rows, rows))
    assert same(at(drawn.next, b), at(chain.rows.inputs, rows.stop))
    stacks = chain.stacks[rows.start : rows.stop + 1]
    assert stacks_of(drawn, b).tolist() == stacks.tolist()


def at(tree: Any, index: Any) -> Any:
    return trees.tree_map(lambda x: x[index], tree)


def same(a: Any, b: Any) -> bool:
    return all(np.array_equal(x, y) for x, y in
               zip(trees.flatten(a).values(), trees.flatten(b).values(), strict=True))  # fmt: skip


def stacks_of(drawn: Drawn, b: int) -> np.ndarray:
    """[L + 1, S * C, H, W]: as a network stacks a sequence's frames and those carried before."""
    rows: NetInput = drawn.rows.inputs
    frames = np.concatenate(
        [rows.observation["image"][b], drawn.next.observation["image"][b][None]]
    )
    first = np.concatenate([rows.first[b], drawn.next.first[b][None]])
    carried = drawn.carry.frames["image"][b][None]
    return np.asarray(stack_frames(frames[:, None], first[:, None], carried)[0])[:, 0]


@st.composite
def histories(draw: Any) -> tuple[SequenceSpec, int, int, int, int]:
    block_rows = draw(st.sampled_from([1, 2, 3, 4, 6]))
    divisors = [n for n in range(1, block_rows + 1) if block_rows % n == 0]
    sequence = SequenceSpec(
        burn_in=0,
        unroll=draw(st.integers(1, 9)),
        n_step=draw(st.integers(1, 3)),
        stride=draw(st.sampled_from([*divisors, 2 * block_rows])),
        block_rows=block_rows,
    )
    lanes = draw(st.integers(1, 3))
    slots = 2 * lanes * sequence.blocks + draw(st.integers(0, 5))
    return sequence, lanes, slots, draw(st.integers(1, 40)), draw(st.integers(0, 2**32))


@given(history=histories())
@settings(
    deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_start_gives_the_rows_and_stacks_of_the_whole_history(storing, history):
    sequence, lanes, slots, count, seed = history
    rng = np.random.default_rng(seed)
    ring, k = make_ring(sequence, slots, lanes, storing), sequence.block_rows
    heads = [Added(chain=Chain(lane, 0, rng, 42 * k), number=0) for lane in range(lanes)]
    added: list[Added] = []
    completed: list[int] = []

    def leaves(keys: np.ndarray) -> np.ndarray:
        completed.extend(keys.tolist())
        return ones(keys)

    for turn in range(count):
        lane = int(rng.integers(lanes))
        head = heads[lane]
        if head.number and rng.random() < 0.1:
            head = Added(chain=Chain(lane, head.chain.chain + 1, rng, 42 * k), number=0)
        ring.add(head.chain.block(head.number, k), leaves)
        added.append(head)
        heads[lane] = Added(chain=head.chain, number=head.number + 1)
        if turn % 4 == 0 or turn == count - 1:
            expected = expected_starts(added, slots, sequence)
            assert ring.check_valid() == (True, "")
            keys = np.arange(ring.next_key * len(sequence.start_rows))
            assert set(keys[ring.leaves(keys) > 0].tolist()) == expected.keys()
            assert ring.startable == len(expected)
            if expected:
                drawn = ring.draw(Draw(batch_size=7), np.random.default_rng(turn))
                assert_is_history(drawn, expected, sequence)
    assert len(completed) == len(set(completed))  # each sequence is completed once


def add_all(ring: BlockRing, chain: Chain, numbers: range) -> list[int]:
    completed: list[int] = []

    def leaves(keys: np.ndarray) -> np.ndarray:
        completed.extend(keys.tolist())
        return ones(keys)

    for number in numbers:
        ring.add(chain.block(number, ring.spec.sequence.block_rows), leaves)
    return completed


def any_row(**changes: int) -> SequenceSpec:
    given = {"burn_in": 0, "unroll": 3, "n_step": 2, "stride": 1, "block_rows": 4}
    return SequenceSpec(**given | changes)


def test_sequences_are_completed_in_the_order_of_their_rows():
    ring = make_ring(any_row(), 12, 1, None)
    chain = Chain(0, 0, np.random.default_rng(0), 60)
    assert add_all(ring, chain, range(1)) == [0]  # rows 0 .. 3, and the input of row 4
    assert add_all(ring, chain, range(1, 3)) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_sequence_does_not_wait_for_the_block_after_its_last_row():
    sequence = any_row(n_step=1, unroll=8, stride=8)
    assert (sequence.length, sequence.blocks) == (8, 2)
    ring = make_ring(sequence, 12, 1, None)
    chain = Chain(0, 0, np.random.default_rng(0), 60)
    assert add_all(ring, chain, range(2)) == [0]
    drawn = ring.draw(Draw(batch_size=1), np.random.default_rng(0))
    assert drawn.next.time.tolist() == [8]
    assert_is_history(drawn, {0: (chain, 0)}, sequence)


def test_the_input_after_a_block_is_kept_only_where_sequences_end_with_one():
    kept = [path for path in make_ring(any_row(), 12, 1, None).storage.leaves if "next" in path]
    assert len(kept) == 5
    inside = any_row(unroll=4, n_step=2, stride=4)  # 5 rows of blocks of 4
    assert not [p for p in make_ring(inside, 12, 1, None).storage.leaves if "next" in p]


def test_first_priorities_get_the_row_after_or_the_last_one_again():
    ring = make_ring(any_row(), 12, 1, None)
    chain = Chain(0, 0, np.random.default_rng(0), 60)
    add_all(ring, chain, range(2))
    scalars = ring.scalars(np.array([0, 1, 3, 4]))
    assert scalars.inputs.time.tolist() == [
        [0, 1, 2, 3, 3],
        [1, 2, 3, 4, 5],
        [3, 4, 5, 6, 7],
        [4, 5, 6, 7, 7],
    ]
    assert scalars.acting.q_max[1, -1] == chain.rows.acting.q_max[5]


def test_a_late_priority_for_an_overwritten_start_is_ignored_and_counted():
    ring = make_ring(any_row(), 12, 1, None)
    add_all(ring, Chain(0, 0, np.random.default_rng(0), 80), range(13))
    # Block 0 is overwritten: of its starts 0 .. 3 none is there, of block 1's all are.
    assert ring.leaves(np.arange(8)).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert ring.set_leaves(np.array([2, 3, 4, 7]), np.array([9.0, 9, 5, 6])) == 2
    assert ring.leaves(np.arange(8)).tolist() == [0, 0, 0, 0, 5, 1, 1, 6]
    with pytest.raises(ValueError, match=r"Keys \[52\] were never given out: 13 blocks came"):
        ring.set_leaves(np.array([52]), np.ones(1))
    with pytest.raises(ValueError, match="some begin no startable sequence"):
        ring.set_leaves(np.array([51]), np.ones(1))


def test_a_restored_ring_has_all_starts_and_the_inputs_after_blocks(storing):
    sequence = any_row()
    ring, other = make_ring(sequence, 12, 1, storing), make_ring(sequence, 12, 1, None)
    chain = Chain(0, 0, np.random.default_rng(0), 100)
    add_all(ring, chain, range(17))
    other.restore(ring.state(), [blocks_of(ring)])
    assert other.check_valid() == (True, "")
    assert other.startable == ring.startable == 4 * 11 + 1
    drawn = other.draw(Draw(batch_size=50), np.random.default_rng(0))
    assert_is_history(drawn, {key: (chain, key) for key in range(4 * 17)}, sequence)


def test_a_snapshot_without_a_needed_input_is_refused_with_what_to_do():
    """An earlier rlx, whose sequences had a row more, saved such a snapshot."""
    ring = make_ring(any_row(n_step=1, unroll=4, stride=4), 12, 1, None)
    state = ring.state()
    layout = json.loads(state["layout"])
    layout["leaves"] = {p: x for p, x in layout["leaves"].items() if not p.startswith("next/")}
    with pytest.raises(ValueError, match=r"input after each block.*checkpoint\.replay=false") as e:
        ring.restore(state | {"layout": json.dumps(layout, sort_keys=True)}, [[]])
    assert "\n" not in str(e.value)


def test_a_recurrent_carry_is_refused_for_starts_inside_a_block():
    spec = BlockSpec(sequence=any_row(), row=ROW, carry=carry_spec(frames=(2, *SHAPE)))
    with pytest.raises(ValueError, match=r"carry/core/0 is stored for a block's first row only"):
        BlockRing(capacity_rows=400, spec=spec, lanes=1)
