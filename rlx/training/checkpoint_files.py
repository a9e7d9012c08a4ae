"""The files of one checkpoint: written and forced to the disk, checked and read.

`rlx.training.checkpoint` lists them. No pickle is ever read. orbax and JAX are imported when they
are needed, so that importing this module is cheap.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlx import trees
from rlx.replay.files.segments import SegmentError, check_segment
from rlx.replay.files.snapshots import read_blocks
from rlx.types import Blocks

log = logging.getLogger(__name__)

JSON = dict[str, Any]
DISCARDED = "discarded"
SEGMENTS = "segments"
FORMAT = 2
MAP_BYTES = 1 << 20  # arrays from this size on are mapped, not read, when restored
ADDED = {"gradient_steps": "updates"}  # leaves that older checkpoints lack: equal to these then
SHOWN = 5  # differing leaves named in an error


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or restored; says which, why and what to do."""


class Damaged(CheckpointError):
    """The checkpoint's files are not those that were written; another one may be whole."""


@dataclass(frozen=True, kw_only=True)
class Restored:
    """A checkpoint gives back this record."""

    state: Any  # the tree of `like_state`: NumPy arrays; typed PRNG keys are JAX key arrays
    meta: JSON
    replay_state: JSON | None  # None: the checkpoint has none, or it was not asked for
    segments: list[JSON]  # of the replay's blocks (rlx.replay.files.snapshots)
    path: Path
    env_steps: int

    def replay_blocks(self) -> list[Iterator[Blocks]]:
        """The blocks of each of the replay's rings, a few at a time."""
        return read_blocks(segments_folder(self.path), self.segments)


def segments_folder(checkpoint: Path) -> Path:
    """Names the folder that holds the blocks of this checkpoint's replay."""
    above = checkpoint.parent
    return (above.parent if above.name == DISCARDED else above) / SEGMENTS


# --- writing -------------------------------------------------------------------------------------


class _Hashing:
    """A binary file that knows the size and the sha256 of what went through it."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._digest = hashlib.sha256()
        self._bytes = 0

    def write(self, data: Any) -> int:
        self._digest.update(data)
        self._bytes += memoryview(data).nbytes
        return self._file.write(data)

    def close(self) -> JSON:
        self._file.close()
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}


def write_all(
    folder: Path,
    env_steps: int,
    state: Any,
    meta: Mapping[str, Any],
    replay_state: Mapping[str, Any] | None,
    segments: Sequence[Mapping[str, Any]],
    score: float | None,
) -> None:
    files: dict[str, JSON] = {}
    if replay_state is not None:
        (folder / "replay").mkdir()
        _check_keys(replay_state, "replay_state")
        tree = _write_arrays(folder, replay_state, "replay_state", files)
        _write_text(folder / "replay.json", json.dumps(tree, default=_plain))
    _check_keys(meta, "meta")
    _write_text(folder / "meta.json", json.dumps(meta, default=_plain))
    _write_state(folder, state)
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        if name not in files:
            files[name] = _fingerprint(path)
    score = None if score is None or not np.isfinite(score) else float(score)
    body = {
        "format": FORMAT,
        "env_steps": int(env_steps),
        "score": score,
        "files": files,
        "segments": [dict(segment) for segment in segments],
    }
    manifest = {"sha256": _body_sha256(body), "body": body}
    _write_text(folder / "manifest.json", json.dumps(manifest, indent=1))
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def _write_arrays(folder: Path, value: Any, name: str, files: dict[str, JSON]) -> Any:
    """The same tree with a reference in place of each array, which is written to a file.

    An array is streamed in pieces of 16 MiB: a replay of 28 GB is saved beside little else.
    """
    if isinstance(value, Mapping):
        if "__array__" in value:
            raise CheckpointError(f"{name}: the key '__array__' is taken; choose another.")
        return {k: _write_arrays(folder, v, f"{name}/{k}", files) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_write_arrays(folder, v, f"{name}/{i}", files) for i, v in enumerate(value)]
    if not isinstance(value, np.ndarray):
        return value
    if value.dtype.hasobject:
        raise CheckpointError(f"{name}: an array of Python objects; give numbers, or a JSON list.")
    path = f"replay/{len(files):04d}.npy"
    file = _Hashing(folder / path)
    np.lib.format.write_array(file, value, allow_pickle=False)
    files[path] = file.close()
    return {"__array__": path, "dtype": _dtype_name(value.dtype)}


def _check_keys(value: Any, name: str) -> None:
    """JSON would turn the key 3 into "3" in silence."""
    if isinstance(value, Mapping):
        for key, child in value.items():
            if not isinstance(key, str):
                raise CheckpointError(f"{name}: key {key!r} must be a string; use a list of pairs.")
            _check_keys(child, f"{name}/{key}")
    elif isinstance(value, list | tuple):
        for i, child in enumerate(value):
            _check_keys(child, f"{name}/{i}")


def _dtype_name(dtype: np.dtype[Any]) -> str | None:
    """bfloat16 and its like, which .npy files store as nameless bytes; None for all others."""
    return dtype.name if dtype.kind == "V" and dtype.names is None else None


def _write_state(folder: Path, state: Any) -> None:
    import jax

    arrays: dict[str, np.ndarray] = {}
    leaves: dict[str, JSON] = {}
    for path, leaf in _flatten(state)[0].items():
        kind = str(jax.random.key_impl(leaf)) if _is_key(leaf) else None
        leaves[path] = _describe(leaf) | {"key": kind}
        arrays[path] = np.asarray(jax.random.key_data(leaf) if kind else leaf)
    _write_text(folder / "leaves.json", json.dumps(leaves, indent=1))
    # orbax refuses arrays without elements; leaves.json says all there is to know of them.
    if some := {k: v for k, v in arrays.items() if v.size}:
        with _orbax() as orbax:
            orbax.save(folder / "state", some)


@contextlib.contextmanager
def _orbax() -> Iterator[Any]:
    """An orbax checkpointer that waits for its files and keeps its log lines to itself."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        import orbax.checkpoint as ocp

        options = _alone()
        handler = ocp.PyTreeCheckpointHandler(
            use_ocdbt=True, use_zarr3=True, multiprocessing_options=options
        )
        with ocp.Checkpointer(handler, multiprocessing_options=options) as checkpointer:
            yield checkpointer
    finally:
        logger.setLevel(level)


def _alone() -> Any:
    """One of several learner processes by itself; orbax would wait for the others to join in.

    Only the first one can write.
    """
    import jax
    from orbax.checkpoint.options import MultiprocessingOptions

    own = jax.process_index()
    return MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process-{own}"
    )


def _flatten(state: Any) -> tuple[dict[str, Any], Callable[[list[Any]], Any]]:
    """The leaves by path, and the function that makes the tree of new leaves."""
    import jax

    trees.register()
    pairs, structure = jax.tree_util.tree_flatten_with_path(state)
    leaves = {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in pairs}
    if len(leaves) != len(pairs):
        raise CheckpointError("two leaves of the state have one path; rename one ('/' in a name?).")
    return leaves, functools.partial(jax.tree_util.tree_unflatten, structure)


def _is_key(leaf: Any) -> bool:
    import jax

    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _describe(leaf: Any) -> JSON:
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return {"dtype": str(leaf.dtype), "shape": list(leaf.shape)}


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise CheckpointError(f"{type(value).__name__} {value!r:.60}: no JSON value; convert it first.")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8")


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _fingerprint(path: Path) -> JSON:
    with path.open("rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def _body_sha256(body: JSON) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- reading -------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> JSON:
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
        body = manifest["body"]
        whole = manifest["sha256"] == _body_sha256(body)
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise Damaged(f"{path}: missing or damaged.")
    if body["format"] != FORMAT:
        raise CheckpointError(
            f"{folder}: format {body['format']}, this rlx reads {FORMAT}; use the rlx it is from."
        )
    return body


def verify(folder: Path, with_replay: bool) -> JSON:
    """The manifest, after every file that will be read was compared with it."""
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        path = folder / name
        if name.startswith("replay") and not with_replay:
            continue
        if not path.is_file():
            raise Damaged(f"{path}: missing.")
        if path.stat().st_size != expected["bytes"]:
            raise Damaged(
                f"{path}: damaged: {path.stat().st_size} bytes, {expected['bytes']} were written."
            )
        if _fingerprint(path) != expected:
            raise Damaged(f"{path}: damaged: its sha256 is not that of what was written.")
    for segment in manifest["segments"] if with_replay else ():
        try:
            check_segment(segments_folder(folder) / segment["file"], segment["nbytes"])
        except SegmentError as error:
            raise Damaged(str(error)) from error
    return manifest


def read_all(folder: Path, manifest: JSON, like_state: Any, with_replay: bool) -> Restored:
    replay_state = None
    state = _read_state(folder, like_state)
    if with_replay and "replay.json" in manifest["files"]:
        replay_state = _read_arrays(folder, json.loads((folder / "replay.json").read_bytes()))
    return Restored(
        state=state,
        meta=json.loads((folder / "meta.json").read_bytes()),
        replay_state=replay_state,
        segments=manifest["segments"] if with_replay else [],
        path=folder,
        env_steps=manifest["env_steps"],
    )


def _read_state(folder: Path, like_state: Any) -> Any:
    import jax

    saved = json.loads((folder / "leaves.json").read_bytes())
    expected, rebuild = _flatten(like_state)
    same_as = {path: old for path, old in ADDED.items() if path in expected and path not in saved}
    saved |= {path: saved[old] for path, old in same_as.items() if old in saved}
    _compare(folder, saved, {path: _describe(leaf) for path, leaf in expected.items()})
    there = [k for k, leaf in saved.items() if _size(leaf) and k not in same_as]
    stored = _read_orbax(folder / "state", there)
    stored |= {path: stored[old] for path, old in same_as.items()}
    leaves = []
    for path in expected:
        about = saved[path]
        leaf: Any = stored.get(path)
        if leaf is None:
            leaf = np.zeros(about["shape"], about["dtype"])
        if about["key"]:
            leaf = jax.random.wrap_key_data(jax.numpy.asarray(leaf), impl=about["key"])
        leaves.append(leaf)
    return rebuild(leaves)


def _read_orbax(folder: Path, names: list[str]) -> dict[str, np.ndarray]:
    if not names:
        return {}
    # Read as host arrays: how many devices wrote them does not matter.
    with _orbax() as orbax:
        import orbax.checkpoint as ocp

        as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
        return orbax.restore(folder, restore_args=as_numpy)


def _size(leaf: JSON) -> int:
    return int(np.prod(leaf["shape"], dtype=np.int64))


def _compare(folder: Path, saved: dict[str, JSON], expected: dict[str, JSON]) -> None:
    """Raises where the saved leaves are not those that the run expects."""
    differing = [
        f"{path} is {_described(saved.get(path))}, expected {_described(expected.get(path))}"
        for path in [*expected, *(path for path in saved if path not in expected)]
        if _described(saved.get(path)) != _described(expected.get(path))
    ]
    if differing:
        more = f"; and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
        raise CheckpointError(
            f"{folder}: its run had another network, agent or optimiser: "
            f"{'; '.join(differing[:SHOWN])}{more}. Resume with the config saved in that run."
        )


def _described(leaf: JSON | None) -> str:
    return f"{leaf['dtype']}{leaf['shape']}" if leaf else "missing"


def _read_arrays(folder: Path, value: Any) -> Any:
    if isinstance(value, list):
        return [_read_arrays(folder, child) for child in value]
    if not isinstance(value, dict):
        return value
    if "__array__" not in value:
        return {key: _read_arrays(folder, child) for key, child in value.items()}
    path = folder / value["__array__"]
    # Mapped, so that restoring a replay of 28 GB does not hold it twice; mode "c": who writes
    # into the array changes his own copy, never the file.
    mapped = path.stat().st_size >= MAP_BYTES
    array = np.asarray(np.load(path, mmap_mode="c" if mapped else None, allow_pickle=False))
    if value["dtype"]:
        import ml_dtypes  # noqa: F401  registers the names of bfloat16 and its like

        array = array.view(np.dtype(value["dtype"]))
    return array
