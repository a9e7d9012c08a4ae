"""The training state in a checkpoint: written by orbax as host arrays, and read by it.

    state/          orbax's own files
    leaves.json     path -> dtype, shape and key kind of every leaf of the state

orbax and JAX are imported when they are needed, so that importing this module is cheap.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rlx import trees
from rlx.config.documents import read_json
from rlx.problems import RunFailed, cut, first_line

JSON = dict[str, Any]
STATE, LEAVES = "state", "leaves.json"
ADDED = {"gradient_steps": "updates"}  # leaves that older checkpoints lack: equal to these then
LEAF_KEYS = {"dtype", "shape", "key"}
ROOM_BYTES = 256 << 10  # that orbax takes for its tables
SHOWN = 5  # differing leaves named in an error


class CheckpointError(RunFailed):
    """A checkpoint cannot be written or restored; says which, why and what to do."""


class Damaged(CheckpointError):
    """The checkpoint's files are not those that were written; another one may be whole."""


# --- writing -------------------------------------------------------------------------------------


def write_state(folder: Path, state: Any) -> None:
    import jax

    arrays: dict[str, np.ndarray] = {}
    leaves: dict[str, JSON] = {}
    for path, leaf in _flatten(state)[0].items():
        kind = str(jax.random.key_impl(leaf)) if _is_key(leaf) else None
        leaves[path] = _describe(leaf) | {"key": kind}
        arrays[path] = np.asarray(jax.random.key_data(leaf) if kind else leaf)
    write_text(folder / LEAVES, json.dumps(leaves, indent=1))
    # orbax refuses arrays without elements; leaves.json says all there is to know of them.
    if some := {k: v for k, v in arrays.items() if v.size}:
        _check_room(folder, sum(v.nbytes for v in some.values()))
        with _orbax(folder, "written") as (orbax, place):
            orbax.save(place, some)
        _check_written(folder, some)


def _check_room(folder: Path, nbytes: int) -> None:
    """Raises OSError where so much cannot be written, which orbax says in hundreds of lines."""
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, nbytes + ROOM_BYTES)


def _check_written(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Raises CheckpointError unless the state can be read and is that which was written."""
    found = _read_orbax(folder, [*arrays])
    for name, array in arrays.items():
        if found[name].tobytes() != array.tobytes():
            raise CheckpointError(f"{folder / STATE}: {name} is read as another than was written.")


@contextlib.contextmanager
def _orbax(folder: Path, done: str) -> Iterator[tuple[Any, Path]]:
    """An orbax checkpointer and the path of the state in a checkpoint's folder.

    The checkpointer waits for its files and keeps its log lines to itself. Whatever it raises
    becomes Damaged: the state cannot be `done`. orbax takes a path for a pattern, in which brackets
    mean something: the path that it gets is made of the folder's descriptor.
    """
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.WARNING)
    handle = os.open(folder, os.O_RDONLY)
    try:
        import orbax.checkpoint as ocp

        options = _alone()
        handler = ocp.PyTreeCheckpointHandler(
            use_ocdbt=True, use_zarr3=True, multiprocessing_options=options
        )
        with ocp.Checkpointer(handler, multiprocessing_options=options) as checkpointer:
            yield checkpointer, Path(f"/proc/self/fd/{handle}") / STATE
    except Exception as error:
        why = first_line(error).replace(f"/proc/self/fd/{handle}", str(folder))
        raise Damaged(f"{folder / STATE}: cannot be {done} ({cut(why)}).") from error
    finally:
        os.close(handle)
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


def write_text(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8")


# --- reading -------------------------------------------------------------------------------------


def read_object(path: Path) -> JSON:
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise Damaged(f"{path}: cannot be read ({first_line(error)}).") from error
    if not isinstance(found, dict):
        raise Damaged(f"{path}: damaged: it holds no JSON object.")
    return found


def read_state(folder: Path, like_state: Any) -> Any:
    import jax

    saved = read_object(folder / LEAVES)
    if not all(isinstance(about, dict) and about.keys() >= LEAF_KEYS for about in saved.values()):
        raise Damaged(f"{folder / LEAVES}: damaged: a leaf is not described.")
    expected, rebuild = _flatten(like_state)
    same_as = {path: old for path, old in ADDED.items() if path in expected and path not in saved}
    saved |= {path: saved[old] for path, old in same_as.items() if old in saved}
    _compare(folder, saved, {path: _describe(leaf) for path, leaf in expected.items()})
    there = [k for k, leaf in saved.items() if _size(leaf) and k not in same_as]
    stored = _read_orbax(folder, there)
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
    with _orbax(folder, "read") as (orbax, path):
        import orbax.checkpoint as ocp

        as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
        return orbax.restore(path, restore_args=as_numpy)


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
