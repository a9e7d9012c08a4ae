import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from replay_streams import (
    ATARI_CARRY,
    ATARI_ROW,
    ATARI_SEQUENCE,
    blocks_of,
    carry_spec,
    rollout,
    row_spec,
    sequence_spec,
)

from rlx import trees
from rlx.machine.memory import available_bytes
from rlx.replay.ring import ring as blocks
from rlx.replay.ring import storage
from rlx.replay.ring.block_spec import BlockSpec
from rlx.replay.ring.budget import Budget, budget
from rlx.replay.ring.ring import BlockRing, Draw, Drawn
from rlx.replay.ring.storage import Storing
from rlx.types import Carry


def ones(keys: np.ndarray) -> np.ndarray:
    return np.ones(len(keys))


@pytest.fixture(params=["memory", "threads", "mmap", "lz4", "device"])
def storing(request, monkeypatch, tmp_path) -> Storing:
    """Each way of keeping blocks, for frames and batches of any size."""
    monkeypatch.setattr(storage, "WORTH_COMPRESSING", 1)
    monkeypatch.setattr(storage, "WORTH_THREADS", 1)
    return {
        "memory": Storing(),
        "threads": Storing(gather_threads=3),
        "mmap": Storing(storage="mmap", folder=tmp_path / "ring"),
        "lz4": Storing(compress="lz4", gather_threads=2),
        "device": Storing(storage="device"),
    }[request.param]


def make_ring(slots: int, lanes: int, sequence=None, **specs) -> BlockRing:
    sequence = sequence or sequence_spec()
    return BlockRing(
        capacity_rows=slots * sequence.block_rows,
        spec=BlockSpec(
            sequence=sequence,
            row=specs.get("row_spec", row_spec()),
            carry=specs.get("carry_spec", carry_spec()),
        ),
        lanes=lanes,
        storing=specs.get("storing"),
    )


def startable_keys(ring: BlockRing) -> set[int]:
    keys = np.arange(ring.next_key)
    return set(keys[ring.leaves(keys) > 0].tolist())


def expected_starts(added: list[tuple[int, int, int]], slots: int, sequence) -> set[int]:
    """The brute-force twin: `added` are all blocks ever stored, by key."""
    oldest = max(0, len(added) - slots)
    live = {block: key for key, block in enumerate(added) if key >= oldest}
    return {
        key
        for (lane, chain, number), key in live.items()
        if number % sequence.blocks_per_stride == 0
        and all((lane, chain, number + i) in live for i in range(sequence.blocks))
    }


def assert_contiguous(drawn: Drawn, added: list[tuple[int, int, int]], sequence) -> None:
    """Every row is the one that its block's name and its place in the window say."""
    for b, key in enumerate(drawn.keys):
        lane, chain, number = added[key]
        rows = number * sequence.block_rows + np.arange(sequence.length)
        assert (drawn.rows.action[b] == lane).all()
        assert (drawn.rows.reward[b] == chain).all()
        assert (drawn.rows.inputs.time[b] == rows).all()
        assert (drawn.rows.inputs.observation["image"][b] == (rows % 251)[:, None]).all()
        assert drawn.next.time[b] == rows[-1] + 1
        assert (drawn.next.observation["image"][b] == (rows[-1] + 1) % 251).all()
        assert (drawn.carry.core[0][b] == rows[0]).all()
        assert drawn.weights_version[b] == number * 10


@st.composite
def streams(draw):
    """(slots, lanes, sequence, rollouts of (lane, chain, number), older chains among them)."""
    sequence = sequence_spec(
        block_rows=draw(st.integers(1, 3)),
        length=draw(st.integers(1, 9)),
        blocks_per_stride=draw(st.integers(1, 3)),
    )
    lanes = draw(st.integers(1, 4))
    slots = 2 * lanes * sequence.blocks + draw(st.integers(0, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    heads = [(int(rng.integers(0, 2)), 0) for _ in range(lanes)]
    rollouts = []
    for _ in range(draw(st.integers(1, 30))):
        some = []
        for _ in range(rng.integers(0, 2 * slots if rng.random() < 0.1 else 8)):
            lane = int(rng.integers(lanes))
            chain, number = heads[lane]
            if chain and number and rng.random() < 0.05:
                some.append((lane, chain - 1, int(rng.integers(9))))
                continue
            if number and rng.random() < 0.05:
                chain, number = chain + int(rng.integers(1, 3)), 0
            some.append((lane, chain, number))
            heads[lane] = (chain, number + 1)
        rollouts.append(some)
    return slots, lanes, sequence, rollouts


def keep_newest_chains(given_blocks, newest: dict[int, int]) -> list[tuple[int, int, int]]:
    kept = []
    for lane, chain, number in given_blocks:
        if chain >= newest.get(lane, -1):
            newest[lane] = chain
            kept.append((lane, chain, number))
    return kept


@given(stream=streams())
@settings(
    deadline=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # which is the same for all
)
def test_any_history_agrees_with_the_brute_force_twin(storing, stream):
    slots, lanes, sequence, rollouts = stream
    ring = make_ring(slots, lanes, sequence, storing=storing)
    rng = np.random.default_rng(0)
    added: list[tuple[int, int, int]] = []
    newest: dict[int, int] = {}
    for some in rollouts:
        ring.add(rollout(some, sequence), ones)
        added += keep_newest_chains(some, newest)
        expected = expected_starts(added, slots, sequence)
        assert ring.check_valid() == (True, "")
        assert startable_keys(ring) == expected
        assert ring.startable == len(expected)
        assert ring.rows == min(len(added), slots) * sequence.block_rows
        if expected:
            drawn = ring.draw(Draw(batch_size=8), rng)
            assert set(drawn.keys.tolist()) <= expected
            assert_contiguous(drawn, added, sequence)
    assert ring.env_steps == len(added) * sequence.block_rows
    assert ring.blocks_dropped == sum(map(len, rollouts)) - len(added)


def test_the_newest_start_waits_for_its_last_block():
    sequence = sequence_spec(block_rows=2, length=5)  # 3 blocks, the last one half
    ring = make_ring(12, 2, sequence)
    for number, expected in enumerate([set(), set(), {0}, {0, 1}]):
        ring.add(rollout([(0, 0, number)], sequence), ones)
        assert startable_keys(ring) == expected


def test_only_valid_rows_are_env_steps():
    ring = make_ring(12, 2)
    ring.add(rollout([(0, 0, 0)], ring.spec.sequence, valid=False), ones)
    assert (ring.env_steps, ring.rows) == (0, 2)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ((1, 3, 1), "lane 1, chain 3 expects number 2, got 1"),
        ((1, 3, 3), "lane 1, chain 3 expects number 2, got 3"),
        ((1, 4, 1), "lane 1, chain 4 expects number 0, got 1"),
        ((2, 0, 0), "Lane 2 is not one of the 2 lanes"),
    ],
)
def test_blocks_out_of_order_are_refused_and_nothing_is_added(bad, message):
    ring = make_ring(12, 2)
    ring.add(rollout([(1, 3, 0), (1, 3, 1)], ring.spec.sequence), ones)
    with pytest.raises(ValueError, match=message):
        ring.add(rollout([(0, 0, 0), (0, 0, 1), bad], ring.spec.sequence), ones)
    assert ring.rows == 4
    ring.add(rollout([(0, 0, 0), (1, 3, 2)], ring.spec.sequence), ones)
    assert startable_keys(ring) == {0}


def test_a_failing_priority_leaves_the_ring_valid():
    ring = make_ring(64, 2)
    many = [(i % 2, 0, i // 2) for i in range(60)]

    def fail(keys):
        raise FloatingPointError(keys)

    with pytest.raises(FloatingPointError):
        ring.add(rollout(many, ring.spec.sequence), fail)
    assert ring.check_valid() == (True, "")
    assert ring.startable == 0
    ring.add(rollout(many[ring.rows // 2 :], ring.spec.sequence), ones)
    assert ring.check_valid() == (True, "")
    assert ring.startable > 0


def test_rows_of_another_spec_are_refused():
    ring = make_ring(12, 2)
    wide = rollout([(0, 0, 0)], ring.spec.sequence, rows=row_spec((4,)))
    with pytest.raises(ValueError, match=r"rows/inputs/observation/image is uint8\[1, 2, 4\]"):
        ring.add(wide, ones)
    good = rollout([(0, 0, 0)], ring.spec.sequence)
    double = replace(good, rows=replace(good.rows, reward=good.rows.reward.astype(np.float64)))
    with pytest.raises(ValueError, match="reward is float64"):
        ring.add(double, ones)
    with pytest.raises(ValueError, match="come from one spec"):
        ring.add(replace(good, carry=Carry(core=(), frames={})), ones)


def test_feed_forward_carries_and_reused_buffers():
    empty = Carry(core=(), frames={})
    ring = make_ring(12, 2, carry_spec=empty)
    some = rollout([(0, 0, n) for n in range(4)], ring.spec.sequence)
    ring.add(replace(some, carry=empty), ones)
    buffers = ring.buffers(3)
    drawn = ring.draw(Draw(batch_size=3), np.random.default_rng(0), buffers)
    assert drawn.rows.reward is buffers.rows.reward
    assert drawn.carry.core == ()
    assert (np.diff(drawn.rows.inputs.time, axis=1) == 1).all()
    with pytest.raises(ValueError, match="holds 3 sequences, 4 are asked for"):
        ring.draw(Draw(batch_size=4), np.random.default_rng(0), buffers)


def test_an_empty_ring_says_so():
    with pytest.raises(ValueError, match="No sequence is startable: 0 blocks"):
        make_ring(12, 2).draw(Draw(batch_size=1), np.random.default_rng(0))


def test_a_chain_never_links_to_the_next():
    ring = make_ring(12, 2)
    ring.add(rollout([(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)], ring.spec.sequence), ones)
    assert ring.index.slot.next_key[:4].tolist() == [1, -1, 3, -1]
    assert ring.check_valid() == (True, "")
    ring.index.slot.next_key[1] = 2
    assert ring.check_valid() == (False, "a link goes to another chain")


def test_drawn_sequences_tell_their_probability():
    ring = make_ring(12, 2)
    ring.add(rollout([(0, 0, n) for n in range(6)], ring.spec.sequence), lambda keys: keys + 1.0)
    drawn = ring.draw(Draw(batch_size=20), np.random.default_rng(0))
    assert drawn.scaled_probability == pytest.approx(4 * (drawn.keys + 1) / (1 + 2 + 3 + 4))


def test_scalars_are_the_windows_without_observations():
    ring = make_ring(12, 2)
    ring.add(rollout([(1, 0, n) for n in range(4)], ring.spec.sequence), ones)
    ring.storage.leaves["rows/inputs/observation/image"] = None  # reading it would fail
    scalars = ring.scalars(np.array([1]))
    assert scalars.inputs.observation == {}
    assert scalars.inputs.time.tolist() == [[2, 3, 4, 5, 6, 7]]


# --- threads -------------------------------------------------------------------------------------


def test_a_sequence_overwritten_while_it_is_copied_is_drawn_again(storing, monkeypatch):
    ring = make_ring(12, 2, storing=storing)
    ring.add(rollout([(0, 0, n) for n in range(12)], ring.spec.sequence), ones)
    copy_out, left = ring.reader._copy_out, [1]

    def copy_then_overwrite(*args):
        found = copy_out(*args)
        if left.pop() if left else 0:
            ring.add(rollout([(0, 0, n) for n in range(12, 24)], ring.spec.sequence), ones)
        return found

    monkeypatch.setattr(ring.reader, "_copy_out", copy_then_overwrite)
    drawn = ring.draw(Draw(batch_size=16), np.random.default_rng(0))
    assert ring.reader.redraws == 16
    assert (drawn.keys >= 12).all()
    assert (drawn.rows.inputs.time[:, 0] == 2 * drawn.keys).all()
    assert (drawn.carry.core[0][:, 0] == 2 * drawn.keys).all()
    assert (drawn.weights_version == 10 * drawn.keys).all()


def test_what_is_drawn_again_comes_from_its_own_part_of_the_total(storing, monkeypatch):
    """Ten equal leaves in ten parts: each position has one sequence, known beforehand."""
    ring = make_ring(12, 2, storing=storing)
    ring.add(rollout([(0, 0, n) for n in range(18)], ring.spec.sequence), ones)
    copy_out, left = ring.reader._copy_out, [1]

    def copy_then_overwrite(*args):
        found = copy_out(*args)
        if left.pop() if left else 0:  # in the middle of the batch: the blocks 6 to 9
            ring.add(rollout([(0, 0, n) for n in range(18, 22)], ring.spec.sequence), ones)
        return found

    monkeypatch.setattr(ring.reader, "_copy_out", copy_then_overwrite)
    drawn = ring.draw(Draw(batch_size=10, stratified=True), np.random.default_rng(0))
    assert ring.reader.redraws == 4
    assert drawn.keys.tolist() == [12, 13, 14, 15, 16, 17, 18, 19, 10, 11]
    assert (drawn.rows.inputs.time[:, 0] == 2 * drawn.keys).all()


def test_the_least_probability_is_of_all_draws_of_a_batch(monkeypatch):
    """A sequence chosen before the total shrank was chosen with a smaller chance."""
    ring = make_ring(12, 2)
    blocks = [(0, 0, n) for n in range(18)]
    ring.add(rollout(blocks, ring.spec.sequence), lambda keys: np.where(keys < 10, 100.0, 1.0))
    copy_out, left = ring.reader._copy_out, [1]

    def copy_then_overwrite(*args):
        found = copy_out(*args)
        if left.pop() if left else 0:  # all with a leaf of 100
            ring.add(rollout([(0, 0, n) for n in range(18, 22)], ring.spec.sequence), ones)
        return found

    monkeypatch.setattr(ring.reader, "_copy_out", copy_then_overwrite)
    drawn = ring.draw(Draw(batch_size=16, find_least=True), np.random.default_rng(0))
    assert ring.reader.redraws > 0
    assert drawn.least_scaled_probability == pytest.approx(10 / (4 * 100 + 6))


def test_a_block_being_written_is_seen_as_changed(monkeypatch):
    ring = make_ring(12, 2)
    ring.add(rollout([(0, 0, n) for n in range(12)], ring.spec.sequence), ones)
    window, write = np.array([[0, 1, 2], [1, 2, 3], [9, 10, 11]]), ring._write

    def look_then_write(*part):
        assert ring.reader.changed(window).tolist() == [0]
        assert ring.leaves(np.arange(3)).tolist() == [0.0, 1.0, 1.0]
        write(*part)

    monkeypatch.setattr(ring, "_write", look_then_write)
    ring.add(rollout([(0, 0, 12)], ring.spec.sequence), ones)


def test_every_block_of_a_window_is_compared():
    ring = make_ring(12, 2)
    ring.add(rollout([(0, 0, n) for n in range(12)], ring.spec.sequence), ones)
    for block in (3, 4, 5):
        ring.index.slot.key[block] = -1
        assert ring.reader.changed(np.array([[0, 1, 2], [3, 4, 5]])).tolist() == [1]
        ring.index.slot.key[block] = block


def blocks_of_their_keys(sequence, shape, lanes: int, number: int, count: int):
    """The lanes' next `count` blocks each, taking turns, with their keys in every leaf."""
    names = [(lane, 0, number + n) for n in range(count) for lane in range(lanes)]
    some = rollout(names, sequence)
    keys = number * lanes + np.arange(len(names))
    some.rows.acting.q[:] = keys[:, None]
    some.carry.core[1][:] = keys[:, None]
    # A broadcast source is slow to copy: most of the time the ring is being written.
    image = (keys % 251).astype(np.uint8)[:, None, None, None]
    image = np.broadcast_to(image, (len(names), sequence.block_rows, *shape))
    inputs = replace(some.rows.inputs, observation={"image": image})
    return replace(some, rows=replace(some.rows, inputs=inputs))


def test_a_writer_thread_never_gives_a_torn_sequence(storing):
    """A ring of 64 slots; each block is filled with its key, lanes take turns."""
    lanes, shape, sequence = 2, (64, 64), sequence_spec(block_rows=4, length=14)
    ring = make_ring(64, lanes, sequence, row_spec=row_spec(shape), storing=storing)
    stop, torn, rng = threading.Event(), [], np.random.default_rng(0)

    def oldest_first(keys):  # they are the ones that the writer is about to overwrite
        return np.exp(-0.05 * keys) + 1e-300

    def write():
        number = 0
        while not stop.is_set():
            ring.add(blocks_of_their_keys(sequence, shape, lanes, number, 4), oldest_first)
            number += 4

    def check(drawn):
        keys = drawn.keys[:, None] + lanes * (np.arange(sequence.length) // sequence.block_rows)
        image = drawn.rows.inputs.observation["image"]
        same = (image == (keys % 251)[:, :, None, None]).all(axis=(1, 2, 3))
        same &= (drawn.rows.acting.q == keys).all(axis=1)
        same &= (drawn.carry.core[1] == drawn.keys[:, None]).all(axis=1)
        torn.extend(drawn.keys[~same].tolist())

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    writer = threading.Thread(target=write)
    try:
        writer.start()
        while ring.startable < 20 and writer.is_alive():
            time.sleep(0.001)
        buffers = ring.buffers(2)
        for _ in range(1500):
            check(ring.draw(Draw(batch_size=2), rng, buffers))
    finally:
        stop.set()
        writer.join()
        sys.setswitchinterval(interval)
    assert not torn
    assert ring.reader.redraws > 0, "the writer never met the reader: the test shows nothing"
    assert ring.check_valid() == (True, "")


# --- memory --------------------------------------------------------------------------------------


def test_an_atari_row_takes_at_most_15_percent_more_than_its_frame():
    ring = make_ring(16, 2, ATARI_SEQUENCE, row_spec=ATARI_ROW, carry_spec=ATARI_CARRY)
    frames = ring.budget.rows * 84 * 84
    assert ring.nbytes <= 1.15 * frames
    assert ring.bytes_per_row * ring.budget.rows == ring.nbytes


def test_what_a_device_has_no_room_for_is_refused_with_both_numbers():
    storing = Storing(storage="device")
    says = r"takes 28\d\d\.\d+ GB on .*, which has \d+\.\d+ GB left"
    with pytest.raises(ValueError, match=says):
        make_ring(10**7, 2, ATARI_SEQUENCE, row_spec=ATARI_ROW, storing=storing)


@pytest.mark.parametrize("storage", ["device", "mmap"])
def test_frames_are_compressed_in_memory_only(storage):
    with pytest.raises(ValueError, match=r"compress=lz4 needs replay\.storage=memory"):
        make_ring(100, 2, sequence_spec(), storing=Storing(storage=storage, compress="lz4"))


def test_the_budget_is_the_bytes_of_the_ring():
    for slots, lanes, sequence in [(12, 2, sequence_spec()), (100, 5, sequence_spec(length=8))]:
        ring = make_ring(slots, lanes, sequence)
        assert ring.budget.total_bytes == ring.nbytes
        assert ring.budget.rows == slots * sequence.block_rows


def atari_budget(capacity_rows: int, lanes: int = 64) -> Budget:
    return budget(
        capacity_rows=capacity_rows,
        spec=BlockSpec(sequence=ATARI_SEQUENCE, row=ATARI_ROW, carry=ATARI_CARRY),
        lanes=lanes,
    )


def test_too_big_a_replay_is_refused_before_it_is_allocated(monkeypatch):
    paper = atari_budget(4_000_000)
    assert paper.total_bytes == pytest.approx(30.9e9, rel=0.01)
    paper.check(31_000_000_000)
    with pytest.raises(
        ValueError, match=r"4000000 rows takes 30\.\d+ GB of memory .*at most about 6474"
    ):
        paper.check(5_000_000_000)
    monkeypatch.setattr(blocks, "available_bytes", lambda: 1000)
    monkeypatch.setattr(blocks, "make_storage", None)  # allocating would fail
    with pytest.raises(ValueError, match="rows fit; lower replay"):
        make_ring(12, 2)


def test_capacity_is_rounded_down_to_blocks_and_has_a_least_size():
    assert atari_budget(100_039).rows == 100_000
    assert atari_budget(100_000).sequences == 64 * (2500 // 64 - 3)
    with pytest.raises(ValueError, match=r"700 blocks; 256 lanes with 4 .*= 2048 blocks: raise"):
        atari_budget(28_000, lanes=256)
    assert atari_budget(2048 * 40, lanes=256).sequences == 256 * 5
    with pytest.raises(ValueError, match="min_sequences=1281, but a full replay of 81920 rows"):
        atari_budget(2048 * 40, lanes=256).check_min_sequences(1281)


def test_a_full_ring_has_as_many_sequences_as_its_budget_says():
    for bps in (1, 2, 3):
        sequence = sequence_spec(block_rows=2, length=5, blocks_per_stride=bps)
        ring = make_ring(40, 3, sequence)
        for number in range(30):
            ring.add(rollout([(lane, 0, number) for lane in range(3)], sequence), ones)
            if number >= 14:
                assert ring.startable >= ring.budget.sequences


def test_lanes_that_run_evenly_have_just_as_many_sequences_as_their_budget_says():
    ring = make_ring(39, 3)  # 13 blocks of each lane, 3 of a sequence
    for number in range(20):
        blocks = [(lane, 0, number) for lane in range(3)]
        ring.add(rollout(blocks, ring.spec.sequence), ones)
    assert ring.startable == ring.budget.sequences == 3 * 11


def test_stride_must_be_whole_blocks():
    sequence = replace(sequence_spec(), stride=3)
    with pytest.raises(
        ValueError, match="stride=3 rows is neither a multiple nor a divisor of block_rows=2"
    ):
        make_ring(12, 2, sequence)


def write_files(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal: 99 kB\nMemAvailable:    8000 kB\n"}
UNLIMITED = str(2**63 - 4096)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, sys.maxsize),
        (MEMINFO, 8_192_000),
        (
            MEMINFO
            | {
                "proc/self/cgroup": "0::/job/step\n",
                "sys/fs/cgroup/job/memory.max": "1000000\n",
                "sys/fs/cgroup/job/memory.current": "400000\n",
                "sys/fs/cgroup/job/memory.stat": "anon 5\ninactive_file 100000\n",
                "sys/fs/cgroup/job/step/memory.max": "max\n",
                "sys/fs/cgroup/job/step/memory.current": "400000\n",
            },
            700_000,
        ),
        (
            MEMINFO
            | {
                "proc/self/cgroup": "5:devices:/\n4:cpu,memory:/hidden/by/namespace\n0::/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "500000\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "200000\n",
            },
            300_000,
        ),
        (
            MEMINFO
            | {
                "proc/self/cgroup": "4:memory:/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": UNLIMITED,
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "200000\n",
            },
            8_192_000,
        ),
    ],
)
def test_available_memory_is_the_smallest_limit(tmp_path, files, expected):
    assert available_bytes(write_files(tmp_path, files)) == expected


# --- saving --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 5, 11, 12, 40])
def test_a_restored_ring_goes_on_exactly(storing, count):
    def add(ring, begin, end):
        for n in range(begin, end):
            ring.add(rollout([(n % 2, 0, n // 2)], ring.spec.sequence), lambda keys: keys + 0.1)

    ring, other = make_ring(12, 2, storing=storing), make_ring(12, 2)
    add(ring, 0, count)
    add(other, 0, 17)
    saved, kept = ring.state(), blocks_of(ring)
    assert sum(len(some.keys) for some in kept) == min(count, 12)
    assert all(len(some.keys) <= 3 for some in kept)
    add(ring, count, count + 9)  # what is saved is a copy
    other.restore(saved, [kept])
    assert other.check_valid() == (True, "")
    assert other.rows == 2 * min(count, 12)
    add(other, count, count + 9)
    assert other.check_valid() == (True, "")
    assert startable_keys(ring) == startable_keys(other)
    for name, value in ring.state().items():
        assert np.array_equal(value, other.state()[name]), name
    drawn = [r.draw(Draw(batch_size=8), np.random.default_rng(3)) for r in (ring, other)]
    for a, b in zip(*[trees.flatten(vars(d)).values() for d in drawn], strict=True):
        assert np.array_equal(a, b)


def test_a_state_whose_blocks_are_missing_is_refused():
    ring = make_ring(12, 2)
    ring.add(rollout([(0, 0, n) for n in range(5)], ring.spec.sequence), ones)
    with pytest.raises(ValueError, match="has 5 blocks, 3 were found"):
        make_ring(12, 2).restore(ring.state(), [blocks_of(ring)[:1]])


def test_blocks_overwritten_while_they_are_copied_are_left_out(monkeypatch):
    ring = make_ring(12, 2)
    ring.add(rollout([(0, 0, n) for n in range(12)], ring.spec.sequence), ones)
    read = ring.storage.blocks

    def read_then_overwrite(slots):
        found = read(slots)
        ring.add(rollout([(0, 0, n) for n in range(12, 15)], ring.spec.sequence), ones)
        return found

    monkeypatch.setattr(ring.storage, "blocks", read_then_overwrite)
    found, last = ring.blocks_after(-1, 8)
    assert found.keys.tolist() == [3, 4, 5, 6, 7]
    assert found.leaves["rows/inputs/time"][:, 0].tolist() == [6, 8, 10, 12, 14]
    assert last == 7


def test_a_state_of_another_layout_is_refused():
    with pytest.raises(ValueError, match="another layout"):
        make_ring(12, 2).restore(make_ring(14, 2).state(), [])
