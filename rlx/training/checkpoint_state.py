"""The training state in a checkpoint, as host arrays.

    state.npz       every leaf that has elements, by its path, as NumPy stores it
    state/          the same, written by orbax, in checkpoints of format 2; these are only read
    leaves.json     path -> dtype, shape and key kind of every leaf of the state

JAX and orbax are imported when they are needed, so that importing this module is cheap.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rlx import trees
from rlx.config.documents import read_json
from rlx.problems import RunFailed, cut, first_line

JSON = dict[str, Any]
STATE, LEAVES = "state.npz", "leaves.json"
FORMER = "state"  # orbax's folder
ADDED = {"gradient_steps": "updates"}  # leaves that older checkpoints lack: equal to these then
LEAF_KEYS = {"dtype", "shape", "key"}
SHOWN = 5  # differing leaves named in an error


class CheckpointError(RunFailed):
    """A checkpoint cannot be written or restored; says which, why and what to do."""


class Damaged(CheckpointError):
    """The checkpoint's files are not those that were written; another one may be whole."""


# --- writing -------------------------------------------------------------------------------------


def write_state(folder: Path, state: Any) -> None:
    """Writes the state's files and reads them back; raises CheckpointError if that fails."""
    import jax

    arrays: dict[str, np.ndarray] = {}
    leaves: dict[str, JSON] = {}
    for path, leaf in _flatten(state)[0].items():
        kind = str(jax.random.key_impl(leaf)) if _is_key(leaf) else None
        leaves[path] = _describe(leaf) | {"key": kind}
        if _size(leaves[path]):
            arrays[path] = np.asarray(jax.random.key_data(leaf) if kind else leaf)
    write_text(folder / LEAVES, json.dumps(leaves, indent=1))
    np.savez(folder / STATE, allow_pickle=False, **arrays)
    found = _read_arrays(folder, [*arrays])
    for name, array in arrays.items():
        if found[name].tobytes() != array.tobytes():
            raise CheckpointError(f"{folder / STATE}: {name} is read as another than was written.")


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

    saved = read_object(folder / LEAVES)
    if not all(isinstance(about, dict) and about.keys() >= LEAF_KEYS for about in saved.values()):
        raise Damaged(f"{folder / LEAVES}: damaged: a leaf is not described.")
    expected, rebuild = _flatten(like_state)
    same_as = {path: old for path, old in ADDED.items() if path in expected and path not in saved}
    saved |= {path: saved[old] for path, old in same_as.items() if old in saved}
    _compare(folder, saved, {path: _describe(leaf) for path, leaf in expected.items()})
    there = [path for path, leaf in saved.items() if _size(leaf) and path not in same_as]
    read = _read_orbax if (folder / FORMER).is_dir() else _read_arrays
    stored = read(folder, there)
    stored |= {path: stored[old] for path, old in same_as.items()}
    return rebuild([_leaf(folder, path, saved[path], stored.get(path)) for path in expected])


def _leaf(folder: Path, path: str, about: JSON, array: np.ndarray | None) -> Any:
    """The leaf that was saved: bfloat16 and its like, which .npz has as nameless bytes, and keys.

    array: None of a leaf without elements.
    """
    import jax

    if array is None:
        array = np.zeros(about["shape"], None if about["key"] else about["dtype"])
    if about["key"]:
        return jax.random.wrap_key_data(jax.numpy.asarray(array), impl=about["key"])
    if array.dtype.kind == "V":
        array = array.view(jax.numpy.dtype(about["dtype"]))
    if _describe(array) != {name: about[name] for name in ("dtype", "shape")}:
        raise Damaged(f"{folder}: damaged: {path} is not as {LEAVES} describes it.")
    return array


def _read_arrays(folder: Path, names: list[str]) -> dict[str, np.ndarray]:
    path = folder / STATE
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names}
    except Exception as error:  # zipfile and NumPy have a dozen kinds for files of other content
        raise Damaged(f"{path}: cannot be read ({first_line(error)}).") from error


def _read_orbax(folder: Path, names: list[str]) -> dict[str, np.ndarray]:
    """Reads a checkpoint of format 2. orbax keeps its log lines to itself.

    orbax takes a path for a pattern, in which brackets mean something: the path that it gets is
    made of the folder's descriptor.
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
            as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
            return checkpointer.restore(
                Path(f"/proc/self/fd/{handle}") / FORMER, restore_args=as_numpy
            )
    except Exception as error:
        why = first_line(error).replace(f"/proc/self/fd/{handle}", str(folder))
        raise Damaged(f"{folder / FORMER}: cannot be read ({cut(why)}).") from error
    finally:
        os.close(handle)
        logger.setLevel(level)


def _alone() -> Any:
    """One of several learner processes by itself; orbax would wait for the others to join in."""
    import jax
    from orbax.checkpoint.options import MultiprocessingOptions

    own = jax.process_index()
    return MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process-{own}"
    )


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
