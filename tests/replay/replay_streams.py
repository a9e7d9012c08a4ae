"""Streams of blocks whose every leaf tells which lane, chain and row it is, and specs for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar, get_args, get_type_hints

import numpy as np

from rlx import trees
from rlx.config.hints import marker
from rlx.interfaces import ReplayContext
from rlx.types import (
    ArraySpec,
    Blocks,
    Carry,
    Gathered,
    NetInput,
    QActing,
    Rollout,
    Row,
    SequenceSpec,
)

R = TypeVar("R")


def row_spec(shape: tuple[int, ...] = (3,)) -> Row:
    def scalar(dtype: str) -> ArraySpec:
        return ArraySpec(shape=(), dtype=dtype)

    return Row(
        inputs=NetInput(
            observation={"image": ArraySpec(shape=shape, dtype="uint8")},
            prev_action=scalar("int32"),
            prev_reward=scalar("float32"),
            time=scalar("int32"),
            first=scalar("bool"),
        ),
        action=scalar("int32"),
        reward=scalar("float32"),
        discount=scalar("float32"),
        valid=scalar("bool"),
        acting=QActing(q=scalar("float32"), q_max=scalar("float32")),
    )


def carry_spec(units: int = 2, frames: tuple[int, ...] = (1, 3)) -> Carry:
    state = ArraySpec(shape=(units,), dtype="float32")
    return Carry(core=(state, state), frames={"image": ArraySpec(shape=frames, dtype="uint8")})


ATARI_ROW = row_spec((84, 84))
ATARI_CARRY = carry_spec(512, (3, 84, 84))
ATARI_SEQUENCE = SequenceSpec(burn_in=40, unroll=80, n_step=5, stride=40, block_rows=40)


def sequence_spec(
    *, block_rows: int = 2, length: int = 5, blocks_per_stride: int = 1, stride: int | None = None
) -> SequenceSpec:
    """A sequence of that many rows, one of them trained; stride: in rows, of any number."""
    return SequenceSpec(
        burn_in=length - 1,
        unroll=1,
        n_step=1,
        stride=stride or block_rows * blocks_per_stride,
        block_rows=block_rows,
    )


def fill(spec: Any, leading: tuple[int, ...]) -> Any:
    """Zeros of a spec with these leading axes."""
    return trees.tree_map(lambda leaf: np.zeros((*leading, *leaf.shape), leaf.dtype), spec)


def fill_row(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Values [...] with as many further axes as `like` has, to be broadcast."""
    return values.reshape(*values.shape, *[1] * (like.ndim - values.ndim))


IN_MEMORY = {
    "storage": "memory",
    "folder": None,
    "compress": "none",
    "gather_threads": 1,
    "shards": None,
    "min_env_steps": 0,
    "where": "thread",
    "record": None,
    "prefetch": 0,
}


CONTEXT = {"env": {}, "initial_priorities": None, "on_policy": False, "env_steps": 0, "devices": ()}


def making(cls: Callable[..., R], **given: Any) -> R:
    """The replay of settings as its YAML has them, and of what the run tells it."""
    names = {field.name for field in dataclasses.fields(ReplayContext)}
    told = CONTEXT | {name: given.pop(name) for name in names & given.keys()}
    settings = _gathered(cls, given)
    assert not given, f"{cls} has no {sorted(given)}"
    return cls(context=ReplayContext(**told), **settings)


def _gathered(cls: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Takes the settings of a class from those given."""
    annotated = cls if dataclasses.is_dataclass(cls) else cls.__init__
    found, hints = {}, get_type_hints(annotated, include_extras=True)
    for name, hint in hints.items():
        if marker(hint, Gathered):
            inner = get_args(hint)[0]
            found[name] = inner(**_gathered(inner, given))
        elif name in given:
            found[name] = given.pop(name)
    return found


def all_blocks(replay: Any) -> list[list[Blocks]]:
    """The blocks of each ring, as a snapshot reads them, a few at a time."""
    return [blocks_of(ring) for ring in replay.rings]


def blocks_of(ring: Any, most: int = 3) -> list[Blocks]:
    found, key = [], -1
    while True:
        blocks, last = ring.blocks_after(key, most)
        if last == key:
            return found
        found.append(blocks)
        key = last


def rollout(
    blocks: list[tuple[int, int, int]],
    sequence: SequenceSpec,
    *,
    rows: Row | None = None,
    carry: Carry | None = None,
    valid: bool = True,
) -> Rollout:
    """Blocks (lane, chain, number): action = lane, time = row of the chain, reward = chain.

    The image's bytes are the row's, the carry's are those of the block's first row.
    """
    rows, carry = rows or row_spec(), carry or carry_spec()
    names = np.array(blocks, np.int64).reshape(-1, 3)
    k = sequence.block_rows
    time = names[:, 2:] * k + np.arange(k)
    data, before = fill(rows, (len(names), k)), fill(carry, (len(names),))
    data.action[:] = names[:, :1]
    data.reward[:] = names[:, 1:2]
    data.inputs.time[:] = time
    data.valid[:] = valid
    image = data.inputs.observation["image"]
    image[:] = fill_row(time % 251, image)
    if before.core:
        before.core[0][:] = names[:, 2:] * k
    after = trees.tree_map(lambda leaf: leaf[:, -1].copy(), data.inputs)
    after.time[:] += 1
    after.observation["image"][:] = fill_row(after.time % 251, after.observation["image"])
    return Rollout(
        rows=data,
        carry=before,
        next=after,
        lane=names[:, 0].astype(np.int32),
        chain=names[:, 1].astype(np.int32),
        number=names[:, 2],
        weights_version=names[:, 2] * 10,
        episodes=(),
        env_steps=0,
        frames=0,
        timings={},
    )
