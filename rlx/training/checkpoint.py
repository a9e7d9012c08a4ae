"""Checkpoints: a folder per checkpoint, in place as a whole or not at all, checked when read.

    <run>/checkpoints/000000050000/     named after its env steps
        state/          the training state, written by orbax as host arrays
        leaves.json     path -> dtype, shape and key kind of every leaf of the state
        meta.json       the run's counters, generators and metrics, as given
        replay.json     the replay's tables; their arrays lie in replay/*.npy
        manifest.json   size and sha256 of every file above, and the segments; written last
    <run>/checkpoints/segments/         the replay's blocks, which checkpoints share
    <run>/checkpoints/best.json         names the checkpoint with the best score
    <run>/checkpoints/discarded/        checkpoints that the run went back behind

All is written to a temporary folder, forced to the disk and renamed. No pickle is ever read.
orbax and JAX are imported when they are needed, so that importing this module is cheap.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from rlx import trees
from rlx.problems import Problem
from rlx.replay.files.segments import SegmentError, check_segment
from rlx.replay.files.snapshots import read_blocks
from rlx.runs.files import write_json
from rlx.training.agreement import takes_turns
from rlx.types import AloneOnly, Blocks, Range

log = logging.getLogger(__name__)

JSON = dict[str, Any]

FOLDER = "checkpoints"
DISCARDED = "discarded"
BEST_FILE = "best.json"
SEGMENTS = "segments"
FORMAT = 2
MAP_BYTES = 1 << 20  # arrays from this size on are mapped, not read, when restored
ADDED = {"gradient_steps": "updates"}  # leaves that older checkpoints lack: equal to these then
SHOWN = 5  # differing leaves named in an error

_TEMPORARY = ".tmp-"
_ASIDE = ".old-"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or restored; says which, why and what to do."""


class _Damaged(CheckpointError):
    """The checkpoint's files are not those that were written; another one may be whole."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """When a run is saved and what of it (conf/checkpoint)."""

    every_env_steps: Annotated[int, Range(ge=1)]
    keep: Annotated[int, Range(ge=1)]
    replay: bool
    exact: Annotated[bool, AloneOnly()]

    @staticmethod
    def clashes(settings: JSON) -> list[Problem]:
        """The same bits need that nothing happens beside the loop, and that all is saved."""
        checkpoint, prefetch = settings["checkpoint"], settings["replay"].get("prefetch")
        if not checkpoint["exact"]:
            return []
        if not (takes_turns(settings) and checkpoint["replay"]):
            says = "the same bits need acting=local and checkpoint.replay=true; set both"
            return [Problem(path="checkpoint.exact", given="true", says=says)]
        if prefetch:
            says = "a thread draws when it can, which is never the same twice; set it to 0"
            return [Problem(path="replay.prefetch", given=str(prefetch), says=says)]
        return []


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What a checkpoint gives back."""

    state: Any  # the tree of `like_state`: NumPy arrays; typed PRNG keys are JAX key arrays
    meta: JSON
    replay_state: JSON | None  # None: the checkpoint has none, or it was not asked for
    segments: list[JSON]  # of the replay's blocks (rlx.replay.files.snapshots)
    path: Path
    env_steps: int

    def replay_blocks(self) -> list[Iterator[Blocks]]:
        """The blocks of each of the replay's rings, a few at a time."""
        return read_blocks(_segments_folder(self.path), self.segments)


class Checkpointer:
    """Saves and restores the checkpoints of one run."""

    def __init__(self, folder: Path | str, settings: Checkpoint | None) -> None:
        """folder: the run's. settings: None only reads, and changes nothing in the folder.

        A writer clears away what a killed save has left.
        """
        self.run = Path(folder).absolute()
        self.folder = self.run / FOLDER
        self._settings = settings
        if settings is not None:
            self._clear_leftovers()

    def save(
        self,
        env_steps: int,
        *,
        state: Any,
        meta: Mapping[str, Any],
        replay_state: Mapping[str, Any] | None = None,
        segments: Sequence[Mapping[str, Any]] = (),
        score: float | None = None,
    ) -> Path:
        """Writes one checkpoint, deletes those that are no longer kept, returns its folder.

        state: a tree of host or device arrays, PRNG keys among them. replay_state: nested dicts
        of arrays and JSON values (tuples come back as lists). segments: the files that hold the
        replay's blocks, of a Snapshots in `segments_folder`. score: the higher, the better.
        """
        settings = self._settings
        if settings is None:
            raise CheckpointError(f"{self.run}: opened for reading; give settings to save.")
        name = _name(env_steps)
        temporary = self.folder / f"{_TEMPORARY}{name}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            _write_all(temporary, env_steps, state, meta, replay_state, segments, score)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._discard_later(name)
        self._put_in_place(temporary, name)
        self._keep(settings.keep)
        return self.folder / name

    def restore(
        self, like_state: Any, which: str | Path = "latest", *, with_replay: bool = True
    ) -> Restored:
        """Reads a checkpoint: "latest", "best", or the folder of one.

        like_state: arrays or ShapeDtypeStructs of the expected structure, shapes and dtypes.
        A damaged checkpoint is passed over for the newest whole one, with a warning; one that
        was named by its folder is an error. with_replay=False leaves the replay unread.
        """
        candidates = self._candidates(which)
        for path in candidates:
            try:
                manifest = _verify(path, with_replay)
            except _Damaged as damage:
                if path == candidates[-1]:
                    raise CheckpointError(f"{damage} No other checkpoint is left.") from damage
                log.warning("%s Trying another checkpoint.", damage)
                continue
            return _read_all(path, manifest, like_state, with_replay)
        raise AssertionError("unreachable: candidates are never empty")

    @property
    def segments_folder(self) -> Path:
        """Where the blocks of saved replays lie."""
        return self.folder / SEGMENTS

    def segments_kept(self) -> set[str] | None:
        """The segments that any checkpoint needs, discarded ones too; None if one can't be read."""
        aside = self.folder / DISCARDED
        paths = [*self.paths(), *(aside.iterdir() if aside.is_dir() else ())]
        kept: set[str] = set()
        try:
            for path in paths:
                kept.update(segment["file"] for segment in _read_manifest(path)["segments"])
        except _Damaged:
            return None
        return kept

    def paths(self) -> list[Path]:
        """The folders of all checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(p for p in self.folder.iterdir() if p.name.isdigit() and p.is_dir())

    def best(self) -> Path | None:
        """The checkpoint with the best score; None: no checkpoint has a score."""
        try:
            name = json.loads((self.folder / BEST_FILE).read_text())["checkpoint"]
        except (OSError, ValueError, KeyError, TypeError):
            return _best(self.paths())
        return self.folder / name

    def _candidates(self, which: str | Path) -> list[Path]:
        if which not in ("latest", "best"):
            path = Path(which).absolute()
            if not (path / "manifest.json").is_file():
                raise CheckpointError(
                    f"{path}: no checkpoint: it has no manifest.json; give 'latest', 'best' or a "
                    f"folder such as <run>/{FOLDER}/{_name(50_000)}."
                )
            return [path]
        newest_first = self.paths()[::-1]
        if not newest_first:
            raise CheckpointError(
                f"{self.run}: no checkpoint of a run is there ({FOLDER}/ is missing or empty); "
                "give the folder of a run that has saved one."
            )
        best = self.best() if which == "best" else None
        if which == "best" and best is None:
            log.warning("%s: no checkpoint has a score; taking the latest.", self.run)
        return newest_first if best is None else [best, *(p for p in newest_first if p != best)]

    def _clear_leftovers(self) -> None:
        if not self.folder.is_dir():
            return
        for path in list(self.folder.iterdir()):
            if path.name.startswith(_ASIDE):
                # A kill came between the two renames of `_put_in_place`.
                place = self.folder / path.name.removeprefix(_ASIDE)
                if not place.exists():
                    path.rename(place)
                    continue
            if path.is_file() and path.name.startswith("."):  # of write_json
                path.unlink()
            elif path.name.startswith((_TEMPORARY, _ASIDE)):
                shutil.rmtree(path, ignore_errors=True)

    def _put_in_place(self, temporary: Path, name: str) -> None:
        place, aside = self.folder / name, self.folder / f"{_ASIDE}{name}"
        if place.exists():  # the run came to this env step before
            place.rename(aside)
        temporary.rename(place)
        _sync(self.folder)
        shutil.rmtree(aside, ignore_errors=True)

    def _discard_later(self, name: str) -> None:
        """Sets aside what a run that went back to an earlier checkpoint had saved after it.

        They are another history: as the "latest" they would win over this one.
        """
        for path in self.paths():
            if path.name > name:
                place = self.folder / DISCARDED / path.name
                place.parent.mkdir(exist_ok=True)
                shutil.rmtree(place, ignore_errors=True)
                path.rename(place)
                log.warning("%s: later than env step %d; moved to %s.", path, int(name), place)

    def _keep(self, last: int) -> None:
        paths = self.paths()
        best = _best(paths)
        if best is not None:
            about = {"checkpoint": best.name, "score": _score(best)}
            write_json(self.folder / BEST_FILE, about | {"env_steps": int(best.name)})
        else:
            (self.folder / BEST_FILE).unlink(missing_ok=True)
        for path in paths[:-last]:
            if path != best:
                # Renamed first: a kill leaves no half checkpoint under a checkpoint's name.
                shutil.rmtree(path.rename(self.folder / f"{_TEMPORARY}{path.name}"))


def _name(env_steps: int) -> str:
    if env_steps < 0:
        raise CheckpointError(f"env_steps={env_steps}: must be 0 or more.")
    return f"{env_steps:012d}"


def _segments_folder(checkpoint: Path) -> Path:
    """Where the blocks of this checkpoint's replay lie."""
    above = checkpoint.parent
    return (above.parent if above.name == DISCARDED else above) / SEGMENTS


def _score(path: Path) -> float | None:
    try:
        return _read_manifest(path)["score"]
    except _Damaged:
        return None


def _best(paths: list[Path]) -> Path | None:
    scored = [(score, path) for path in paths if (score := _score(path)) is not None]
    return max(scored)[1] if scored else None


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


def _write_all(
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
        _sync(path)


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


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- reading -------------------------------------------------------------------------------------


def _read_manifest(folder: Path) -> JSON:
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
        body = manifest["body"]
        whole = manifest["sha256"] == _body_sha256(body)
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise _Damaged(f"{path}: missing or damaged.")
    if body["format"] != FORMAT:
        raise CheckpointError(
            f"{folder}: format {body['format']}, this rlx reads {FORMAT}; use the rlx it is from."
        )
    return body


def _verify(folder: Path, with_replay: bool) -> JSON:
    """The manifest, after every file that will be read was compared with it."""
    manifest = _read_manifest(folder)
    for name, expected in manifest["files"].items():
        path = folder / name
        if name.startswith("replay") and not with_replay:
            continue
        if not path.is_file():
            raise _Damaged(f"{path}: missing.")
        if path.stat().st_size != expected["bytes"]:
            raise _Damaged(
                f"{path}: damaged: {path.stat().st_size} bytes, {expected['bytes']} were written."
            )
        if _fingerprint(path) != expected:
            raise _Damaged(f"{path}: damaged: its sha256 is not that of what was written.")
    for segment in manifest["segments"] if with_replay else ():
        try:
            check_segment(_segments_folder(folder) / segment["file"], segment["nbytes"])
        except SegmentError as error:
            raise _Damaged(str(error)) from error
    return manifest


def _read_all(folder: Path, manifest: JSON, like_state: Any, with_replay: bool) -> Restored:
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
