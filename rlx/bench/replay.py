"""Measures replays against copying the same bytes: `python -m rlx.bench what=replay`.

Each way of keeping rows is filled, and then measured in turn with `np.copyto` of a whole batch
(the ceiling: what this machine's memory gives one plain copy). The frames are real where EnvPool
is installed; without it they are drawn to look like an emulator's, which matters only to LZ4.
"""

from __future__ import annotations

import gc
import itertools
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlx import trees
from rlx.acting.plan import carry_spec, row_spec
from rlx.bench import measuring
from rlx.config.build import build
from rlx.interfaces import Agent
from rlx.replay.ring.sum_tree import SumTree
from rlx.training.assemble import make_replay, replay_context
from rlx.types import ArraySpec, Rollout

LANES = 64
TURN_S = 0.02  # of a driver, for each update
AHEAD: Mapping[str, dict[str, Any]] = {
    "when asked for": {},
    "thread, 2 ahead": {"prefetch": 2},
    "process": {"where": "process"},
    "process, 2 ahead": {"where": "process", "prefetch": 2},
}
STORAGES: Mapping[str, dict[str, Any]] = {
    "memory, 1 thread": {"gather_threads": 1},
    "memory": {},
    "mmap": {"storage": "mmap"},
    "lz4": {"compress": "lz4"},
    "device": {"storage": "device"},
}
KINDS = 64  # different blocks that the replays are filled with, again and again


def bench_replay(setup: measuring.Setup, seconds: float, rows: int) -> list[dict[str, Any]]:
    """Rows per second in and out, bytes per row, latency of sample and update, for each storage."""
    agent = measuring.make_agent(setup)
    blocks = RowSource(agent, frames_of(setup))
    prefix = f"replay/{setup.name}/{rows:,}"
    found = _tree_rows(f"{prefix}/sum tree", rows // agent.sequence.block_rows, setup.batch_size)
    folder = Path(tempfile.mkdtemp(prefix="rlx-bench-"))
    try:
        for name, keeping in STORAGES.items():
            if name != "lz4" or blocks.has_frames:
                storing = keeping | {"folder": str(folder)}
                replay, insert_s = filled(agent, rows, blocks, storing, setup.batch_size)
                found += _measured(replay, insert_s, setup, agent, f"{prefix}/{name}", seconds)
                replay.close()
                del replay
                gc.collect()
        few = min(rows, 100_000)  # of each of several replays
        found += _beside_a_driver(agent, setup, few, blocks, f"{prefix}/ahead", seconds)
        found += _flashbax(agent, setup, rows, blocks, f"{prefix}/flashbax", seconds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return found


class RowSource:
    """Rollouts of one block of each lane, whose contents repeat."""

    def __init__(self, agent: Agent, frames: np.ndarray | None) -> None:
        """frames: u8[KINDS, K, ...] of an Atari game, or None."""
        self._agent = agent
        self.has_frames = frames is not None
        spec = row_spec(agent.spec, agent.acting_spec)
        shape = (LANES, agent.sequence.block_rows)
        self.rows = trees.tree_map(lambda leaf: _noise(leaf, shape), spec)
        self.rows.valid[:] = True
        self.rows.inputs.first[:] = False
        if frames is not None:
            (leaf,) = self.rows.inputs.observation.values()
            leaf[:] = frames.reshape(leaf.shape)
        self.carry = trees.tree_map(lambda leaf: _noise(leaf, (LANES,)), carry_spec(agent))

    def __iter__(self) -> Iterator[Rollout]:
        lane, zeros = np.arange(LANES, dtype=np.int32), np.zeros(LANES, np.int32)
        for number in itertools.count():
            yield Rollout(
                rows=self.rows,
                carry=self.carry,
                next=trees.tree_map(lambda x: x[:, 0], self.rows.inputs),
                lane=lane,
                chain=zeros,
                number=np.full(LANES, number),
                weights_version=np.full(LANES, number),
                episodes=(),
                env_steps=0,
                frames=0,
                timings={},
            )


def _noise(leaf: ArraySpec, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(0)
    whole = (*shape, *leaf.shape)
    if leaf.dtype == "uint8":
        return rng.integers(0, 256, whole, np.uint8)
    return np.asarray(rng.random(whole)).astype(leaf.dtype)


def frames_of(setup: measuring.Setup) -> np.ndarray | None:
    """u8[KINDS, 40, 84, 84]: a game played at random, or what is drawn like one."""
    if setup.name != "pong":
        return None
    try:
        env = build(measuring.settings("env", setup.env), "env").make(lanes=8, seeds=list(range(8)))
    except Exception:  # whatever keeps EnvPool from playing here
        return _drawn_frames()
    rng, played = np.random.default_rng(0), [env.reset()]
    for _ in range(KINDS * 40 // 8 - 1):
        lane = played[-1].lane
        played.append(env.step(rng.integers(0, 6, len(lane)).astype(np.int32), lane))
    env.close()
    (seen,) = zip(*[step.observation.values() for step in played], strict=True)
    return np.stack(seen, axis=1).reshape(KINDS, 40, 84, 84)


def _drawn_frames() -> np.ndarray:
    """Draws a court, two bats and a ball that move."""
    frames = np.full((KINDS * 40, 84, 84), 87, np.uint8)
    frames[:, :12] = np.random.default_rng(0).integers(0, 2, (84 * 12)).reshape(12, 84) * 147
    for i, frame in enumerate(frames):
        frame[12 + i % 60 : 24 + i % 60, 5:7] = 147
        frame[70 - i % 50 : 82 - i % 50, 77:79] = 148
        frame[13 + 3 * i % 70, 2 * i % 84] = 236
    return frames.reshape(KINDS, 40, 84, 84)


def filled(
    agent: Agent, rows: int, blocks: RowSource, keeping: dict[str, Any], batch_size: int
) -> tuple[Any, float]:
    """Returns (a full replay, the seconds that filling it took)."""
    own = measuring.settings("replay", "prioritized") | {"capacity": rows} | keeping
    context = replay_context(agent, {}, LANES, seed=0, devices=jax.local_devices()[:1])
    replay = make_replay(own, context, batch_size)
    began = perf_counter()
    for rollout in blocks:
        replay.add(rollout)
        if replay.rows + LANES * agent.sequence.block_rows > replay.capacity:
            return replay, perf_counter() - began
    raise AssertionError("unreachable: blocks never end")


def _measured(
    replay: Any, insert_s: float, setup: measuring.Setup, agent: Agent, prefix: str, seconds: float
) -> list[dict[str, Any]]:
    size, length = setup.batch_size, agent.sequence.length
    buffers = replay.buffers(size)
    td = np.random.default_rng(0).random((size, agent.sequence.unroll), np.float32)
    trees.register()
    source = trees.tree_map(np.copy, replay.sample(size).batch)
    latencies_s: list[float] = []

    def work() -> float:
        began = perf_counter()
        sample = replay.sample(size, buffers=buffers)
        jax.block_until_ready(sample.batch)
        replay.update_priorities(sample.keys, td)
        latencies_s.append(perf_counter() - began)
        return float(size * length)

    rates = measuring.measure(
        {"np.copyto": _copyto(source, buffers, size * length), "sample + update": work}, seconds
    )
    found = measuring.rows(rates, prefix=prefix, unit="rows/s", roofline="np.copyto")
    p50, p99 = np.quantile(latencies_s[1:] or latencies_s, [0.5, 0.99])
    return [
        *found,
        measuring.alone(f"{prefix}/sample + update, p50", 1000 * p50, "ms"),
        measuring.alone(f"{prefix}/sample + update, p99", 1000 * p99, "ms"),
        measuring.alone(f"{prefix}/insert", replay.rows / insert_s, "rows/s"),
        measuring.alone(f"{prefix}/all bytes", replay.nbytes / replay.capacity, "bytes/row"),
    ]


def _beside_a_driver(
    agent: Agent, setup: measuring.Setup, rows: int, blocks: RowSource, prefix: str, seconds: float
) -> list[dict[str, Any]]:
    """Measures the batches of a learner whose driver works for TURN_S after each batch.

    busy: in Python, so that no other thread of its process has the interpreter; waiting: for a
    device. The ceiling is the driver without a replay.
    """
    turns = {"busy": _busy, "waiting": time.sleep}
    size, td = setup.batch_size, np.ones((setup.batch_size, agent.sequence.unroll), np.float32)
    made = {name: filled(agent, rows, blocks, keeping, size)[0] for name, keeping in AHEAD.items()}
    found = []
    try:
        for turn, wait in turns.items():

            def work(replay: Any, wait: Callable[[float], None] = wait) -> float:
                if replay is not None:
                    sample = replay.sample(size)
                    replay.update_priorities(sample.keys, td)
                wait(TURN_S)
                return 1.0

            ways = {"no replay": partial(work, None)}
            ways |= {name: partial(work, replay) for name, replay in made.items()}
            rates = measuring.measure(ways, seconds)
            own = f"{prefix}/driver {turn}"
            found += measuring.rows(rates, prefix=own, unit="batches/s", roofline="no replay")
    finally:
        for replay in made.values():
            replay.close()
    return found


def _busy(seconds: float) -> None:
    end = perf_counter() + seconds
    while perf_counter() < end:
        pass


def _copyto(source: Any, target: Any, rows: int) -> Callable[[], float]:
    """Copies all arrays of a batch."""
    pairs = list(zip(trees.flatten(target).values(), trees.flatten(source).values(), strict=True))

    def work() -> float:
        for to, of in pairs:
            np.copyto(to, of)
        return float(rows)

    return work


def _tree_rows(prefix: str, leaves: int, size: int) -> list[dict[str, Any]]:
    """Measures a sum tree alone: draw a batch, set a batch."""
    found = []
    for n in (leaves, 1_000_000):
        tree, rng, times_s = SumTree(n), np.random.default_rng(0), []
        tree.load(rng.random(n))
        for _ in range(500):
            began = perf_counter()
            tree.set(tree.find(rng.random(size) * tree.total), rng.random(size))
            times_s.append(perf_counter() - began)
        name = f"{prefix} of {n:,}, draw {size} + set {size}, p50"
        found.append(measuring.alone(name, 1000 * float(np.median(times_s)), "ms"))
    return found


# --- a peer --------------------------------------------------------------------------------------


def _flashbax(
    agent: Agent, setup: measuring.Setup, rows: int, blocks: RowSource, prefix: str, seconds: float
) -> list[dict[str, Any]]:
    """Measures flashbax's prioritised trajectory buffer with the same rows, if it is installed."""
    try:
        import flashbax
    except ImportError:
        return []

    sequence, size = agent.sequence, setup.batch_size
    buffer = flashbax.make_prioritised_trajectory_buffer(
        add_batch_size=LANES,
        sample_batch_size=size,
        sample_sequence_length=sequence.length,
        period=sequence.stride,
        min_length_time_axis=sequence.length,
        max_length_time_axis=rows // LANES,
        priority_exponent=0.9,
        device="cpu" if jax.default_backend() == "cpu" else "gpu",
    )
    # It keeps no carry beside a sequence's rows: each row has its own, so h and c come on top.
    trees.register()
    some = blocks.rows
    state = buffer.init(jax.tree.map(lambda x: jnp.asarray(x[0, 0]), some))
    add = jax.jit(buffer.add, donate_argnums=0)
    began = perf_counter()
    for _ in range(rows // LANES // sequence.block_rows):
        state = add(state, some)
    jax.block_until_ready(state)
    insert_s = perf_counter() - began
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    sample, set_priorities = (
        jax.jit(buffer.sample),
        jax.jit(buffer.set_priorities, donate_argnums=0),
    )
    held, key = {"state": state}, jax.random.PRNGKey(0)
    del state
    latencies_s: list[float] = []

    def work() -> float:
        nonlocal key
        began = perf_counter()
        key, used = jax.random.split(key)
        batch = sample(held["state"], used)
        jax.block_until_ready(batch)
        held["state"] = set_priorities(held["state"], batch.indices, batch.probabilities)
        jax.block_until_ready(held["state"].sum_tree_state.nodes)
        latencies_s.append(perf_counter() - began)
        return float(size * sequence.length)

    rates = measuring.measure({"sample + update": work}, seconds)
    p50, p99 = np.quantile(latencies_s[1:] or latencies_s, [0.5, 0.99])
    (row,) = measuring.rows(rates, prefix=prefix, unit="rows/s", roofline="sample + update")
    return [
        measuring.alone(row["name"], row["value"], row["unit"]),
        measuring.alone(f"{prefix}/sample + update, p50", 1000 * p50, "ms"),
        measuring.alone(f"{prefix}/sample + update, p99", 1000 * p99, "ms"),
        measuring.alone(f"{prefix}/insert", rows / insert_s, "rows/s"),
        measuring.alone(f"{prefix}/all bytes", nbytes / rows, "bytes/row"),
    ]
