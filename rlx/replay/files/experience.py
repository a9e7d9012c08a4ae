"""Recorded experience: a folder of segments that hold the blocks which actors delivered.

    DIR/dataset.json                what every segment is like: leaves, rows of a block, lanes
    DIR/<run>-000000.npz ...        blocks in the order in which they came (see segments), and the
                                    settings of the environment that they came from

Several runs may record into one folder if their rows are alike. What is read follows the order in
which it was written, run after run, so a lane's blocks come as they came to the replay then.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import time_ns
from typing import Any

import numpy as np

from rlx import trees
from rlx.config.documents import read_json
from rlx.problems import cut, show
from rlx.replay.files.segments import SEGMENT_BYTES, SegmentError, read_segment, write_segment
from rlx.replay.ring.block_spec import INPUTS
from rlx.types import ArraySpec, Carry, Leaves, Rollout, Row, SequenceSpec

FORMAT = 1
FILE = "dataset.json"
KIND = "experience"
NAME = re.compile(r"[0-9a-f]{16}-\d{6,}\.npz")
COLUMNS = ("lane", "chain", "number", "weights_version")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """All blocks of a dataset have this in common."""

    leaves: dict[str, list[Any]]  # path below rows/ or carry/ -> [shape, dtype]
    block_rows: int
    lanes: int

    @classmethod
    def of(cls, sequence: SequenceSpec, row_spec: Row, carry_spec: Carry, lanes: int) -> Layout:
        specs: Mapping[str, ArraySpec] = trees.flatten({"rows": row_spec, "carry": carry_spec})
        leaves = {path: [list(leaf.shape), leaf.dtype] for path, leaf in specs.items()}
        return cls(leaves=leaves, block_rows=sequence.block_rows, lanes=lanes)

    def differences(self, other: Layout) -> str:
        """'rows/action [[], int32], here missing; ...'; '' where blocks of both are alike."""
        found = []
        if self.block_rows != other.block_rows:
            found.append(f"blocks of {self.block_rows} rows, here {other.block_rows}")
        if self.lanes != other.lanes:
            found.append(f"{self.lanes} lanes, here {other.lanes}")
        for path in sorted({*self.leaves, *other.leaves}):
            mine, its = self.leaves.get(path, "missing"), other.leaves.get(path, "missing")
            if mine != its:
                found.append(f"{path} {mine}, here {its}")
        return "; ".join(found[:4]) + (f"; and {len(found) - 4} more" if len(found) > 4 else "")


def env_differences(before: Any, here: Mapping[str, Any]) -> str:
    """'env.id=Pong-v5, here Breakout-v5'; '' where settings are alike, or none were told.

    Settings that only one of both has are left out: rlx had other ones when it wrote them.
    """
    if not isinstance(before, Mapping):
        return ""
    return "; ".join(
        f"env.{name}={cut(show(before[name]))}, here {cut(show(here[name]))}"
        for name in sorted({*before} & {*here})
        if json.dumps(before[name]) != json.dumps(here[name])
    )


class Recorder:
    """Writes rollouts into a dataset, a segment at a time, in a thread of its own."""

    def __init__(self, folder: Path, layout: Layout, env: Mapping[str, Any]) -> None:
        """Raises ValueError for a folder that holds something else.

        env: the settings of the environment, which every file tells.
        """
        # Names in the order of time: that is the order in which runs are read.
        self._folder, self._run, self._files = folder, f"{time_ns():016x}", 0
        self._about = {"kind": KIND, "run": self._run, "env": dict(env)}
        self._kept: list[dict[str, np.ndarray]] = []
        self._bytes = 0
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="record")
        self._written: Future[Any] | None = None
        about = {"format": FORMAT, "kind": KIND, **dataclasses.asdict(layout)}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
            if set(held) <= {FILE}:  # nothing was recorded yet
                (folder / f".{FILE}").write_text(json.dumps(about, indent=1) + "\n")
                (folder / f".{FILE}").rename(folder / FILE)
                return
        except OSError as error:
            says = f"replay.record={folder} cannot be written ({error.strerror}); give another"
            raise ValueError(says) from error
        if found := read_layout(folder).differences(layout):
            raise ValueError(
                f"replay.record={folder} holds other experience ({found}); give another folder"
            )

    def add(self, rollout: Rollout) -> None:
        """Copies a rollout's blocks; writes them out when there are enough for a file.

        Raises what kept an earlier file from being written.
        """
        if not len(rollout.lane) and not rollout.episodes:
            return
        arrays = {k: np.array(v) for k, v in _to_arrays(rollout).items()}
        self._kept.append(arrays)
        self._bytes += sum(array.nbytes for array in arrays.values())
        if self._bytes >= SEGMENT_BYTES:
            self._write()

    def flush(self) -> None:
        """Writes what there is, and waits for it."""
        if self._kept:
            self._write()
        self._wait()

    def close(self) -> None:
        """Writes the rest."""
        self.flush()
        self._writer.shutdown()

    def _write(self) -> None:
        self._wait()
        kept, self._kept, self._bytes = self._kept, [], 0
        path = self._folder / f"{self._run}-{self._files:06d}.npz"
        self._files += 1
        self._written = self._writer.submit(_write_segment, path, kept, self._about)

    def _wait(self) -> None:
        if self._written is not None:
            self._written.result()
            self._written = None


def _write_segment(path: Path, kept: list[dict[str, np.ndarray]], about: Mapping[str, Any]) -> None:
    arrays = {name: np.concatenate([part[name] for part in kept]) for name in kept[0]}
    write_segment(path, arrays, about)


def _to_arrays(rollout: Rollout) -> Leaves:
    rows = {f"rows/{path}": leaf for path, leaf in trees.flatten(rollout.rows).items()}
    carry = {f"carry/{path}": leaf for path, leaf in trees.flatten(rollout.carry).items()}
    following = {f"next/{path}": leaf for path, leaf in trees.flatten(rollout.next).items()}
    columns = {name: getattr(rollout, name) for name in COLUMNS}
    episodes = {
        "episode/return": np.array([e.return_ for e in rollout.episodes], np.float64),
        "episode/env_steps": np.array([e.env_steps for e in rollout.episodes], np.int64),
        "episode/lane": np.array([e.lane for e in rollout.episodes], np.int32),
    }
    return {**columns, **rows, **carry, **following, **episodes}


# --- reading -------------------------------------------------------------------------------------


def read_layout(folder: Path) -> Layout:
    """The layout of a dataset; raises ValueError for a folder that is none."""
    path = folder / FILE
    try:
        about = read_json(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder}: no recorded experience: {FILE} is missing or damaged"
        ) from error
    if not isinstance(about, dict) or (about.get("format"), about.get("kind")) != (FORMAT, KIND):
        raise ValueError(f"{path}: no recorded experience that this rlx reads (format {FORMAT})")
    try:
        layout = Layout(**{field.name: about[field.name] for field in dataclasses.fields(Layout)})
        counts = layout.block_rows, layout.lanes
        leaves = layout.leaves
        are_leaves = isinstance(leaves, dict) and all(map(_is_leaf, leaves.values()))
        if not are_leaves or "rows/valid" not in leaves or not all(map(_is_count, counts)):
            raise ValueError(f"{path}: damaged: leaves, block_rows or lanes are none")
        return layout
    except KeyError as error:
        raise ValueError(f"{path}: damaged: {error} is missing") from error


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_leaf(value: Any) -> bool:
    """Says whether it is [shape, dtype]."""
    if not isinstance(value, list) or len(value) != 2 or not isinstance(value[0], list):
        return False
    return isinstance(value[1], str) and all(type(size) is int and size >= 0 for size in value[0])


EPISODES = ("episode/return", "episode/env_steps", "episode/lane")


def files(folder: Path) -> list[Path]:
    """The segments, run after run; raises ValueError if there is none, or one is missing."""
    runs: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if not NAME.fullmatch(path.name):
            continue
        runs.setdefault(path.name.partition("-")[0], []).append(path)
    if not runs:
        raise ValueError(f"{folder}: recorded nothing yet: there is no segment in it")
    for paths in runs.values():
        numbers = [int(path.stem.partition("-")[2]) for path in paths]
        if numbers != list(range(len(numbers))):
            lost = min(set(range(max(numbers) + 1)) - set(numbers))
            name = f"{paths[0].name.partition('-')[0]}-{lost:06d}.npz"
            raise ValueError(f"{folder / name}: missing: a later one of that run is there")
    return [path for _, paths in sorted(runs.items()) for path in paths]


def read(folder: Path) -> Iterator[tuple[Path, dict[str, np.ndarray], Mapping[str, Any]]]:
    """Each segment's arrays, and what it tells of itself.

    Raises ValueError, naming the file, for a damaged or foreign one.
    """
    layout = read_layout(folder)
    for path in files(folder):
        try:
            arrays, about = read_segment(path, partial(_check_segment, layout))
        except SegmentError as error:
            raise ValueError(str(error)) from error
        if about.get("kind") != KIND:
            raise ValueError(f"{path}: a segment, but not of recorded experience")
        _check_numbers(path, arrays, layout)
        yield path, arrays, about


def _check_segment(layout: Layout, found: Mapping[str, ArraySpec]) -> None:
    """Raises ValueError unless a segment's arrays, none of them read yet, are as promised."""
    blocks, episodes = (_length(found, name) for name in ("lane", "episode/lane"))
    wanted = dict.fromkeys(("lane", "chain"), ((blocks,), "int32"))
    wanted |= dict.fromkeys(("number", "weights_version"), ((blocks,), "int64"))
    kinds = ("float64", "int64", "int32")
    wanted |= {n: ((episodes,), kind) for n, kind in zip(EPISODES, kinds, strict=True)}
    for name, (shape, dtype) in layout.leaves.items():
        rows = (layout.block_rows,) if name.startswith("rows/") else ()
        wanted[name] = ((blocks, *rows, *shape), dtype)
        if name.startswith(INPUTS):
            wanted[f"next/{name.removeprefix(INPUTS)}"] = ((blocks, *shape), dtype)
    for name, (shape, dtype) in wanted.items():
        if name not in found:
            raise ValueError(f"has no {name}, which {FILE} promises")
        if (found[name].shape, found[name].dtype) != (shape, dtype):
            has = f"{found[name].dtype}{list(found[name].shape)}"
            raise ValueError(f"{name} is {has}, not {dtype}{list(shape)} as {FILE} promises")


def _length(found: Mapping[str, ArraySpec], name: str) -> int:
    return next(iter(found[name].shape), 0) if name in found else 0


def _check_numbers(path: Path, arrays: Mapping[str, np.ndarray], layout: Layout) -> None:
    lane = arrays["lane"]
    if lane.size and not (0 <= lane.min() <= lane.max() < layout.lanes):
        raise ValueError(f"{path}: damaged: a lane is none of 0 .. {layout.lanes - 1}")
    if any(arrays[name].min(initial=0) < 0 for name in ("chain", "number")):
        raise ValueError(f"{path}: damaged: a chain or a block has a negative number")
    if arrays["chain"].max(initial=0) >= 1 << 30:  # chains go on rising from run to run
        raise ValueError(f"{path}: damaged: a chain has the number {arrays['chain'].max()}")


def rollouts(folder: Path, row_spec: Row, carry_spec: Carry) -> Iterator[Rollout]:
    """The recorded blocks as they came, with chains that go on rising from run to run."""
    run, first_chain, newest = "", 0, -1
    for path, arrays, _ in read(folder):
        if run != (run := path.name.partition("-")[0]):
            first_chain = newest + 1
        chain = arrays["chain"] + np.int32(first_chain)
        newest = max(newest, int(chain.max(initial=newest)))
        yield Rollout(
            rows=trees.unflatten(row_spec, _below(arrays, "rows/")),
            carry=trees.unflatten(carry_spec, _below(arrays, "carry/")),
            next=trees.unflatten(row_spec.inputs, _below(arrays, "next/")),
            lane=arrays["lane"],
            chain=chain,
            number=arrays["number"],
            weights_version=arrays["weights_version"],
            episodes=(),
            env_steps=int(np.count_nonzero(arrays["rows/valid"])),
            frames=0,
            timings={},
        )


def _below(arrays: Mapping[str, np.ndarray], name: str) -> Leaves:
    return {path.removeprefix(name): x for path, x in arrays.items() if path.startswith(name)}
