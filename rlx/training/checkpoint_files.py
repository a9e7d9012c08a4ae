"""The files of one checkpoint: written and forced to the disk, checked and read.

`rlx.training.checkpoint` lists them. No pickle is ever read. The training state is the matter of
`rlx.training.checkpoint_state`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlx.config.documents import read_json
from rlx.problems import first_line
from rlx.replay.files.segments import SegmentError, check_segment
from rlx.replay.files.snapshots import read_blocks
from rlx.runs.folders import is_number
from rlx.training.checkpoint_state import (
    LEAVES,
    STATE,
    CheckpointError,
    Damaged,
    read_object,
    read_state,
    write_state,
    write_text,
)
from rlx.types import Blocks

log = logging.getLogger(__name__)

JSON = dict[str, Any]
BEST = "best-"  # begins the name of the folder with the best score
DISCARDED = "discarded"
SEGMENTS = "segments"
SEGMENT_KEYS = {"file", "nbytes", "last_key"}  # and "ring", where a replay has several
FORMAT, FORMATS = 3, (2, 3)  # that is written, that are read
MAP_BYTES = 1 << 20  # arrays from this size on are mapped, not read, when restored


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
        write_text(folder / "replay.json", json.dumps(tree, default=_plain))
    _check_keys(meta, "meta")
    write_text(folder / "meta.json", json.dumps(meta, default=_plain))
    write_state(folder, state)
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
    write_text(folder / "manifest.json", json.dumps(manifest, indent=1))
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


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise CheckpointError(f"{type(value).__name__} {value!r:.60}: no JSON value; convert it first.")


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
        manifest = read_json(path)
        body = manifest["body"]
        whole = manifest["sha256"] == _body_sha256(body)
        if whole and body["format"] not in FORMATS:
            says = f"{folder}: format {body['format']}, this rlx reads {FORMATS};"
            raise CheckpointError(f"{says} use the rlx it is from.")
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole or not _is_manifest(body):
        raise Damaged(f"{path}: missing or damaged.")
    name = folder.name.removeprefix(BEST)
    if is_number(name) and int(name) != body["env_steps"]:
        raise Damaged(f"{path}: it is of env step {body['env_steps']}, as its folder is not.")
    return body


def _is_manifest(body: JSON) -> bool:
    """Says whether all is of the kind that is written: anybody can compute a sum."""
    files, segments, score = (body.get(name) for name in ("files", "segments", "score"))
    needed = {LEAVES, "meta.json"} | ({STATE} if body["format"] == FORMAT else set())
    return (
        type(body.get("env_steps")) is int
        and (score is None or isinstance(score, float))
        and isinstance(files, dict)
        and isinstance(segments, list)
        and all(isinstance(about, dict) and "bytes" in about for about in files.values())
        and all(isinstance(about, dict) and _is_segment(about) for about in segments)
        and needed <= files.keys()
    )


def _is_segment(about: JSON) -> bool:
    """Says whether it names a file of the segments' folder and says what is in it."""
    file = about.get("file")
    counts = [about.get(name, 0) for name in ("nbytes", "last_key", "ring")]
    return (
        isinstance(file, str)
        and Path(file).name == file
        and SEGMENT_KEYS <= about.keys() <= SEGMENT_KEYS | {"ring"}
        and all(type(count) is int for count in counts)
    )


def verify(folder: Path, with_replay: bool) -> JSON:
    """The manifest, after every file that will be read was compared with it."""
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        path = folder / name
        if name.startswith("replay") and not with_replay:
            continue
        if not path.is_file():
            raise Damaged(f"{path}: missing, or no ordinary file.")
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
    state = read_state(folder, like_state, has_segment=STATE in manifest["files"])
    meta = read_object(folder / "meta.json")
    if with_replay and "replay.json" in manifest["files"]:
        replay_state = _read_arrays(folder, read_object(folder / "replay.json"), manifest["files"])
    return Restored(
        state=state,
        meta=meta,
        replay_state=replay_state,
        segments=manifest["segments"] if with_replay else [],
        path=folder,
        env_steps=manifest["env_steps"],
    )


def _read_arrays(folder: Path, value: Any, files: JSON) -> Any:
    if isinstance(value, list):
        return [_read_arrays(folder, child, files) for child in value]
    if not isinstance(value, dict):
        return value
    if "__array__" not in value:
        return {key: _read_arrays(folder, child, files) for key, child in value.items()}
    name = value["__array__"]
    if not isinstance(name, str) or name not in files:
        raise Damaged(f"{folder / 'replay.json'}: damaged: it names an array that is not saved.")
    try:
        return _read_array(folder / name, value.get("dtype"))
    except (OSError, ValueError, TypeError, EOFError, MemoryError) as error:
        raise Damaged(f"{folder / name}: cannot be read ({first_line(error)}).") from error


def _read_array(path: Path, dtype: str | None) -> np.ndarray:
    # Mapped, so that restoring a replay of 28 GB does not hold it twice; mode "c": who writes
    # into the array changes his own copy, never the file.
    mapped = path.stat().st_size >= MAP_BYTES
    array = np.asarray(np.load(path, mmap_mode="c" if mapped else None, allow_pickle=False))
    if dtype:
        import ml_dtypes  # noqa: F401  registers the names of bfloat16 and its like

        array = array.view(np.dtype(dtype))
    return array
